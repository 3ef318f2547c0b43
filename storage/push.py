"""A store sent to an address, file by file, its manifest last: readers never see half a store.

What was sent is noted in the cache folder, with the version that the service gave it (an ETag or the
like), so that a push that was killed goes on without sending it again. A version is no proof of
content; that it is the one that was noted proves that nobody has replaced what was sent. Every file
is compared with its SHA-256 before it is sent, and its size with what has arrived; services check
what they are sent by checksums of their own. Once the manifest is there, all of it was sent: then
only what is missing, or has another size, is sent again.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .address import Address
from .bar import Bar, OpenBar, no_bar
from .card import CARD_LIMIT_BYTES, README, card, is_generated, own_readme
from .disk import human_bytes
from .errors import InputError, NetworkError, StoreError
from .files import disk_error, file_digest, plain_size
from .manifest import MANIFEST, MANIFEST_LIMIT_BYTES, checked_manifest, parse_json
from .minisign import LIMIT_BYTES
from .remote import Link
from .shard_cache import Cache
from .signed import SIGNATURE, local_signature
from .store_source import LocalSource
from .verify import StoredFile, stored_files

FILES_AT_ONCE = 4

Say = Callable[[str], object]


def push(
    source: Path,
    address: Address,
    *,
    private: bool = False,
    say: Say = print,
    open_bar: OpenBar = no_bar,
) -> None:
    """Send a complete store to an address, or go on with that.

    private: of a repository of the Hub that is made now: for its owner alone. Raises InputError where another store stands or nothing can be written, StoreError for a local
    store that is unfinished or damaged and for a service that says no, NetworkError when patience
    with a lost connection has ended.
    """
    check_can_write(address)
    local = LocalSource(source)
    files = stored_files(source, local.manifest)
    link = Link(address, private=private)
    try:
        is_there = _same_is_there(link, local)
        job = Sending(link, source)
        missing = job.missing(files, trust=_recorded_there(is_there, local))
        total = sum(file.bytes for file in files)
        left = sum(file.bytes for file in missing)
        signature = local_signature(source)
        if is_there == local.data and not missing and _same_signature(link, signature):
            _send_card(link, local, say)
            say(f"{address} is complete: {len(files):,} files, as here. Nothing to do.")
            return
        with open_bar(total, total - left) as bar:
            job.send(missing, bar)
        _send_card(link, local, say)
        if signature is not None:  # before what it is of: a reader who wants it finds it
            link.put_bytes(signature, SIGNATURE)
        elif is_there not in (None, local.data) and _has_signature(link):
            say(
                f"{address}/{SIGNATURE} is of the manifest that was there before, and does not hold "
                "any more. Push again with --sign."
            )
        link.put_bytes(local.data, MANIFEST)
        job.forget()
    finally:
        link.end()
    kept = f"; {human_bytes(total - left)} were there already" if left < total else ""
    say(f"{address} is complete: {len(files):,} files, {human_bytes(left)} sent{kept}.")


def check_can_write(address: Address) -> None:
    """InputError for addresses that can only be read."""
    if not address.scheme.can_write:
        raise InputError(
            f"{address} cannot be written: a web server is only read from. Push to s3://, gs://, "
            "az:// or hf://, or copy the folder to where the server has its files."
        )


def _same_is_there(link: Link, local: LocalSource) -> bytes | None:
    """The manifest at the address, if it is of the same rows; InputError for any other."""
    try:
        data = link.read_small(MANIFEST, MANIFEST_LIMIT_BYTES)
    except FileNotFoundError:
        return None
    there = checked_manifest(parse_json(data, f"{link.address}/{MANIFEST}"), link.address)
    if there.get("digest") != local.manifest["digest"]:
        raise InputError(
            f"{link.address} holds another store, with the digest {there.get('digest')}; that of "
            f"{local.place} is {local.manifest['digest']}. Push to another address, or remove what "
            "is there first."
        )
    return data


def _recorded_there(data: bytes | None, local: LocalSource) -> set[StoredFile]:
    """Files that the manifest at the address records; the tokens of both are the same."""
    if data is None or data == local.data:
        return set() if data is None else set(stored_files(local.place, local.manifest))
    try:
        return set(stored_files(local.place, parse_json(data, MANIFEST)))
    except StoreError:
        return set()


def _send_card(link: Link, local: LocalSource, say: Say) -> None:
    """README.md to the store, and to the front page of a repository of the Hub.

    Somebody's own README.md at the address stays, unless there is another here: the last push wins.
    """
    own = own_readme(local.place)
    _send_readme(link, own or card(local.manifest).encode(), say)
    repository = link.address.repository
    if repository is not None and repository != link.address:
        front = Link(repository)
        try:
            _send_readme(front, own or card(local.manifest, str(link.address)).encode(), say)
        finally:
            front.end()


def _send_readme(link: Link, data: bytes, say: Say) -> None:
    try:
        there = link.read(README, 0, CARD_LIMIT_BYTES + 1)
    except FileNotFoundError:
        there = None
    if there == data:
        return
    is_card = is_generated(data.decode(errors="replace"))
    if there is not None and is_card and not is_generated(there.decode(errors="replace")):
        say(f"{link.address}/{README} is somebody's own, and stays as it is.")
        return
    link.put_bytes(data, README)


def _same_signature(link: Link, signature: bytes | None) -> bool:
    """Whether the signature that is here is there too; one that is there alone stays."""
    return signature is None or _signature_there(link) == signature


def _has_signature(link: Link) -> bool:
    return _signature_there(link) is not None


def _signature_there(link: Link) -> bytes | None:
    try:
        return link.read_small(SIGNATURE, LIMIT_BYTES)
    except (FileNotFoundError, StoreError, NetworkError):  # what some have for what is not there
        return None


class Sending:
    """Files of a local store on their way to an address."""

    def __init__(self, link: Link, root: Path) -> None:
        self._link, self._root = link, root
        self._notes = _Notes(link.address)
        self._there: dict[str, tuple[int, str]] | None = None

    def missing(
        self, files: Sequence[StoredFile], *, trust: Collection[StoredFile] = ()
    ) -> list[StoredFile]:
        """Files that are not known to be there.

        trust: those that are there if they have the right size, unless it is noted otherwise.
        """
        there = self._there = self._there or self._link.listing()

        def is_sent(file: StoredFile) -> bool:
            size, version = there.get(file.name, (-1, ""))
            noted = self._notes.known.get(file.name)
            if size != file.bytes:
                return False
            if noted is None:
                return file in trust
            return noted == (file.sha256, version)

        return [file for file in files if not is_sent(file)]

    def send(self, files: Sequence[StoredFile], bar: Bar) -> None:
        """Send files, several at once; StoreError for one that is not as it is recorded here."""
        lock, groups = threading.Lock(), self._link.groups(files, lambda file: file.bytes)

        def send(group: Sequence[StoredFile]) -> None:
            for file in group:
                self._check(file)
            versions = self._link.put([(self._root / f.name, f.name) for f in group])
            for file, (size, version) in zip(group, versions, strict=True):
                if size not in (None, file.bytes):
                    raise NetworkError(
                        f"{self._link.address}/{file.name} has {size:,} bytes there after {file.bytes:,} "
                        "were sent. Run the same command again; if it happens twice, look at the "
                        "service."
                    )
                with lock:
                    self._notes.add(file.name, file.sha256, version)
                    if self._there is not None:
                        self._there[file.name] = file.bytes, version
                    bar.update(file.bytes)

        with ThreadPoolExecutor(self._link.groups_at_once(FILES_AT_ONCE), "send") as pool:
            jobs = [pool.submit(send, group) for group in groups]
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()

    def _check(self, file: StoredFile) -> None:
        try:
            plain_size(self._root, file.name)
            is_same = file_digest(self._root / file.name) == file.sha256
        except OSError as error:
            raise StoreError(
                f"{self._root / file.name} cannot be read ({error.strerror}). Run `sae-pipe store "
                f"repair {self._root}`, then push again."
            ) from error
        if not is_same:
            raise StoreError(
                f"{self._root / file.name} does not have its recorded digest, so it was not sent. "
                f"Run `sae-pipe store repair {self._root}`, then push again."
            )

    def forget(self) -> None:
        """The manifest is there and says it all."""
        self._notes.remove()


class _Notes:
    """What was sent to an address: name, SHA-256, version; a line each, appended when it is there."""

    def __init__(self, address: Address) -> None:
        name = hashlib.sha256(str(address).encode()).hexdigest()[:32]
        self._file = Cache.from_environment().root / "pushes" / f"{name}.jsonl"
        self.known: dict[str, tuple[str, str]] = {}
        lines = self._file.read_bytes().split(b"\n") if self._file.is_file() else []
        for line in lines[:-1]:  # what a kill has cut off is no line
            try:
                name, sha256, version = json.loads(line)
                self.known[str(name)] = str(sha256), str(version)
            except (ValueError, TypeError):
                continue

    def add(self, name: str, sha256: str, version: str) -> None:
        line = json.dumps([name, sha256, version]).encode() + b"\n"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise disk_error(error, self._file) from error
        self.known[name] = sha256, version

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)
        self.known = {}
