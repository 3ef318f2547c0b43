"""Inputs of `sae-pipe store import`: IMPORTERS is the one list of kinds."""

from pathlib import Path

from ...storage.errors import InputError
from .arrow import ArrowInput
from .base import RawRows, RowInput
from .npy import NpyInput
from .safetensors import SafetensorsInput
from .zarr_array import ZarrInput

__all__ = ["IMPORTERS", "RawRows", "RowInput", "open_input"]

# The first that takes a path reads it.
IMPORTERS: dict[str, type[RowInput]] = {
    "zarr": ZarrInput,
    "datasets": ArrowInput,
    "npy": NpyInput,
    "safetensors": SafetensorsInput,
}


def open_input(path: Path, members: dict[str, str | None]) -> RowInput:
    """The rows at a path. members: what each selector flag names, by the flag without dashes.

    Raises InputError, one sentence, for whatever cannot be read.
    """
    if not path.exists():
        raise InputError(f"There is nothing at {path}. Pass a file or folder of activations.")
    found = next((each for each in IMPORTERS.values() if each.takes(path)), None)
    if found is None:
        known = "; ".join(each.about for each in IMPORTERS.values())
        raise InputError(f"{path} is nothing that can be imported. Known are {known}.")
    for flag, value in members.items():
        if value is not None and flag != found.selector:
            fitting = f"Pass --{found.selector}" if found.selector else "Leave it out"
            raise InputError(
                f"--{flag} is not for {path}, which is read as {found.kind}. {fitting}."
            )
    return found.open(path, members.get(found.selector or ""))
