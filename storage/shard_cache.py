"""A folder of files fetched from elsewhere, shared by processes, the least recently used given up.

    CACHE/CACHEDIR.TAG          says that this is a cache of ours
    CACHE/stores/KEY/...        files of a store, under the names they have there
    CACHE/stores/KEY.open       held with a shared flock by who has that store open
    CACHE/incoming/NAME.part    a file on its way, held with an exclusive flock by who fetches it

A file appears under its name by one rename, once its size and SHA-256 were compared. So a process
that is killed leaves a .part that nobody holds, and nothing else; flock goes with the process. Who
reads a shard holds a shared flock on the file itself; whoever needs room takes an exclusive one
before a file is removed, and leaves those that are held. The last use is the file's time of change.
Nothing is synced to the disk: what a power cut spoils fails a checksum and is fetched again.
"""

import errno
import fcntl
import hashlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .disk import free_bytes, human_bytes
from .errors import DiskError, InputError
from .files import disk_error, write_whole

CACHE_DIR, CACHE_SIZE = "SAE_PIPE_CACHE", "SAE_PIPE_CACHE_SIZE"  # environment variables
DEFAULT_SIZE = "100GB"
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SPARE_BYTES = 200_000_000  # of the disk, left free
_SLACK = 32  # a cache of many files is emptied to so much less than its size
_LOOK_AGAIN_S = 0.1
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"  # bford.info/cachedir
    "# Activation stores that sae-pipe has fetched. It can be removed when no sae-pipe runs.\n"
)
_SHARD = re.compile(r"(heldout/)?(activations|source|masked)/c/.*")

Stopped = Callable[[], bool]


class NotNow(Exception):
    """What can wait finds no room, or is not wanted any more; not an error of the user's."""


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 50GB, 800MB or 123; InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?[bB]?)\s*", text)
    unit = "" if found is None else found[2].lower().replace("b", "")
    if found is None:
        raise InputError(f"{text!r} is not a size. Pass one such as 50GB, 800MB or 2TB.")
    return int(float(found[1]) * _UNITS[f"{unit}b" if unit else ""])


