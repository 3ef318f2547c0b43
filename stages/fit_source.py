"""Which rows a fit gets: a complete store, what there is of an unfinished one, or all as it comes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..storage import ActivationStore, open_store
from ..storage.address import Address, Place, only_local
from ..storage.extension import store_before
from ..storage.manifest import COMPLETE, Manifest, layout_of, read_manifest
from ..storage.unfinished import PrefixStore, follow_store, open_prefix
from .rundir import RunFolder
from .sae.weights import is_run_config, load_config

Say = Callable[[str], object]


def open_to_fit(path: Place, run: Path, *, follow: bool, say: Say) -> ActivationStore:
    """Open a store for the run in a folder, which may have been begun.

    A run that was begun on the first rows of an unfinished store, or before a store was extended,
    goes on with just those, even if there are more by now. follow: all rows, waited for. say: told which rows these are, and about
    waiting. Raises StoreError as `open_store` does, or when no row is there yet.
    """
    if follow:
        folder = only_local(path, "A store is followed where it is written")
        followed = follow_store(folder, say, begun=_recipe(run).get("store_digest"))
        _say_if_extended(followed, read_manifest(folder), say)
        return followed
    if isinstance(path, Address):
        return open_store(path)
    pin = _pinned(run)
    if "prefix_rows" in pin:
        store: ActivationStore = open_prefix(path, pin["prefix_rows"], pin["prefix_heldout_rows"])
        begun = " that it was begun with"
    elif read_manifest(path).get("state") == COMPLETE:
        return _as_begun(open_store(path), run, say)
    else:
        store, begun = open_store(path, unfinished=True), ""
    if isinstance(store, PrefixStore):  # not if it was completed just now
        how = "fitting from" if not begun else "going on with"
        is_complete = read_manifest(path).get("state") == COMPLETE
        what = f"{path} is unfinished" if not is_complete else f"{path} is complete by now"
        say(f"{what}: {how} {store.describe()}{begun}.")
    return store


def _as_begun(store: ActivationStore, run: Path, say: Say) -> ActivationStore:
    """A store, or of one that was extended the rows that a run was begun with."""
    before = store_before(store, _recipe(run).get("store_digest"))
    if before is None:
        return store
    _say_if_extended(before, store.manifest, say)
    return before


def _say_if_extended(store: ActivationStore, now: Manifest, say: Say) -> None:
    """Say so if a store is the rows before an extension. now: the manifest of what is there."""
    n_rows = layout_of(now["train"], store.place).n_rows
    if n_rows > store.n_rows:
        say(
            f"{store.place} was extended to {n_rows:,} rows since: going on with the "
            f"{store.n_rows:,} that it was begun with."
        )


def _pinned(run: Path) -> dict[str, Any]:
    """The rows that a run was begun with; nothing when there is no run, or it is damaged."""
    recipe, names = _recipe(run), ("prefix_rows", "prefix_heldout_rows")
    if not all(type(recipe.get(name)) is int and recipe[name] >= 0 for name in names):
        return {}
    return {name: recipe[name] for name in names}


def _recipe(run: Path) -> dict[str, Any]:
    """What is recorded of a run that was begun; nothing when there is none, or it is damaged."""
    if not RunFolder(run).config_file.is_file():
        return {}
    config = load_config(run)
    recipe = config.get("recipe") if is_run_config(config) else None
    return recipe if isinstance(recipe, dict) else {}
