"""Tokenised documents on disk, while a corpus is being built: a cache that grows batch by batch.

It depends on the text, the tokenizer and the way of deduplication, and on nothing else, so that
another context size or number of rows finds the work done. With `first_record` the records before
it are read for the sake of deduplication alone: a corpus has their tokens already. One SQLite database is the commit point;
two flat files hold the bulk and are cut to the committed length when a crash left more:

    tokens     uint32, the tokens of one document after the other
    documents  a record each: ordinal of the raw record, number of tokens, key (of the normalised
               text, for draws)

Batches end at bounds that depend on the text alone, so that a resumed run commits the same ones.
"""

import json
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..storage.errors import DiskError, InputError
from ..storage.files import canonical_json, disk_error
from .dedup import digest_of, get_dedup, normalise
from .sources import RecordStream, TextSource
from .tokens import TextTokenizer

# The first batches are small, each twice the one before, so that a small corpus is built at once;
# later ones are large enough for all cores.
_FIRST_BATCH_CHARACTERS = 2**17
_BATCH_CHARACTERS = 4 * 2**20
_BATCH_RECORDS = 2**16  # where a filter drops nearly all
_VERSION = 1  # of these files; others are built again

_DOCUMENT = np.dtype([("record", "<u4"), ("length", "<u4"), ("key", "<u8")])
_TOKEN = np.dtype("<u4")
_TOTALS = "SELECT coalesce(sum(n_documents), 0), coalesce(sum(n_tokens), 0) FROM batch"


@dataclass(frozen=True)
class Batch:
    """Tokenised documents in the order of the text.

    records: ordinals of their raw records; keys: first 8 bytes of the digests of their normalised
    texts; n_records: raw records read for the batch; left_out: how many of those by reason.
    """

    records: NDArray[np.uint32]
    keys: NDArray[np.uint64]
    tokens: list[NDArray[np.uint32]]
    n_records: int
    left_out: dict[str, int]


class TokenCache:
    """The cache in a folder; `batches` goes through it and makes it grow."""

    def __init__(
        self,
        folder: Path,
        source: TextSource,
        tokenizer: TextTokenizer,
        dedup: str,
        *,
        first_record: int = 0,
    ) -> None:
        """first_record: ordinal of the first record that is wanted."""
        self._folder, self._source, self._tokenizer = folder, source, tokenizer
        self._first_record = first_record
        self._records: RecordStream | None = None
        identity = {
            "version": _VERSION,
            "source": source.identity,
            "tokenizer": tokenizer.fingerprint,
            "dedup": dedup,
            **({"first_record": first_record} if first_record else {}),
        }
        make_dedup = get_dedup(dedup)
        self._database = _open_database(folder, canonical_json(identity).decode())
        try:
            self._dedup = make_dedup(self._database)
            self._cut()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(self) -> Iterator[Batch]:
        """All documents in the order of the text: those that are cached, then new ones."""
        yield from self.cached_batches()
        while not self._state()[3]:
            yield self._extend()

    def cached_batches(self) -> Iterator[Batch]:
        """The documents that are tokenised already."""
        rows = self._database.execute(
            "SELECT n_documents, n_tokens, n_records, left_out FROM batch ORDER BY id"
        ).fetchall()
        with (
            _path(self._folder, "documents").open("rb") as documents,
            _path(self._folder, "tokens").open("rb") as file,
        ):
            for n_documents, n_tokens, n_records, left_out in rows:
                index = np.fromfile(documents, _DOCUMENT, n_documents)
                flat = np.fromfile(file, _TOKEN, n_tokens).astype(np.uint32, copy=False)
                tokens = np.split(flat, np.cumsum(index["length"][:-1])) if n_documents else []
                yield Batch(
                    index["record"].astype(np.uint32),
                    index["key"].astype(np.uint64),
                    tokens,
                    n_records,
                    json.loads(left_out),
                )

    def _state(self) -> tuple[int, int, Any, bool]:
        """Documents, tokens, position in the source, whether the source has ended."""
        n_documents, n_tokens = self._database.execute(_TOTALS).fetchone()
        last = self._database.execute(
            "SELECT position, is_last FROM batch ORDER BY id DESC LIMIT 1"
        ).fetchone()
        position, is_last = (None, False) if last is None else (json.loads(last[0]), bool(last[1]))
        return n_documents, n_tokens, position, is_last

    def _cut(self) -> None:
        """Cut off what was written and not committed."""
        n_documents, n_tokens, _, _ = self._state()
        sizes = {
            "documents": n_documents * _DOCUMENT.itemsize,
            "tokens": n_tokens * _TOKEN.itemsize,
        }
        for name, size in sizes.items():
            with _path(self._folder, name).open("ab") as file:
                file.truncate(size)

    def _stream(self) -> RecordStream:
        """The stream of records, opened once and then kept."""
        if self._records is None:
            self._records = self._source.records(self._state()[2])
        return self._records

    def _batch_limit(self) -> int:
        """Characters of the next batch: of its number alone, so that resuming changes no bounds."""
        (n_batches,) = self._database.execute("SELECT count(*) FROM batch").fetchone()
        return int(min(_FIRST_BATCH_CHARACTERS << min(n_batches, 32), _BATCH_CHARACTERS))

    def _extend(self) -> Batch:
        """Read, tokenise and commit one batch: all of it or nothing."""
        left_out: Counter[str] = Counter()
        stream = self._stream()
        limit = self._batch_limit()
        self._database.execute("BEGIN IMMEDIATE")
        try:
            kept, n_records, is_last = self._read(stream, limit, left_out)
            batch, index = self._tokenise(kept, n_records, left_out)
            self._append("documents", index.tobytes())
            self._append("tokens", *(tokens.astype(_TOKEN).tobytes() for tokens in batch.tokens))
            self._database.execute(
                "INSERT INTO batch (n_documents, n_tokens, n_records, left_out, position, is_last) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    len(index),
                    int(index["length"].sum()),
                    n_records,
                    json.dumps(batch.left_out),
                    json.dumps(stream.position()),
                    is_last,
                ),
            )
            self._database.execute("COMMIT")
        except BaseException as error:
            self._database.execute("ROLLBACK")
            self._records = None
            self._cut()
            if isinstance(error, sqlite3.DatabaseError):
                raise _database_error(self._folder, error) from error
            raise
        return batch

    def _read(
        self, stream: RecordStream, limit: int, left_out: Counter[str]
    ) -> tuple[list[tuple[int, str, bytes]], int, bool]:
        """One batch of (ordinal, text, digest) without duplicates; records read; whether all are.

        Records before the first that is wanted are read but not counted.
        """
        found: list[tuple[int, str]] = []
        n_characters = n_records = 0
        is_last = True
        for n_read, record in enumerate(stream, 1):
            is_wanted = record.index >= self._first_record
            n_records += is_wanted
            if record.text is None:
                assert record.problem is not None
                left_out[record.problem] += is_wanted
            else:
                found.append((record.index, record.text))
                n_characters += len(record.text)
            if n_characters >= limit or n_read >= _BATCH_RECORDS:
                is_last = False
                break
        normalised = [normalise(text) for _, text in found]
        digests = [digest_of(text) for text in normalised]
        are_new = self._dedup.are_new(normalised, digests)
        wanted = [
            (index, text, digest, is_new)
            for (index, text), digest, is_new in zip(found, digests, are_new, strict=True)
            if index >= self._first_record
        ]
        kept = [(index, text, digest) for index, text, digest, is_new in wanted if is_new]
        if len(kept) < len(wanted):
            left_out[self._dedup.reason] += len(wanted) - len(kept)
        return kept, n_records, is_last

    def _tokenise(
        self, kept: list[tuple[int, str, bytes]], n_records: int, left_out: Counter[str]
    ) -> tuple[Batch, NDArray[Any]]:
        encoded = self._tokenizer.encode([text for _, text, _ in kept])
        tokens: list[NDArray[np.uint32]] = []
        rows: list[tuple[int, int, int]] = []
        for (record, _, digest), ids in zip(kept, encoded, strict=True):
            if record >= 2**32:
                raise InputError(
                    f"{self._source.name} has more than {2**32} records, and their ordinals are "
                    "stored in 32 bits. Split it."
                )
            if len(ids) == 0:
                left_out["no tokens"] += 1
                continue
            tokens.append(ids)
            rows.append((record, len(ids), int.from_bytes(digest[:8], "little")))
        index = np.array(rows, dtype=_DOCUMENT)
        batch = Batch(
            index["record"].astype(np.uint32),
            index["key"].astype(np.uint64),
            tokens,
            n_records,
            dict(sorted((+left_out).items())),
        )
        return batch, index

    def _append(self, name: str, *parts: bytes) -> None:
        path = _path(self._folder, name)
        try:
            with path.open("ab") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, path) from error


