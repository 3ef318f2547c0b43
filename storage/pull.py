"""A store fetched to a folder: all of it, byte for byte, or a fair part of it as a store of its own.

Files are fetched several at once, compared with their digests, and written whole; the manifest
comes last, so that what was interrupted is no store, and the same command goes on with it. A part
is the first shards: contexts were permuted over the whole text and rows inside blocks, so that these
are as fair a sample as any. It keeps all held-out rows and tokens, has statistics of its own rows,
and a digest of its own; the manifest says what it is a part of.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import zarr_metadata
from .address import Place, described
from .bar import Bar, OpenBar, no_bar
from .builder import StoreBuilder, is_begun, statistics_entry
from .card import write_card
from .codecs import codec_of
from .corpus import CORPUS_JSON
from .disk import check_room, human_bytes
from .errors import InputError, StoreError
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
from .manifest import COMPLETE, MANIFEST, Manifest, content_digest, layout_of, read_manifest
from .minisign import PublicKey
from .plain_json import parse_plain_json
from .repair import moments_of_rows
from .signed import SIGNATURE, check_signature, signature_of
from .store import open_store
from .store_source import StoreSource, source_of
from .verify import OTHER, SHARD, StoredFile, stored_files
from .writer import write_vectors

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
    say: Say = print,
    open_bar: OpenBar = no_bar,
) -> None:
    """Fetch a complete store into a folder, or go on with that.

    part: None for all; key: who has to have signed it, None for anybody. Raises InputError where something else stands at the target, StoreError for
    a source that is missing, unfinished or damaged, DiskError before anything is written when the
    disk is too small, NetworkError when patience with a lost connection has ended.
    """
    if isinstance(source, Path) and source.resolve() == target.resolve():
        raise InputError(f"{source} cannot be copied into itself. Pass another place for the copy.")
    origin = source_of(source)
    try:
        signature = signature_of(source) if key is not None else _signature_if_any(source)
        if key is not None:
            comment = check_signature(source, origin.data, signature, key)
            say(f"{source} was signed with key {key.name}: {comment}.")
        n_shards = (part or Part()).shards_of(origin.manifest, source)
        job = _Pull(origin, target, n_shards)
        if job.is_complete():
            say(f"{target} is complete: it is what {source} holds. Nothing to do.")
            return
        with sole_writer(target, "Store"):
            remove_leftovers(target, deep=job.is_begun())
            job.run(open_bar)
            if n_shards is None and signature is not None:
                write_whole(target / SIGNATURE, signature)
    finally:
        origin.close()
    store = open_store(target)
    of_rows = "" if n_shards is None else f" of {origin.manifest['train']['layout']['n_rows']:,}"
    say(
        f"{target} is complete: {store.n_rows:,}{of_rows} training and {store.heldout.n_rows:,} "
        f"held-out rows, {human_bytes(job.fetched_bytes)} fetched; digest {store.digest}."
    )


def _signature_if_any(source: Place) -> bytes | None:
    """The signature that goes with a store where nobody asks for one."""
    try:
        return signature_of(source)
    except StoreError:  # some services forbid what is not there
        return None


class _Pull:
    """n_shards: of the training rows; None for the whole store, byte for byte."""

    def __init__(self, origin: StoreSource, target: Path, n_shards: int | None) -> None:
        self._origin, self._target, self._n_shards = origin, target, n_shards
        self.fetched_bytes = 0

    # --- what is there already ---

    def is_complete(self) -> bool:
        """Whether the store stands already; InputError when something else does."""
        target = self._target
        if not is_begun(target):
            if target.exists() and not (self.is_begun() or self._is_free()):
                raise InputError(
                    f"{target} exists and is not what a pull of {self._origin.place} has begun. "
                    "Pass another place, or move it away."
                )
            return False
        manifest = read_manifest(target)
        wanted = self._identity
        found = {"digest": manifest.get("digest"), "shards": None}
        sampled = manifest.get("provenance", {}).get("sampled")
        if isinstance(sampled, dict) and self._n_shards is not None:
            n_shards = layout_of(manifest["train"], target).n_shards
            found = {"digest": sampled.get("digest"), "shards": n_shards}
        if found != wanted or manifest.get("state") != COMPLETE:
            raise InputError(
                f"{target} holds another store, with the digest {manifest.get('digest')}, than was "
                f"asked for of {self._origin.place}. Pass another place, or move it away."
            )
        return not [file for file in stored_files(target, manifest) if not self._has_size(file)]

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
        target, manifest = self._target, self._origin.manifest
        write_json(target / BEGUN, self._identity)
        of_tokens = [f for f in self._files() if f.name == f"corpus/{CORPUS_JSON}"]
        self._fetch(of_tokens, None)  # it names the others
        files = self._files()
        with ThreadPoolExecutor(os.cpu_count(), "look") as pool:
            there = list(pool.map(self._is_there, files))
        missing = [file for file, is_there in zip(files, there, strict=True) if not is_there]
        total, left = (sum(f.bytes for f in some) for some in (files, missing))
        check_room(target, left)
        with open_bar(total, total - left) as bar:
            self._fetch(missing, bar)
        # The card is made anew: nothing is fetched that no digest covers.
        if self._n_shards is None:
            write_card(target, manifest)
            write_whole(target / MANIFEST, self._origin.data)
        else:
            part = self._manifest_of_part(manifest, self._n_shards)
            write_card(target, part)
            write_json(target / MANIFEST, part)
        (target / BEGUN).unlink(missing_ok=True)

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
        return self._has_size(file) and file_digest(self._target / file.name) == file.sha256

    def _fetch(self, files: Sequence[StoredFile], bar: Bar | None) -> None:
        with ThreadPoolExecutor(FILES_AT_ONCE, "pull") as pool:
            jobs = [pool.submit(self._fetch_one, file) for file in files]
            try:
                for file, job in zip(files, jobs, strict=True):
                    job.result()
                    self.fetched_bytes += file.bytes
                    if bar is not None:
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
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise disk_error(error, path) from error
            raise

    def _manifest_of_part(self, manifest: Manifest, n_shards: int) -> Manifest:
        """The manifest of the first shards, with the files that say other things of fewer rows."""
        target = self._target
        whole, heldout = (
            layout_of(manifest["train"], target),
            layout_of(manifest["heldout"], target),
        )
        layout = replace(whole, n_rows=whole.rows_of_shard(n_shards - 1)[1])
        records = manifest["train"]["shards"][:n_shards]
        codec = codec_of(manifest)
        moments = moments_of_rows(target, layout, codec, records)
        write_vectors(
            target, {"statistics/mean": moments.mean, "statistics/variance": moments.variance}
        )
        part = dict(manifest)
        for name in ("request", "shuffle"):  # of the whole
            part.pop(name, None)
        part["train"] = {
            "layout": manifest["train"]["layout"] | {"n_rows": layout.n_rows},
            "shards": records,
        }
        part["statistics"] = statistics_entry(moments)
        part["provenance"] = manifest["provenance"] | {
            "sampled": {
                "store": Path(described(self._origin.place)).name,
                "digest": manifest["digest"],
                "rows": whole.n_rows,
            }
        }
        builder = StoreBuilder(target, part)
        members, corpus = builder.zarr_members(layout, heldout)
        zarr_metadata.write_metadata(target, members, already_there=corpus)
        part["files"] = builder.other_files()
        part["digest"] = content_digest(part)
        return part
