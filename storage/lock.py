"""One writer at a time: a lock that a dead process does not hold."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import InputError
from .files import disk_error

# `has_writer` looks by taking the lock for an instant, which must not turn a writer away.
_TRIES, _BETWEEN_S = 3, 0.05


@contextmanager
def sole_writer(folder: Path, what: str) -> Iterator[None]:
    """Hold the writer's lock of a folder; InputError names the process that has it.

    flock is released by the kernel when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link, which would empty what it leads to.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(folder / ".lock", flags, 0o666), "a+")
    except OSError as error:
        raise disk_error(error, folder) from error
    with file:
        if not _locked(file):
            file.seek(0)
            owner = file.read(64).strip() or "unknown"
            raise InputError(
                f"{what} {folder} is being written by another process (pid {owner}). "
                "Wait for it to end, or stop it, then run the same command again."
            )
        try:
            file.truncate(0)
            # Not through the buffer of `file`, which would be written again when it is closed.
            os.write(file.fileno(), str(os.getpid()).encode())
        except OSError as error:
            raise disk_error(error, folder) from error
        yield


def _locked(file: IO[str]) -> bool:
    for number in range(_TRIES):
        if number:
            time.sleep(_BETWEEN_S)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
    return False


def has_writer(folder: Path) -> bool | None:
    """Whether a living process holds the writer's lock of a folder; None when that cannot be seen."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False