def has_documents(folder: Path) -> bool:
    """Whether a cache holds work that is worth keeping."""
    path = _path(folder, "documents")
    return path.is_file() and path.stat().st_size > 0


def clear(folder: Path) -> None:
    """Remove the files of a cache, if there are any."""
    for path in folder.glob("cache.*"):
        path.unlink()


def _open_database(folder: Path, identity: str) -> sqlite3.Connection:
    """The database of a cache with this identity; anything else that is there is thrown away."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        database = _connect(folder)
        found = database.execute("SELECT identity FROM cache").fetchone()
        if found is not None and (found[0] != identity or not _is_whole(folder, database)):
            database.close()
            print(
                f"{folder} holds tokens of other text, another tokenizer or another --dedup, or it "
                "is damaged: it is discarded and built again.",
                file=sys.stderr,
            )
            clear(folder)
            database, found = _connect(folder), None
        if found is None:
            database.execute("INSERT INTO cache VALUES (?)", (identity,))
    except sqlite3.DatabaseError as error:
        raise _database_error(folder, error) from error
    except OSError as error:
        raise disk_error(error, folder) from error
    return database


def _connect(folder: Path) -> sqlite3.Connection:
    database = sqlite3.connect(folder / "cache.sqlite", isolation_level=None)
    try:
        database.execute("CREATE TABLE IF NOT EXISTS cache (identity TEXT)")
        database.execute(
            "CREATE TABLE IF NOT EXISTS batch (id INTEGER PRIMARY KEY, n_documents INTEGER, "
            "n_tokens INTEGER, n_records INTEGER, left_out TEXT, position TEXT, is_last INTEGER)"
        )
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


def _is_whole(folder: Path, database: sqlite3.Connection) -> bool:
    """Whether the flat files hold all that was committed."""
    n_documents, n_tokens = database.execute(_TOTALS).fetchone()
    sizes = {"documents": n_documents * _DOCUMENT.itemsize, "tokens": n_tokens * _TOKEN.itemsize}
    paths = {_path(folder, name): size for name, size in sizes.items() if size}
    return all(path.is_file() and path.stat().st_size >= size for path, size in paths.items())


def _path(folder: Path, name: str) -> Path:
    return folder / f"cache.{name}"


def _database_error(folder: Path, error: sqlite3.DatabaseError) -> DiskError:
    return DiskError(
        f"The database in {folder} could not be used ({error}). Free disk space, or delete that "
        "folder to tokenise again, and run the same command."
    )
