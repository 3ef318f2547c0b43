"""The files of a store at an address, by name to a checked file in the cache.

manifest.json is read each time that a store is opened; everything else is fetched when it is first
needed, and compared with the size and SHA-256 that are recorded of it. A file that came with other
bytes is fetched once more, then refused by name; if the store was replaced meanwhile, that is what
the error says.
"""

import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from .address import Address
from .errors import StoreError
from .files import write_whole
from .manifest import (
    COMPLETE,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Manifest,
    checked_manifest,
    content_digest,
    parse_json,
)
from .remote import PART_BYTES, Link, Refused, Stopped, never, tell
from .shard_cache import Cache
from .verify import Content, StoredFile, stored_files

FILES_AT_ONCE = 4  # fetched; each in parts that share the link's connections


def fetch_manifest(address: Address) -> Manifest:
    """The manifest of a store at an address, checked as `read_manifest` does."""
    return _manifest(Link(address, tell))[0]


def _manifest(link: Link) -> tuple[Manifest, bytes]:
    try:
        data = link.read_small(MANIFEST, MANIFEST_LIMIT_BYTES)
    except FileNotFoundError:
        raise link.no_store() from None
    value = parse_json(data, f"{link.address}/{MANIFEST}")
    return checked_manifest(value, link.address), data


def open_to_verify(address: Address) -> tuple[Path, Manifest, Content]:
    """A folder with the small files of a store, its manifest, and the bytes that are there now.

    The content is read from the address, whatever the cache holds.
    """
    files = RemoteFiles(Link(address, tell), Cache.from_environment())
    for name in (*files.manifest.get("files", {}),):
        with suppress(Refused):  # it is found with the others
            files.local(name)

    def content(file: StoredFile) -> Iterator[bytes]:
        size = files.link.size(file.name)
        yield from files.link.parts(file.name, file.bytes if size is None else size)

    return files.folder, files.manifest, content


class RemoteFiles:
    """The files of one store at an address: by name to a file in the cache. Safe in threads."""

    def __init__(self, link: Link, cache: Cache) -> None:
        self.link, self.cache = link, cache
        self.manifest, data = _manifest(link)
        self.address = link.address
        if self.manifest.get("state") != COMPLETE:
            raise StoreError(
                f"Store {self.address} is not finished: its state is "
                f"{self.manifest.get('state')!r}. Finish it where it is written, and push it then."
            )
        try:
            is_same = content_digest(self.manifest) == self.manifest["digest"]
        except (KeyError, TypeError, ValueError, AttributeError):
            is_same = False
        if not is_same:
            raise StoreError(
                f"The manifest of {self.address} is damaged: its recipe, sizes and shards do not "
                "have the digest that it gives them. Push or harvest the store again."
            )
        # The digest leaves statistics and times out, so that alone it could not tell two apart.
        self.key = f"{self.manifest['digest'][:32]}-{hashlib.sha256(data).hexdigest()[:16]}"
        self.folder = cache.folder(self.key)
        self._records = self._recorded()
        descriptor = cache.open_store(self.key)
        weakref.finalize(self, os.close, descriptor)
        if not _has(self.folder / MANIFEST, data):
            write_whole(self.folder / MANIFEST, data)

    def _recorded(self) -> dict[str, StoredFile]:
        return {file.name: file for file in stored_files(self.folder, self.manifest)}

    def names(self) -> list[str]:
        """Every file that is recorded, the tokens' once corpus.json is there."""
        self._records = self._recorded()
        return list(self._records)

    def local(self, name: str) -> Path:
        """A file, fetched where it is not there yet; none when the store has none of that name.

        For what is not a shard: those stay while the store is open.
        """
        path = self.folder / name
        if name in self._records or name in self._recorded():
            os.close(self.open(name))
        return path

    def bring(self, names: Sequence[str]) -> None:
        """`local` for several at once."""
        if len(names) == 1:
            self.local(names[0])
            return
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="bring") as pool:
            list(pool.map(self.local, names))

    def open(self, name: str, *, can_wait: bool = False, is_stopped: Stopped = never) -> int:
        """A descriptor that holds a file in the cache.

        can_wait: raise NotNow where the cache has no room for it. is_stopped: whether it is not
        wanted any more. Raises Refused for other bytes than recorded, and as `Link.read`.
        """
        if name not in self._records:
            self._records = self._recorded()
        record = self._records[name]
        return self.cache.fetch(
            self.folder / name,
            record.bytes,
            lambda part: self._download(record, part, is_stopped),
            can_wait=can_wait,
            is_stopped=is_stopped,
        )

    def is_damaged(self, name: str) -> bool:
        """Whether a cached file has other bytes than recorded; then it is forgotten."""
        record, path = self._records[name], self.folder / name
        descriptor = self.cache.open_file(path, record.bytes)
        if descriptor is None:
            return True
        try:
            if sha256_of(descriptor) == record.sha256:
                return False
            self.cache.drop(path)
            return True
        finally:
            os.close(descriptor)

    # --- fetching ---

    def _download(self, record: StoredFile, part: int, is_stopped: Stopped) -> None:
        """Write a file to a descriptor, its bytes checked; twice, if they are others at first."""
        what = ""
        for _ in range(2):
            try:
                self._download_once(record, part, is_stopped)
                if sha256_of(part) == record.sha256:
                    return
                what = "has other bytes than the manifest records"
            except FileNotFoundError:
                what = "is missing"
            self._check_unchanged()
        raise Refused(
            f"{self.address}/{record.name} {what}, also when it is asked for again. Push or "
            "harvest the store again."
        )

    def _download_once(self, record: StoredFile, part: int, is_stopped: Stopped) -> None:
        starts = range(0, record.bytes, PART_BYTES)

        def fetch(start: int) -> None:
            stop = min(start + PART_BYTES, record.bytes)
            _write_at(part, self.link.read(record.name, start, stop, is_stopped), start)

        jobs = []
        if self.address.protocol.startswith("http") and len(starts) > 1:
            fetch(0)  # it tells whether the server knows ranges
            starts = starts[1:]
            if not self.link.has_ranges:
                _write_at(part, self.link.read(record.name, 0, record.bytes, is_stopped), 0)
                return
        try:
            jobs = [self.link.pool.submit(fetch, start) for start in starts]
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()

    def _check_unchanged(self) -> None:
        """StoreError when another store stands at the address by now."""
        now = _manifest(self.link)[0].get("digest")
        if now != self.manifest["digest"]:
            raise StoreError(
                f"Store {self.address} was replaced while it was read: it had the digest "
                f"{self.manifest['digest']}, and now has {now}. Open it again; a fit from the "
                "other rows needs another --out."
            )

    def close(self) -> None:
        """End the requests."""
        self.link.end()


def sha256_of(descriptor: int) -> str:
    """SHA-256 of an open file, wherever it stands, in hex."""
    digest, place = hashlib.sha256(), 0
    while data := os.pread(descriptor, 1 << 20, place):
        digest.update(data)  # lets the interpreter lock go
        place += len(data)
    return digest.hexdigest()


def _write_at(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(descriptor, view, place)
        view, place = view[n:], place + n


def _has(file: Path, data: bytes) -> bool:
    try:
        return file.read_bytes() == data
    except OSError:
        return False
