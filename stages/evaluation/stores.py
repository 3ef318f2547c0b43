"""Which store each run is judged on: one for all runs that have their text, model and layer in
common, so that their numbers can be compared row by row.

Held-out rows are unmasked, whatever the mask ratio of a store's training rows: those of one harvest
are the same rows in each of its stores, written once for each. Judging masked and unmasked runs on
one of them makes that a fact of the result (one digest) and saves a reading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...storage import ActivationStore, open_store
from ...storage.address import Place
from ...storage.errors import InputError, SaePipeError
from ...storage.files import json_digest
from ..sae.weights import read_config
from .cases import RunCase
from .sources import check_match, store_origin


@dataclass(frozen=True, kw_only=True)
class StoreGroup:
    """A store, and the runs that are judged on it."""

    store: ActivationStore
    cases: list[RunCase]


def group_by_store(
    cases: Sequence[RunCase], given: Place | None, say: Callable[[str], object]
) -> list[StoreGroup]:
    """The given store for all runs, or for each harvest the first store that a run was fitted from.

    Raises InputError where a run names no store or none of them is there, and where a run and its
    store do not fit; StoreError for a damaged store.
    """
    if given is not None:
        group = StoreGroup(store=open_store(given, unfinished=True), cases=list(cases))
        _check(group)
        return [group]
    by_harvest: dict[str, list[RunCase]] = {}
    for case in cases:
        by_harvest.setdefault(_harvest_of(case), []).append(case)
    groups = [StoreGroup(store=_first_store(of), cases=of) for of in by_harvest.values()]
    for group in groups:
        _check(group)
        _tell(group, say)
    return groups


def _harvest_of(case: RunCase) -> str:
    """What stores have in common that hold the same held-out rows, in one word."""
    store = read_config(case.run).get("store")
    recipe = store.get("recipe") if isinstance(store, dict) else None
    if not isinstance(recipe, dict) or "corpus" not in recipe:
        return str(case.facts.get("store_digest"))
    names = ("model", "hook", "layer", "dtype", "keep_first", "corpus")
    return json_digest({name: recipe.get(name) for name in names})


def _first_store(cases: Sequence[RunCase]) -> ActivationStore:
    """The store of the first run, or, where that is gone, of the next."""
    errors: list[SaePipeError] = []
    for path in dict.fromkeys(_path_of(case) for case in cases):
        try:
            return open_store(path, unfinished=True)
        except SaePipeError as error:
            errors.append(error)
    raise InputError(f"{errors[0]} Or pass another --store, or --metrics items.") from errors[0]


def _path_of(case: RunCase) -> str:
    path: Any = case.facts.get("store")
    if not isinstance(path, str):
        raise InputError(
            f"Run {case.name} does not say which store it was fitted from. Pass --store, or "
            "--eval-set with --metrics items."
        )
    return path


def _check(group: StoreGroup) -> None:
    for case in group.cases:
        check_match(case.facts, store_origin(group.store), f"store {group.store.place}")


def _tell(group: StoreGroup, say: Callable[[str], object]) -> None:
    store = group.store
    others = [c.name for c in group.cases if c.facts.get("store_digest") != store.digest]
    if others:
        say(
            f"All {len(group.cases)} are judged on the held-out rows of {store.place}, which are "
            f"unmasked; {len(others)} of them were fitted from another store of the same text."
        )
