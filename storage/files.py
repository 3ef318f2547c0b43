"""Writing so that a crash leaves the old file or the new one, never half of either."""

import errno
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from .errors import DiskError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
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
