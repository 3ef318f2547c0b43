"""Where the files of a complete store come from: an address, or a folder. Each is checked on its way.

manifest.json has to have the digest that it gives itself. A file that comes with other bytes than
recorded is fetched once more, then refused by name; if the store was replaced meanwhile, that is
what the error says.
"""

import hashlib
import os
from pathlib import Path
from typing import Protocol

from .address import Address, Place
from .errors import StoreError
from .files import plain_size, read_plain
from .manifest import (
    COMPLETE,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Manifest,
    began_by,
    checked_manifest,
    content_digest,
    parse_json,
    read_manifest,
)
from .remote import PART_BYTES, Link, Refused, Stopped, never, tell
from .verify import StoredFile

_COPY_BYTES = 8 << 20


class StoreSource(Protocol):
    """A complete store that files are taken from. data: the bytes of manifest.json."""

    manifest: Manifest
    data: bytes

    @property
    def place(self) -> Place:
        """Where it is."""

    def download(self, record: StoredFile, part: int, is_stopped: Stopped = never) -> None:
        """Write a file to a descriptor; Refused when its bytes are not those recorded."""

    def close(self) -> None:
        """End what is under way."""


def fetch_manifest(address: Address) -> Manifest:
    """The manifest of a store at an address, checked as `read_manifest` does."""
    return _manifest(Link(address, tell))[0]


def manifest_if_there(address: Address) -> Manifest | None:
    """The same, or None where there is no store."""
    link = Link(address)
    try:
        data = link.read_small(MANIFEST, MANIFEST_LIMIT_BYTES)
    except FileNotFoundError:
        return None
    finally:
        link.end()
    return checked_manifest(parse_json(data, f"{address}/{MANIFEST}"), address)


def _manifest(link: Link) -> tuple[Manifest, bytes]:
    try:
        data = link.read_small(MANIFEST, MANIFEST_LIMIT_BYTES)
    except FileNotFoundError:
        raise link.no_store() from None
    return _parsed(data, link)


def _parsed(data: bytes, link: Link) -> tuple[Manifest, bytes]:
    value = parse_json(data, f"{link.address}/{MANIFEST}")
    return checked_manifest(value, link.address), data


def _checked(manifest: Manifest, place: Place, finish: str) -> Manifest:
    """StoreError unless a manifest is that of a complete store, and has its digest."""
    if manifest.get("state") != COMPLETE:
        raise StoreError(
            f"Store {place} is not finished: its state is {manifest.get('state')!r}. {finish}"
        )
    try:
        is_same = content_digest(manifest) == manifest["digest"]
    except (KeyError, TypeError, ValueError, AttributeError):
        is_same = False
    if not is_same:
        raise StoreError(
            f"The manifest of {place} is damaged: its recipe, sizes and shards do not have the "
            "digest that it gives them. Push or harvest the store again."
        )
    return manifest


class RemoteSource:
    """A store at an address. data: its manifest of an earlier time; None asks for that of now.

    is_live: whether the address has answered.
    """

    def __init__(self, link: Link, data: bytes | None = None) -> None:
        self.link, self.place, self.is_live = link, link.address, data is None
        manifest, self.data = _manifest(link) if data is None else _parsed(data, link)
        self.manifest = _checked(
            manifest, self.place, "Finish it where it is written, and push it then."
        )

    def download(self, record: StoredFile, part: int, is_stopped: Stopped = never) -> None:
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
            f"{self.place}/{record.name} {what}, also when it is asked for again. Push or "
            "harvest the store again."
        )

    def _download_once(self, record: StoredFile, part: int, is_stopped: Stopped) -> None:
        starts = range(0, record.bytes, PART_BYTES)

        def fetch(start: int) -> None:
            stop = min(start + PART_BYTES, record.bytes)
            write_at(part, self.link.read(record.name, start, stop, is_stopped), start)

        jobs = []
        if self.place.protocol.startswith("http") and len(starts) > 1:
            fetch(0)  # it tells whether the server knows ranges
            starts = starts[1:]
            if not self.link.has_ranges:
                self.link.stream(
                    record.name, record.bytes, lambda data, at: write_at(part, data, at), is_stopped
                )
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
                f"Store {self.place} was replaced while it was read: it had the digest "
                f"{self.manifest['digest']}, and now has {now}. Open it again; a fit from the "
                "other rows needs another --out."
            )

    def close(self) -> None:
        self.link.end()


class LocalSource:
    """A store in a folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.place = path
        manifest = read_manifest(path)
        finish = f"Run the `sae-pipe {began_by(manifest)}` command that began it once more."
        self.manifest = _checked(manifest, path, finish)
        self.data = read_plain(path, MANIFEST, MANIFEST_LIMIT_BYTES)

    def download(self, record: StoredFile, part: int, is_stopped: Stopped = never) -> None:
        """Copy a file to a descriptor, its bytes checked."""
        digest, place = hashlib.sha256(), 0
        try:
            if plain_size(self.place, record.name) != record.bytes:
                raise self._refused(record, "has another size than the manifest records")
            with (self.place / record.name).open("rb", buffering=0) as file:
                while place < record.bytes and (data := file.read(_COPY_BYTES)):
                    digest.update(data)
                    write_at(part, data, place)
                    place += len(data)
        except FileNotFoundError as error:
            raise self._refused(record, "is missing") from error
        if digest.hexdigest() != record.sha256:
            raise self._refused(record, "has other bytes than the manifest records")

    def _refused(self, record: StoredFile, what: str) -> Refused:
        return Refused(
            f"{self.place / record.name} {what}. Run `sae-pipe store repair {self.place}`, or fetch "
            "that file again."
        )

    def close(self) -> None:
        """Nothing is under way."""


def complete_manifest(place: Place) -> Manifest:
    """The manifest of a complete store, with its own digest; StoreError where there is none."""
    source = source_of(place)
    source.close()
    return source.manifest


def source_of(place: Place) -> StoreSource:
    """The source that a place is; StoreError when no complete store is there."""
    if isinstance(place, Address):
        return RemoteSource(Link(place))
    return LocalSource(place)


def sha256_of(descriptor: int) -> str:
    """SHA-256 of an open file, wherever it stands, in hex."""
    digest, place = hashlib.sha256(), 0
    while data := os.pread(descriptor, 1 << 20, place):
        digest.update(data)  # lets the interpreter lock go
        place += len(data)
    return digest.hexdigest()


def write_at(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(descriptor, view, place)
        view, place = view[n:], place + n
