"""Where a catalogue looks for manifests: a folder of this machine, or a prefix at an address.

Symbolic links are not followed, so that nothing outside the place is listed and nothing twice. Of a
bucket, one request for each folder lists what is directly in it: never the shards, of which a store
may have very many.
"""

import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from .address import Address, Place
from .errors import InputError, StoreError
from .manifest import COMMITS, MANIFEST
from .remote import Link

A = TypeVar("A")
B = TypeVar("B")
Warn = Callable[[str], object]

# Times of change are told apart by this much at least, also on file systems of other machines.
_SETTLED_S = 2.0
# Arrays of a store, in whose folder `c` there may be a folder for each shard. Of one whose manifest
# has not come yet, they are looked for in vain.
_ARRAYS = {
    "activations", "source", "masked", "mean", "variance", "relative_error",
    "tokens", "document", "length", "origin",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    """A manifest. name: of its folder, below the place; stamp: what tells its states apart.

    is_settled: whether whatever changes it from now on will give it another stamp.
    """

    name: str
    bytes: int
    stamp: str
    is_settled: bool


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that was looked into. below: the names of those in it, below the place."""

    name: str
    manifest: Found | None
    below: tuple[str, ...]


class Folders(Protocol):
    """A place with manifests in it. Names are relative to it, "" is the place itself."""

    @property
    def place(self) -> Place:
        """Where it is."""

    def look(self, names: Sequence[str]) -> list[Folder]:
        """What is in some folders; those that are gone, or cannot be read, are left out."""

    def read(self, found: Found, limit: int) -> tuple[Found, bytes]:
        """A manifest and its stamp as they are now.

        Raises FileNotFoundError when it is gone, StoreError when it cannot be read or is larger
        than `limit` bytes.
        """

    def each(self, act: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Do something with each item, several at once where that is faster."""

    def at(self, name: str) -> Place:
        """Where a folder is."""

    def sealed(self, name: str) -> int | None:
        """How many training shards of an unfinished store are sealed; None when it cannot be seen."""

    def close(self) -> None:
        """End what is under way."""


def folders_of(place: Place, warn: Warn) -> Folders:
    """The folders of a catalogue; InputError for a local one that is not there."""
    return RemoteFolders(place, warn) if isinstance(place, Address) else LocalFolders(place, warn)


def _names(folder: str, below: Iterable[str]) -> tuple[str, ...]:
    """Folders that may hold stores, below the place, by name."""
    usable = sorted(name for name in below if name and name[0] != "." and "/" not in name)
    if usable == ["c"] and folder.rpartition("/")[2] in _ARRAYS:
        return ()
    return tuple(f"{folder}/{name}" if folder else name for name in usable)


class LocalFolders:
    """A folder of this machine."""

    def __init__(self, place: Path, warn: Warn) -> None:
        if not os.path.isdir(place):  # also where it may not be looked at
            raise InputError(f"There is no folder {place}. Pass one that holds stores.")
        self.place, self._root, self._warn = place, place.resolve(), warn

    def look(self, names: Sequence[str]) -> list[Folder]:
        return [folder for name in names if (folder := self._look(name)) is not None]

    def _look(self, name: str) -> Folder | None:
        manifest, below = None, []
        try:
            with os.scandir(self._root / name) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        below.append(entry.name)
                    elif entry.name == MANIFEST and entry.is_file(follow_symlinks=False):
                        manifest = self._found(name, entry.stat(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._warn(f"{self.at(name)} cannot be read ({error.strerror}).")
            return None
        return Folder(name=name, manifest=manifest, below=_names(name, below))

    def read(self, found: Found, limit: int) -> tuple[Found, bytes]:
        path = self.at(found.name) / MANIFEST
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                now = self._found(found.name, os.fstat(descriptor))
                if now.bytes > limit:
                    raise _too_large(path, now.bytes, limit)
                return now, file.read(limit)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}).") from error

    @staticmethod
    def _found(name: str, seen: os.stat_result) -> Found:
        if not stat.S_ISREG(seen.st_mode):
            raise FileNotFoundError(name)
        stamp = f"{seen.st_size}-{seen.st_mtime_ns}-{seen.st_ctime_ns}-{seen.st_ino}"
        is_settled = seen.st_mtime < time.time() - _SETTLED_S
        return Found(name=name, bytes=seen.st_size, stamp=stamp, is_settled=is_settled)

    def each(self, act: Callable[[A], B], items: Iterable[A]) -> list[B]:
        return [act(item) for item in items]

    def at(self, name: str) -> Path:
        return self._root / name

    def sealed(self, name: str) -> int | None:
        return len(list((self._root / name / COMMITS / "train").glob("[0-9]*.json")))

    def close(self) -> None:
        """Nothing is under way."""


class RemoteFolders:
    """A prefix of a bucket, or a repository of the Hub."""

    def __init__(self, place: Address, warn: Warn) -> None:
        if not place.scheme.can_write:
            raise InputError(
                f"{place} cannot be listed: a web server does not say what it has. Pass a folder, or "
                "an address that begins with s3://, gs://, az:// or hf://."
            )
        self.place, self._warn, self._link = place, warn, Link(place, warn)

    def look(self, names: Sequence[str]) -> list[Folder]:
        found = self.each(self._look, names)
        return [folder for folder in found if folder is not None]

    def _look(self, name: str) -> Folder | None:
        try:
            entries = self._link.folder(name)
        except FileNotFoundError:
            if not name:
                self._warn(
                    f"There is nothing at {self.place}, or no such bucket, container or repository."
                )
            return None
        except StoreError as error:  # may not be read; what cannot be reached ends the search
            if not name:
                raise
            self._warn(str(error))
            return None
        manifest, below = None, []
        for entry, what in entries.items():
            if what is None:
                below.append(entry)
            elif entry == MANIFEST:
                size, version = what
                manifest = Found(
                    name=name, bytes=size, stamp=f"{size}-{version}", is_settled=bool(version)
                )
        return Folder(name=name, manifest=manifest, below=_names(name, below))

    def read(self, found: Found, limit: int) -> tuple[Found, bytes]:
        name = f"{found.name}/{MANIFEST}" if found.name else MANIFEST
        if found.bytes > limit:
            raise _too_large(f"{self.place}/{name}", found.bytes, limit)
        return found, self._link.read_small(name, limit)

    def each(self, act: Callable[[A], B], items: Iterable[A]) -> list[B]:
        return list(self._link.pool.map(act, items))

    def at(self, name: str) -> Address:
        return Address(f"{self.place}/{name}") if name else self.place

    def sealed(self, name: str) -> int | None:
        return None

    def close(self) -> None:
        self._link.end()


def _too_large(path: str | Path, size: int, limit: int) -> StoreError:
    return StoreError(
        f"{path} has {size:,} bytes, more than a catalogue reads of a manifest ({limit:,})."
    )
