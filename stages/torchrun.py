"""What torchrun tells each process that it starts, by environment variables. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..storage.errors import InputError

_WORLD_SIZE = "WORLD_SIZE"
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a process stands: one of `world_size`, and one of `local_size` on its machine."""

    world_size: int = 1
    rank: int = 0
    local_size: int = 1
    local_rank: int = 0


def find_seat(environment: Mapping[str, str] = os.environ) -> Seat:
    """The seat of this process; that of a process by itself where nothing names a world.

    Raises InputError for variables that cannot be torchrun's.
    """
    if environment.get(_WORLD_SIZE, "1").strip() == "1":
        return Seat()
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        raise InputError(
            f"{_WORLD_SIZE} is {environment[_WORLD_SIZE]!r}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set. Start the processes with torchrun, "
            f"or unset {_WORLD_SIZE} for a single one."
        )
    world_size = _count(environment, _WORLD_SIZE, 1, None)
    rank = _count(environment, "RANK", 0, world_size)
    local_size = _count(environment, "LOCAL_WORLD_SIZE", 1, world_size + 1, world_size)
    local_rank = _count(environment, "LOCAL_RANK", 0, local_size, rank)
    return Seat(world_size=world_size, rank=rank, local_size=local_size, local_rank=local_rank)


def _count(
    environment: Mapping[str, str],
    name: str,
    least: int,
    below: int | None,
    default: int | None = None,
) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if text.strip().isdecimal() and int(text) >= least and (below is None or int(text) < below):
        return int(text)
    range_ = f"{least} or more" if below is None else f"from {least} to {below - 1}"
    raise InputError(
        f"{name} is {text!r}, and has to be a whole number, {range_}. Start the processes with "
        f"torchrun, or unset {_WORLD_SIZE} for a single one."
    )
