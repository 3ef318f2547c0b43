"""Local files of text: finding them, and what identifies one."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...storage.errors import InputError
from .base import Json

_SAMPLE_BYTES = 64 * 1024


def looks_local(dataset: str) -> bool:
    """Whether a name can only be a local path: it is there, or no Hub id is spelt like it."""
    return (
        os.path.exists(os.path.expanduser(dataset))
        or dataset.startswith((".", "/", "~"))
        or glob.has_magic(dataset)
        or dataset.count("/") > 1
        or "\\" in dataset
    )


def find_files(dataset: str, suffixes: Sequence[str]) -> list[tuple[Path, str]]:
    """Files of a path, a glob or a folder with their names relative to it, in order of the names.

    A folder is searched to its depths for files with a known suffix; a file or a glob's match has
    to have one.
    """
    path = Path(dataset).expanduser()
    known = ", ".join(suffixes)
    if path.is_dir():
        files = [file for file in _walk(path) if suffix_of(file, suffixes) is not None]
        base = path
    else:
        files = [path] if path.is_file() else _match(str(path))
        base = Path(os.path.commonpath([file.parent for file in files])) if files else path
        for file in files:
            if suffix_of(file, suffixes) is None:
                raise InputError(
                    f"Text file {file} has an unknown suffix. Known are {known}; rename the file, "
                    "or pass another one."
                )
    if not files:
        what = "holds no text file" if path.is_dir() else "is no file, folder or matching pattern"
        raise InputError(
            f"Dataset {dataset!r} {what}. Pass a file, a folder or a glob of {known} files, or a "
            "Hub dataset id."
        )
    named = [(file, file.relative_to(base).as_posix()) for file in files]
    return sorted(named, key=lambda pair: pair[1])


def suffix_of(file: Path, suffixes: Sequence[str]) -> str | None:
    """The longest known suffix that a file name ends in."""
    fitting = [suffix for suffix in suffixes if file.name.lower().endswith(suffix)]
    return max(fitting, key=len, default=None)


def file_identity(path: Path, name: str) -> Json:
    """Name, size, and SHA-256 over the first, the middle and the last 64 KiB.

    Not of the whole file: that would read a terabyte before the first token.
    """
    size = path.stat().st_size
    sample = hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, max(0, (size - _SAMPLE_BYTES) // 2), max(0, size - _SAMPLE_BYTES)):
            file.seek(start)
            sample.update(file.read(_SAMPLE_BYTES))
    return {"name": name, "bytes": size, "sample_sha256": sample.hexdigest()}


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, hidden ones left out: caches and version control."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _match(pattern: str) -> list[Path]:
    return [Path(found) for found in glob.glob(pattern, recursive=True) if os.path.isfile(found)]
