"""A store fetched to a folder: all of it, byte for byte, or a fair part of it as a store of its own.

Files are fetched several at once, compared with their digests, and written whole; the manifest
comes last, so that what was interrupted is no store, and the same command goes on with it. With a
key nothing that stands at the target is believed: each file is compared with its SHA-256 in the
signed manifest, and the manifest of a part is made anew. A part
is the first shards: contexts were permuted over the whole text and rows inside blocks, so that these
are as fair a sample as any. It keeps all held-out rows and tokens, has statistics of its own rows,
and a digest of its own; the manifest says what it is a part of.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .address import Place
from .bar import Bar, OpenBar, no_bar
from .builder import is_begun
from .card import write_card
from .corpus import CORPUS_JSON, INFO_LIMIT_BYTES
from .disk import check_room, human_bytes
from .errors import InputError, NetworkError, StoreError
from .files import (
    check_no_link,
    disk_error,
    file_digest,
    fsync_folder,
    is_leftover,
    plain_size,
    read_plain,
    remove_leftovers,
    temporary_name,
    write_json,
    write_whole,
)
from .lock import sole_writer
from .manifest import (
    COMPLETE,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Manifest,
    content_digest,
    layout_of,
    read_manifest,
)
from .minisign import PublicKey
from .part import manifest_of_part, names_made, train_of_part
from .plain_json import parse_plain_json
from .signed import (
    SIGNATURE,
    check_signature,
    check_unrecorded,
    local_signature,
    remove_signature,
    signature_of,
)
from .store import open_store
from .store_source import StoreSource, source_of
from .verify import OTHER, SHARD, StoredFile, stored_files, wrong_corpus

_BEGUN_LIMIT_BYTES = 4096
BEGUN = ".pulling"  # names the store that a folder without a manifest is to become
FILES_AT_ONCE = 4
_LOST = "statistics/relative_error/c/0"  # cannot be counted anew without the original rows

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Part:
    """How much of a store: at least so many training rows, or a fraction of them, in whole shards."""

    rows: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.fraction is not None:
            raise InputError("--rows and --fraction both say how much. Pass one of them.")
        if self.rows is not None and self.rows < 1:
            raise InputError(f"--rows is {self.rows}, and has to be at least 1.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise InputError(
                f"--fraction is {self.fraction:g}, and has to be above 0 and at most 1, such as 0.1."
            )

    def shards_of(self, manifest: Manifest, place: Place) -> int | None:
        """The number of training shards; None for all."""
        layout = layout_of(manifest["train"], place)
        wanted = layout.n_rows
        if self.rows is not None:
            wanted = min(self.rows, layout.n_rows)
        elif self.fraction is not None:
            wanted = math.ceil(self.fraction * layout.n_rows)
        n_shards = max(-(-wanted // layout.shard_rows), 1)
        return None if n_shards >= layout.n_shards else n_shards


def pull(
    source: Place,
    target: Path,
    part: Part | None = None,
    *,
    key: PublicKey | None = None,
    may_renew: bool = False,
    say: Say = print,
    open_bar: OpenBar = no_bar,
) -> None:
    """Fetch a complete store into a folder, or go on with that.

    part: None for all; key: who has to have signed it, None for anybody; may_renew: whether the
    manifest of a copy of the same rows gives way where it is another one (licences, statistics), as
    it always does to a signed one. Raises InputError where something else stands at the target,
    StoreError for a source that is missing, unfinished or damaged, DiskError before anything is
    written when the disk is too small, NetworkError when patience with a lost connection has ended.
    """
    if isinstance(source, Path) and source.resolve() == target.resolve():
        raise InputError(f"{source} cannot be copied into itself. Pass another place for the copy.")
    origin = source_of(source)
    try:
        if key is None:
            signature = _signature_if_any(source)
        else:
            signature = signature_of(source)
            comment = check_signature(source, origin.data, signature, key)
            say(f"{source} was signed with key {key.name}: {comment}.")
        n_shards = (part or Part()).shards_of(origin.manifest, source)
        trust = _Trust(signature, is_signed=key is not None, may_renew=may_renew or key is not None)
        job = _Pull(origin, target, n_shards, trust)
        if job.is_complete():
            came = job.settle()
            what = f"Its {SIGNATURE} was fetched" if came else "Nothing to do"
            say(f"{target} is complete: it is what {source} holds. {what}.")
            return
        with sole_writer(target, "Store"):
            remove_leftovers(target, deep=job.is_begun() or is_begun(target))
            job.run(open_bar)
    finally:
        origin.close()
    store = open_store(target)
    of_rows = "" if n_shards is None else f" of {origin.manifest['train']['layout']['n_rows']:,}"
    say(
        f"{target} is complete: {store.n_rows:,}{of_rows} training and {store.heldout.n_rows:,} "
        f"held-out rows, {human_bytes(job.fetched_bytes)} fetched; digest {store.digest}."
    )


def _signature_if_any(source: Place) -> bytes | None:
    """The signature that goes with a store where nobody asks for one; asked for once.

    Some services forbid what is not there, or have an error for it that looks like a lost connection.
    """
    try:
        return signature_of(source, is_patient=False)
    except (StoreError, NetworkError):
        return None


@dataclass(frozen=True)
class _Trust:
    """signature: of the origin's manifest; is_signed: whether it was checked with a key."""

    signature: bytes | None
    is_signed: bool
    may_renew: bool


