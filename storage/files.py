"""Writing so that a crash leaves the old file or the new one, never half of either."""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import DiskError, StoreError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", re.ASCII)
LONGEST_PART = 200  # characters: file systems take 255 bytes, and temporary names are longer
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder.

    Raises DiskError when the disk is full or the folder cannot be written; the temporary file is
    removed and an older file of that name stays as it was.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # a name that is too long, say: what went wrong first is told
            temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def temporary_name(path: Path) -> Path:
    """Where a file is written before it gets its name; `remove_leftovers` knows it.

    With a number that no other writer draws: processes of two hosts may have the same id, and one
    that was given up for dead may still write the file that another now writes in its place.
    """
    return path.with_name(f".{path.name}.{secrets.randbits(64)}.tmp")


def is_leftover(name: str) -> bool:
    """Whether a file has a name that `write_whole` gives to a file it has not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path, *, deep: bool) -> None:
    """Remove what killed writers left in a folder of ours: files that were never renamed.

    deep: also below it. The caller holds the folder's lock, so that none of them belongs to a
    writer whose work still counts, and knows that the folder is ours. (A worker of a cluster whose
    harvest was killed may be left over and still write: its rename fails, and nobody waits for it.)
    """
    for file in folder.rglob(".*.tmp") if deep else folder.glob(".*.tmp"):
        if is_leftover(file.name):
            file.unlink(missing_ok=True)


def disk_error(error: OSError, path: Path) -> DiskError:
    """The sentence for an OSError met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(
            f"The disk is full: {path} could not be written. What is complete is kept; "
            "free space there and run the same command again to go on."
        )
    return DiskError(
        f"{path} could not be written ({error.strerror or error}). "
        "Choose a folder that this user can write."
    )


def is_plain_name(name: object) -> bool:
    """Whether a text may name a file below a folder: parts of letters, digits and `._-`, none hidden.

    So it leaves its folder on no system: there is no `..`, no root, no drive, no backslash, no NUL.
    No part is so long that a file system refuses it.
    """
    if not isinstance(name, str) or len(name) > 1000 or _NAME.fullmatch(name) is None:
        return False
    return all(len(part) <= LONGEST_PART for part in name.split("/"))


def plain_size(root: Path, name: str) -> int:
    """Bytes of a file by its name below a folder, which may be anybody's.

    Raises StoreError unless it is a plain file and no symbolic link leads to it: a link could lead
    out of the folder, and a pipe or a device never end. OSError when it is missing.
    """
    place, parts = str(root), name.split("/")
    for part in parts:
        place = f"{place}/{part}"
        found = os.lstat(place)
        if stat.S_ISLNK(found.st_mode):
            raise _not_plain(place, "a symbolic link")
    if not stat.S_ISREG(found.st_mode):
        raise _not_plain(place, "no plain file")
    return found.st_size


def check_no_link(root: Path, name: str) -> None:
    """StoreError when a symbolic link would lead what is written below a folder somewhere else."""
    place = str(root)
    for part in name.split("/"):
        place = f"{place}/{part}"
        if os.path.islink(place):
            raise StoreError(
                f"{place} is a symbolic link, and nothing is written through one. Remove it, or pass "
                "another place."
            )


def check_no_links(root: Path) -> None:
    """`check_no_link` for everything that stands below a folder."""
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            check_no_link(Path(folder), name)


def _not_plain(place: str, what: str) -> StoreError:
    return StoreError(
        f"{place} is {what}, and only plain files are read. If you know where its folder comes "
        "from, copy that with `cp -rL`, which puts files in the place of links."
    )


def read_plain(root: Path, name: str, limit_bytes: int) -> bytes:
    """A file of bounded size by its name below a folder; ValueError when it is larger.

    Raises StoreError as `plain_size` does, OSError when it cannot be read.
    """
    size = plain_size(root, name)
    if size > limit_bytes:
        raise ValueError(f"it has {size:,} bytes, and none needs more than {limit_bytes:,}")
    with (root / name).open("rb") as file:
        return file.read(size)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN. What hashes are taken of."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    ).encode()


def json_digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())


def is_sha256(value: object) -> bool:
    """Whether a value is a SHA-256 in hex."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex: what `sha256sum` prints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
