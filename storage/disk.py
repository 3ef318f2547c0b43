"""Disk space, said for people and asked for before it is needed; folders shared by hard links."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import DiskError
from .files import disk_error, fsync_folder


def free_bytes(path: Path) -> int:
    """Free space of the disk that a path is, or will be, on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def human_bytes(n: float) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" or n >= 100 else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def check_room(path: Path, needed: int) -> None:
    """DiskError when the disk that `path` will be on has less than `needed` bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise DiskError(
            f"The disk is too small: {path} needs about {human_bytes(needed)}, and "
            f"{human_bytes(free)} are free at {path.absolute().parent}. Free space there, or pass "
            "a place on a larger disk."
        )


def link_tree(
    source: Path, target: Path, check: Callable[[Path], object] = lambda folder: None
) -> None:
    """Make `target` hold the files of `source`, without copying them where the disk allows.

    Files of a store are never changed in place, only replaced, so sharing them is safe. check: of the
    copy, before it is `target`; what it raises leaves nothing. Raises DiskError.
    """
    unfinished = target.with_name(f".{target.name}.linking")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for folder, _, names in os.walk(source, onerror=_raise):
            place = unfinished / Path(folder).relative_to(source)
            place.mkdir(parents=True, exist_ok=True)
            for name in names:
                if not Path(folder, name).is_symlink():  # may lead anywhere, and is no store's
                    link_or_copy(Path(folder, name), place / name)
        check(unfinished)
        os.replace(unfinished, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _raise(error: OSError) -> None:
    raise error


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """One file under a second name, or a copy of it where the disk does not allow that."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)
        with open(target, "rb") as copied:
            os.fsync(copied.fileno())