@dataclass(frozen=True)
class Cache:
    """The cache folder. limit_bytes: what its files may take together."""

    root: Path
    limit_bytes: int

    @classmethod
    def from_environment(cls) -> Self:
        """As the user has set it: SAE_PIPE_CACHE and SAE_PIPE_CACHE_SIZE, or the defaults.

        The flags of commands set these, so that worker processes have the same cache.
        """
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae-pipe"
        root = Path(os.environ.get(CACHE_DIR) or default).absolute()
        return cls(root, parse_bytes(os.environ.get(CACHE_SIZE) or DEFAULT_SIZE))

    def folder(self, key: str) -> Path:
        """Where the files of one store are."""
        return self.root / "stores" / key

    def open_store(self, key: str) -> int:
        """A descriptor that keeps all but the shards of a store from being given up."""
        file = self.root / "stores" / f"{key}.open"
        self._claim()
        try:
            self.folder(key).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise disk_error(error, file) from error
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def _claim(self) -> None:
        """InputError when the folder holds other things than a cache, which might be given up."""
        tag = self.root / "CACHEDIR.TAG"
        if tag.is_file() and "sae-pipe" in tag.read_text(errors="replace"):
            return
        if tag.exists() or any((self.root / name).exists() for name in ("stores", "incoming")):
            raise InputError(
                f"{self.root} is not a cache of sae-pipe. Pass another --cache-dir, or set "
                f"{CACHE_DIR} to a new folder."
            )
        write_whole(tag, _TAG.encode())

    # --- files ---

    def open_file(self, path: Path, n_bytes: int) -> int | None:
        """A descriptor that holds a cached file; None when it is not there with its size."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            found = os.fstat(descriptor)
            if found.st_nlink == 0:  # given up in between
                os.close(descriptor)
                continue
            if found.st_size != n_bytes:
                os.close(descriptor)
                return None
            with suppress(OSError):  # of another user
                os.utime(descriptor)
            return descriptor

    def fetch(
        self,
        path: Path,
        n_bytes: int,
        download: Callable[[int], object],
        *,
        can_wait: bool = False,
        is_stopped: Stopped = lambda: False,
    ) -> int:
        """A descriptor that holds a file, which `download` writes where it is not there yet.

        download: given a descriptor to write n_bytes to, compares what came with its digest. Of
        several processes or threads one downloads, and the others wait for it. can_wait: raise
        NotNow rather than exceed the size of the cache. Raises InputError for a file that the cache
        may not hold, DiskError, and what download raises.
        """
        self.check_fits(path, n_bytes)
        while (held := self.open_file(path, n_bytes)) is None:
            with self._incoming(path, is_stopped) as (part, name):
                if (held := self.open_file(path, n_bytes)) is not None:
                    break
                try:
                    self.make_room(n_bytes, can_wait=can_wait)
                    os.truncate(part, n_bytes)  # counts from now on, whoever looks
                    download(part)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(name, path)
                except OSError as error:
                    if type(error).__module__ != "builtins" or error.errno is None:
                        raise
                    raise (
                        self._full(path) if _is_full(error) else disk_error(error, path)
                    ) from error
        return held

    @contextmanager
    def _incoming(self, path: Path, is_stopped: Stopped) -> Iterator[tuple[int, Path]]:
        """The only descriptor that a file is written to, with its name. Waits for others'."""
        number = hashlib.sha256(str(path.relative_to(self.root)).encode()).hexdigest()[:32]
        name = self.root / "incoming" / f"{number}.part"
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, name) from error
        while True:
            try:
                part = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise disk_error(error, name) from error
            try:
                if _locked(part) and _is_at(part, name):
                    try:
                        yield part, name
                    finally:
                        with suppress(OSError):
                            if _is_at(part, name):  # it was not renamed
                                name.unlink()
                    return
            finally:
                os.close(part)
            if is_stopped():
                raise NotNow
            time.sleep(_LOOK_AGAIN_S)

    def drop(self, path: Path) -> None:
        """Forget a file: it is damaged."""
        path.unlink(missing_ok=True)

    # --- room ---

    def make_room(self, n_bytes: int, *, can_wait: bool = False) -> None:
        """Give up files, the least recently used first, until n_bytes more fit.

        can_wait: raise NotNow where that many are in use; otherwise the size is exceeded, as little
        as can be. Raises DiskError when the disk is full of other things. Nothing is given up for
        what would not fit even then.
        """
        with self._sole_evictor() as lock:
            free = free_bytes(self.root)
            spare = free - n_bytes - _SPARE_BYTES
            used = _noted(lock)
            if used is not None and used + n_bytes <= self.limit_bytes and spare >= 0:
                _note(lock, used + n_bytes)
                return
            files = self._files()
            used = sum(size for _, size, _ in files)
            if n_bytes > free + used:
                raise self._full(self.root)
            excess = max(used + n_bytes - self.limit_bytes, -spare)
            # Where files are many, some more go at once: looking at all takes a while.
            more = self.limit_bytes // _SLACK if n_bytes * 2 * _SLACK <= self.limit_bytes else 0
            freed = 0
            for _, size, file in sorted(files):
                if excess <= freed - (more if freed else 0):
                    break
                if self._given_up(file):
                    freed += size
            is_room = excess <= freed
            _note(lock, used - freed + (0 if can_wait and not is_room else n_bytes))
            if can_wait and not is_room:
                raise NotNow
            if n_bytes > free_bytes(self.root):
                raise self._full(self.root)

    @contextmanager
    def _sole_evictor(self) -> Iterator[int]:
        """The lock of who makes room, in which it is noted how much is used."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise disk_error(error, self.root) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Last use, bytes and path of everything there."""
        found = []
        walks = [os.walk(self.root / below) for below in ("stores", "incoming")]
        for folder, _, names in itertools.chain(*walks):
            for name in names:
                file = Path(folder, name)
                try:
                    entry = file.lstat()
                except FileNotFoundError:
                    continue
                if entry.st_size:
                    found.append((entry.st_mtime, entry.st_size, file))
        return found

    def _given_up(self, file: Path) -> bool:
        """Remove a file unless somebody uses it; whether it is gone."""
        parts = file.relative_to(self.root).parts
        held, flags = file, os.O_RDONLY | os.O_CLOEXEC
        if parts[0] == "stores" and _SHARD.fullmatch("/".join(parts[2:])) is None:
            held, flags = self.root / "stores" / f"{parts[1]}.open", flags | os.O_CREAT
        try:
            descriptor = os.open(held, flags, 0o666)
        except OSError:
            return False
        try:
            if not _locked(descriptor):
                return False
            file.unlink(missing_ok=True)
            return True
        finally:
            os.close(descriptor)

    def check_fits(self, path: Path, n_bytes: int) -> None:
        """InputError for a file that the cache may not hold, for which everything else would go."""
        if n_bytes <= self.limit_bytes:
            return
        name = "/".join(path.relative_to(self.root).parts[2:])
        raise InputError(
            f"{name} of a store is said to have {human_bytes(n_bytes)}, and the cache {self.root} may "
            f"hold {human_bytes(self.limit_bytes)}. If that is its size, pass a larger --cache-size "
            f"or set {CACHE_SIZE}."
        )

    def _full(self, path: Path) -> DiskError:
        return DiskError(
            f"The disk is full: {path} could not be written, and nothing in the cache {self.root} "
            f"can be given up ({human_bytes(free_bytes(self.root))} are free). Free space there, or "
            f"pass another --cache-dir or set {CACHE_DIR}."
        )


class Held:
    """Descriptors that hold cached files, by name; closed together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}

    def add(self, name: str, descriptor: int) -> None:
        """Keep a descriptor; one of that name that is kept already makes it superfluous."""
        with self._lock:
            if self._descriptors.setdefault(name, descriptor) != descriptor:
                os.close(descriptor)

    def let_go(self, keep: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """Close all but those of some names."""
        with self._lock:
            for name in [name for name in self._descriptors if name not in keep]:
                os.close(self._descriptors.pop(name))


def _noted(lock: int) -> int | None:
    """Bytes in use as they were noted last, never too few; None when nobody has looked yet."""
    text = os.pread(lock, 32, 0)
    return int(text) if text.isdigit() else None


def _note(lock: int, n_bytes: int) -> None:
    os.pwrite(lock, f"{n_bytes:020}".encode(), 0)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, name: Path) -> bool:
    """Whether a descriptor's file still has that name."""
    try:
        there, here = os.stat(name), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
