"""One writer at a time: a lock that a dead process does not hold."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError
from .files import disk_error


@contextmanager
def sole_writer(folder: Path, what: str) -> Iterator[None]:
    """Hold the writer's lock of a folder; InputError names the process that has it.

    flock is released by the kernel when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise disk_error(error, folder) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(64).strip() or "unknown"
            raise InputError(
                f"{what} {folder} is being written by another process (pid {owner}). "
                "Wait for it to end, or stop it, then run the same command again."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
