"""The files of a store at an address, by name to a checked file in the cache.

manifest.json is read each time that a store is opened, and noted in the cache: where the address does
not answer, the store is opened as it was then. Everything else is fetched when it is first needed, and
compared with the size and SHA-256 that are recorded of it. A file that came with other
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
from .files import write_whole
from .manifest import MANIFEST, Manifest
from .remote import PART_BYTES, Link, Refused, Stopped, Unreachable, never
from .seen import Seen
from .shard_cache import Cache
from .store_source import RemoteSource, sha256_of
from .verify import Content, StoredFile, check_sizes, stored_files

FILES_AT_ONCE = 4  # fetched; each in parts that share the link's connections


def open_to_verify(address: Address) -> tuple[Path, Manifest, Content]:
    """A folder with the small files of a store, its manifest, and the bytes that are there now.

    The content is read from the address, whatever the cache holds.
    """
    files = RemoteFiles(Link(address), Cache.from_environment(), may_be_offline=False)
    for name in (*files.manifest.get("files", {}),):
        with suppress(Refused):  # it is found with the others
            files.local(name)

    def content(file: StoredFile) -> Iterator[bytes]:
        size = files.link.size(file.name)
        # A server may name any size: no more is read than tells that it is another one.
        most = file.bytes + PART_BYTES
        yield from files.link.parts(file.name, file.bytes if size is None else min(size, most))

    return files.folder, files.manifest, content


class RemoteFiles:
    """The files of one store at an address: by name to a file in the cache. Safe in threads.

    may_be_offline: whether the manifest of an earlier time will do, where the address does not answer.
    """

    def __init__(self, link: Link, cache: Cache, *, may_be_offline: bool = True) -> None:
        self.link, self.cache = link, cache
        seen = Seen(cache, link.address)
        self.source = _source_of(link, seen) if may_be_offline else RemoteSource(link)
        self.manifest, self.address = self.source.manifest, link.address
        # The digest leaves statistics and times out, so that alone it could not tell two apart.
        self.key = (
            f"{self.manifest['digest'][:32]}-{hashlib.sha256(self.source.data).hexdigest()[:16]}"
        )
        self.folder = cache.folder(self.key)
        self._records, self._seen = self._recorded(), set[str]()
        descriptor = cache.open_store(self.key)
        weakref.finalize(self, os.close, descriptor)
        if not _has(self.folder / MANIFEST, self.source.data):
            cache.check_fits(self.folder / MANIFEST, len(self.source.data))
            cache.make_room(len(self.source.data))
            write_whole(self.folder / MANIFEST, self.source.data)
        if self.source.is_live:
            seen.note(self.folder / MANIFEST, self.source.data)

    def _recorded(self) -> dict[str, StoredFile]:
        files = stored_files(self.folder, self.manifest)
        check_sizes(self.address, self.manifest, files)
        return {file.name: file for file in files}

    def local(self, name: str) -> Path:
        """A file, fetched where it is not there yet; none when the store has none of that name.

        For what is not a shard, which stays while the store is open. Its bytes are compared with
        the digest once by each process, because not all of it has checksums of its own.
        """
        if name not in self._seen and (name in self._records or name in self._recorded()):
            os.close(self.open(name))
            if self.is_damaged(name):
                os.close(self.open(name))
            self._seen.add(name)
        return self.folder / name

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
            lambda part: self.source.download(record, part, is_stopped),
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

    def close(self) -> None:
        """End the requests."""
        self.link.end()


def _source_of(link: Link, seen: "Seen") -> RemoteSource:
    """The store at an address; where that does not answer, as the cache has its manifest."""
    try:
        return RemoteSource(link)
    except Unreachable:
        found = seen.manifest()
        if found is None:
            raise
    data, when = found
    source = RemoteSource(link, data)
    link.say(
        f"{link.address} does not answer. Going on with what the cache {seen.cache.root} holds of it: "
        f"the store with the digest {source.manifest['digest']}, as it was seen there at {when}. "
        "What is not in the cache cannot be read."
    )
    return source


def _has(file: Path, data: bytes) -> bool:
    try:
        return file.read_bytes() == data
    except OSError:
        return False
