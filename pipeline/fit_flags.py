"""From flags of `sae-pipe fit`, any of which may be a list, to one FitConfig for each combination."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..stages.fitconfig import FitConfig
from ..stages.torchrun import Seat
from ..storage.address import Place, place
from ..storage.errors import InputError

T = TypeVar("T")

RUNS = Path("runs")
# What a flag is called in FitConfig, where that is not its own name.
FIELDS = {"l0": "k"}
_KINDS = {int: "a whole number", str: "a name"}


def listed(flag: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The values of a list with commas. Raises InputError for what cannot be one."""
    found: list[T] = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            raise InputError(f"--{flag.replace('_', '-')} {text!r} has an empty place in its list.")
        try:
            found.append(kind(part))
        except ValueError as error:
            raise InputError(
                f"--{flag.replace('_', '-')} {text} has {part!r} in it, which has to be "
                f"{_KINDS[kind]}."  # type: ignore[index]
            ) from error
    return _each_once(flag, found)


def _each_once(flag: str, values: list[T]) -> list[T]:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise InputError(f"--{flag.replace('_', '-')} names {twice} twice. Pass each value once.")
    return values


def paths(entries: Sequence[str]) -> list[Place]:
    """Stores, given one by one or as lists with commas; a path that has commas is one path."""
    parts = [
        part
        for entry in entries
        for part in ([entry] if Path(entry).exists() else entry.split(","))
    ]
    return _each_once("store", [place(part.strip()) for part in parts])


def check_workers(workers: int | None, n_stores: int) -> None:
    """InputError for --workers that have nothing to do."""
    if workers is not None and workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}.")
    if workers is not None and workers > 1 and n_stores == 1:
        raise InputError(
            "--workers take a store each, and there is one --store. Leave --workers out: SAEs of "
            "one store are fitted together by one process."
        )


def check_torchrun(seat: Seat, *, follow: bool, workers: int | None) -> None:
    """InputError for flags that are for one process, where torchrun has started several."""
    if seat.world_size > 1 and follow:
        raise InputError(
            "--follow is for a single process. Fit when the store is complete, or without torchrun."
        )
    if seat.world_size > 1 and workers is not None:
        raise InputError(
            "--workers start processes of their own, and torchrun has started "
            f"{seat.world_size} that fit each SAE together. Leave --workers out."
        )


def fit_configs(flags: Mapping[str, Any]) -> list[FitConfig]:
    """One config for each combination of the flags that are lists; flags of other things are left
    aside. Raises InputError for values that cannot work."""
    known = {field.name for field in fields(FitConfig)}
    values = {
        FIELDS.get(flag, flag): _each_once(flag, value) if isinstance(value, list) else [value]
        for flag, value in flags.items()
        if FIELDS.get(flag, flag) in known
    }
    if "lr" in values:
        values["lr"] = [_learning_rate(value) for value in values["lr"]]
    choices = itertools.product(*values.values())
    return [FitConfig(**dict(zip(values, choice, strict=True))) for choice in choices]


def _learning_rate(value: Any) -> float | None:
    if value is None or value == "auto":
        return None
    try:
        return float(value)
    except ValueError as error:
        raise InputError(f"--lr is {value!r}, and has to be a number or auto.") from error
