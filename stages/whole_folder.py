"""A folder that appears whole, by one rename, or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..storage.errors import InputError
from ..storage.files import disk_error, fsync_folder


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its name when the block ends without an error.

    Raises InputError when something stands at `out`, DiskError when it cannot be written.
    """
    check_free(out)
    unfinished = out.with_name(f".{out.name}.{secrets.randbits(64)}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, out)
        fsync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and type(error).__module__ == "builtins":
            raise disk_error(error, out) from error
        raise


def check_free(out: Path) -> None:
    """InputError when something stands at a place that is to be written."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists. Pass another --out, or move it away.")