class _Pull:
    """n_shards: of the training rows; None for the whole store, byte for byte."""

    def __init__(
        self, origin: StoreSource, target: Path, n_shards: int | None, trust: _Trust
    ) -> None:
        self._origin, self._target, self._n_shards = origin, target, n_shards
        self._trust = trust
        self.fetched_bytes = 0

    # --- what is there already ---

    def is_complete(self) -> bool:
        """Whether the store stands already; InputError when something else does.

        Files are compared with their SHA-256 if the store was signed, else by their sizes.
        """
        target, place, is_signed = self._target, self._origin.place, self._trust.is_signed
        if not is_begun(target):
            if target.exists() and not (self.is_begun() or self._is_free()):
                raise InputError(
                    f"{target} exists and is not what a pull of {place} has begun. "
                    "Pass another place, or move it away."
                )
            return False
        manifest = read_manifest(target)
        if not self._has_wanted_rows(manifest):
            raise InputError(
                f"{target} holds another store, with the digest {manifest.get('digest')}, than was "
                f"asked for of {place}. Pass another place, or move it away."
            )
        if self._n_shards is None and not self._has_same_manifest():
            if self._trust.may_renew:
                return False
            raise InputError(
                f"{target} holds the rows that were asked for of {place}, but its {MANIFEST} is "
                "another one: licences, statistics, other files or notes of how it was made differ. "
                "Pass another place, or move it away."
            )
        if self._n_shards is not None and is_signed:
            return False  # only what is made of the signed manifest can be compared with it
        files = stored_files(target, manifest)
        if wrong_corpus(target, manifest) is not None:
            return False
        if not is_signed:
            return all(map(self._has_size, files))
        check_unrecorded(target, [BEGUN, *(file.name for file in files)])
        return not self._missing(files)

    def settle(self) -> bool:
        """Of a complete store: end what a kill has left; whether its signature came only now."""
        target, signature = self._target, self._trust.signature
        is_new = self._n_shards is None and signature is not None
        is_new = is_new and self._local_signature() != signature
        if is_new or (target / BEGUN).is_file():
            with sole_writer(target, "Store"):
                self._put_signature()
                (target / BEGUN).unlink(missing_ok=True)
        return is_new

    def _has_wanted_rows(self, manifest: Manifest) -> bool:
        """Whether a manifest is that of a complete store of the rows that were asked for."""
        wanted = self._origin.manifest
        if self._n_shards is not None:
            wanted = wanted | {"train": train_of_part(wanted, self._n_shards, self._origin.place)}
        digest = content_digest(wanted)
        try:
            found = content_digest(manifest)
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        return manifest.get("state") == COMPLETE and manifest.get("digest") == found == digest

    def _has_same_manifest(self) -> bool:
        try:
            data = read_plain(self._target, MANIFEST, MANIFEST_LIMIT_BYTES)
        except (OSError, ValueError, StoreError):
            return False
        return data == self._origin.data

    def _local_signature(self) -> bytes | None:
        try:
            return local_signature(self._target)
        except StoreError:
            return None  # it is written anew

    @property
    def _identity(self) -> dict[str, Any]:
        return {"digest": self._origin.manifest["digest"], "shards": self._n_shards}

    def is_begun(self) -> bool:
        """Whether a pull of the same has begun in the folder."""
        try:
            noted = parse_plain_json(read_plain(self._target, BEGUN, _BEGUN_LIMIT_BYTES))
        except (OSError, ValueError):
            return False
        return bool(isinstance(noted, dict) and noted == self._identity)

    def _is_free(self) -> bool:
        if not self._target.is_dir():
            return False
        names = [entry.name for entry in self._target.iterdir()]
        return all(name == ".lock" or is_leftover(name) for name in names)

    def _has_size(self, file: StoredFile) -> bool:
        try:
            return plain_size(self._target, file.name) == file.bytes
        except OSError:
            return False

    # --- the run ---

    def run(self, open_bar: OpenBar) -> None:
        """Fetch what is missing, then write the manifest."""
        target, manifest, n_shards = self._target, self._origin.manifest, self._n_shards
        write_json(target / BEGUN, self._identity)
        self._fetch_list_of_tokens()
        files = self._files()
        self._fetch_missing(files, open_bar)
        if self._trust.is_signed:
            made = () if n_shards is None else names_made(target, manifest, self._origin.place)
            check_unrecorded(target, [BEGUN, *made, *(file.name for file in files)])
        # The card is made anew: nothing is fetched that no digest covers.
        if n_shards is None:
            write_card(target, manifest)
            self._put_signature()  # first: a reader who wants it finds it
            write_whole(target / MANIFEST, self._origin.data)
        else:
            part = manifest_of_part(target, manifest, self._origin.place, n_shards)
            write_card(target, part)
            self._put_signature()
            write_json(target / MANIFEST, part)
        (target / BEGUN).unlink(missing_ok=True)

    def _put_signature(self) -> None:
        """Before the manifest that it is of; one of another manifest is removed."""
        signature = self._trust.signature
        if self._n_shards is not None or (signature is None and not self._has_same_manifest()):
            remove_signature(self._target)
        elif signature is not None and self._local_signature() != signature:
            write_whole(self._target / SIGNATURE, signature)

    def _fetch_list_of_tokens(self) -> None:
        """corpus.json, which names the other files of the tokens. StoreError when it does not."""
        name, place = f"corpus/{CORPUS_JSON}", self._origin.place
        found = [file for file in self._files() if file.name == name]
        for file in found:
            if file.bytes > INFO_LIMIT_BYTES:
                raise StoreError(
                    f"{place}/{name} is recorded with {file.bytes:,} bytes, and none needs more than "
                    f"{INFO_LIMIT_BYTES:,}. Push or harvest the store again."
                )
        self._fetch_missing(found, no_bar)
        damage = wrong_corpus(self._target, self._origin.manifest)
        if damage is not None:
            what = damage.what if found else "the manifest does not record it"
            raise StoreError(
                f"{place}/{name}, which lists the tokens, cannot be used: {what}. Push or harvest "
                "the store again."
            )

    def _fetch_missing(self, files: Sequence[StoredFile], open_bar: OpenBar) -> None:
        target, missing = self._target, self._missing(files)
        total, left = (sum(f.bytes for f in some) for some in (files, missing))
        check_room(target, left)
        if missing and is_begun(target) and not self._has_same_manifest():
            remove_signature(target)
            (target / MANIFEST).unlink()  # this is no store while its files are exchanged
        with open_bar(total, total - left) as bar:
            self._fetch(missing, bar)

    def _missing(self, files: Sequence[StoredFile]) -> list[StoredFile]:
        """Files that are not there with the bytes that are recorded."""
        with ThreadPoolExecutor(os.cpu_count(), "look") as pool:
            there = list(pool.map(self._is_there, files))
        return [file for file, is_there in zip(files, there, strict=True) if not is_there]

    def _files(self) -> list[StoredFile]:
        """What is to be fetched; the tokens once corpus.json is there."""
        files = stored_files(self._target, self._origin.manifest)
        if self._n_shards is None:
            return files
        kept = self._n_shards
        return [
            file
            for file in files
            if (file.kind == SHARD and (file.split == "heldout" or file.shard < kept))
            or file.kind not in (SHARD, OTHER)
            or file.name in ("tokenizer.json", _LOST)
        ]

    def _is_there(self, file: StoredFile) -> bool:
        check_no_link(self._target, file.name)
        return self._has_size(file) and file_digest(self._target / file.name) == file.sha256

    def _fetch(self, files: Sequence[StoredFile], bar: Bar) -> None:
        with ThreadPoolExecutor(FILES_AT_ONCE, "pull") as pool:
            jobs = [pool.submit(self._fetch_one, file) for file in files]
            try:
                for file, job in zip(files, jobs, strict=True):
                    job.result()
                    self.fetched_bytes += file.bytes
                    bar.update(file.bytes)
            finally:
                for job in jobs:
                    job.cancel()

    def _fetch_one(self, file: StoredFile) -> None:
        check_no_link(self._target, file.name)
        path = self._target / file.name
        temporary = temporary_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                self._origin.download(file, part)
                os.fsync(part)
            finally:
                os.close(part)
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except BaseException as error:
            with suppress(OSError):  # what went wrong first is what is told
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise disk_error(error, path) from error
            raise
