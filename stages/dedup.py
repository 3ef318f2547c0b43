"""Dropping documents that were seen before. DEDUPS is the one list of ways.

Everything that a way remembers lies in the SQLite database that it is given, inside the caller's
transaction: memory does not grow with the text, and a crash forgets exactly what it has to.
"""

import hashlib
import sqlite3
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..storage.errors import InputError

DIGEST_BYTES = 16


def normalise(text: str) -> str:
    """What makes documents equal: NFKC, case folded, runs of white space as one space."""
    if not text.isascii():  # ASCII is its own NFKC
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def digest_of(normalised: str) -> bytes:
    """The first 16 bytes of the SHA-256 of a normalised text."""
    return hashlib.sha256(normalised.encode()).digest()[:DIGEST_BYTES]


class Dedup(Protocol):
    """One way to find duplicates. `reason`: what the documents that it drops are counted as."""

    reason: str

    def __init__(self, database: sqlite3.Connection) -> None:
        """Make the tables that it needs, or go on with those that are there."""

    def are_new(self, normalised: Sequence[str], digests: Sequence[bytes]) -> list[bool]:
        """Whether each document is unlike all before it, those of this call too."""


class NoDedup(Dedup):
    """Keeps every document."""

    reason = "duplicate"

    def __init__(self, database: sqlite3.Connection) -> None:
        del database

    def are_new(self, normalised: Sequence[str], digests: Sequence[bytes]) -> list[bool]:
        return [True] * len(normalised)


class ExactDedup(Dedup):
    """Drops documents whose normalised text was seen."""

    reason = "duplicate"

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def are_new(self, normalised: Sequence[str], digests: Sequence[bytes]) -> list[bool]:
        insert = "INSERT OR IGNORE INTO seen VALUES (?)"
        return [self._database.execute(insert, (digest,)).rowcount == 1 for digest in digests]


class MinHashDedup(Dedup):
    """Drops near-duplicates: Jaccard similarity of word 5-grams estimated at 0.8 or more.

    Signatures and the choice of bands are datasketch's (Broder 1997; Leskovec, Rajaraman, Ullman,
    Mining of Massive Datasets, chapter 3). The buckets lie in SQLite and not in datasketch's index,
    which would hold all of them in memory; and a bucket's match counts only if the signatures
    agree, since equal bands alone are a coin toss near the threshold.
    """

    reason = "near-duplicate"

    _THRESHOLD = 0.8
    _PERMUTATIONS = 128
    _SHINGLE_WORDS = 5
    _SEED = 1

    def __init__(self, database: sqlite3.Connection) -> None:
        try:
            import datasketch
        except ImportError as error:
            raise InputError(
                "--dedup minhash needs the datasketch library, which is not installed. Run "
                "`pip install 'sae-pipe[minhash]'`, or pass --dedup exact."
            ) from error
        self._bands, self._band_rows = _band_shape(self._THRESHOLD, self._PERMUTATIONS)
        self._empty: Any = datasketch.MinHash(num_perm=self._PERMUTATIONS, seed=self._SEED)
        self._database = database
        database.execute(
            "CREATE TABLE IF NOT EXISTS signature (id INTEGER PRIMARY KEY, hashes BLOB NOT NULL)"
        )
        database.execute(
            "CREATE TABLE IF NOT EXISTS bucket (band BLOB, id INTEGER, PRIMARY KEY (band, id)) "
            "WITHOUT ROWID"
        )

    def are_new(self, normalised: Sequence[str], digests: Sequence[bytes]) -> list[bool]:
        return [self._add(text) for text in normalised]

    def _add(self, text: str) -> bool:
        signature = self._signature(text)
        keys = self._band_keys(signature)
        marks = ",".join("?" * len(keys))
        query = (
            "SELECT hashes FROM signature WHERE id IN "
            f"(SELECT DISTINCT id FROM bucket WHERE band IN ({marks}))"
        )
        for (hashes,) in self._database.execute(query, keys):
            same = np.frombuffer(hashes, dtype=np.uint64) == signature
            if float(np.mean(same)) >= self._THRESHOLD:
                return False
        insert = "INSERT INTO signature (hashes) VALUES (?)"
        row = self._database.execute(insert, (signature.tobytes(),)).lastrowid
        self._database.executemany(
            "INSERT OR IGNORE INTO bucket VALUES (?, ?)", [(key, row) for key in keys]
        )
        return True

    def _signature(self, text: str) -> NDArray[np.uint64]:
        words, n = text.split(), self._SHINGLE_WORDS
        # A text shorter than a shingle is one shingle.
        starts = range(max(1, len(words) - n + 1))
        shingles = {" ".join(words[start : start + n]).encode() for start in starts}
        minhash = self._empty.copy()
        minhash.update_batch(list(shingles))
        return np.asarray(minhash.hashvalues, dtype=np.uint64)

    def _band_keys(self, signature: NDArray[np.uint64]) -> list[bytes]:
        bands = signature[: self._bands * self._band_rows].reshape(self._bands, self._band_rows)
        return [
            hashlib.sha256(bytes([number]) + band.tobytes()).digest()[:DIGEST_BYTES]
            for number, band in enumerate(bands)
        ]


@cache
def _band_shape(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands and rows a band, as datasketch weighs false positives against false negatives."""
    import datasketch

    index = datasketch.MinHashLSH(threshold=threshold, num_perm=permutations)
    return int(index.b), int(index.r)


DEDUPS: dict[str, type[Dedup]] = {
    "none": NoDedup,
    "exact": ExactDedup,
    "minhash": MinHashDedup,
}


def get_dedup(name: str) -> type[Dedup]:
    """A way by its name; an unknown one lists the known."""
    if name not in DEDUPS:
        raise InputError(
            f"Dedup {name!r} is not known. Known are {', '.join(DEDUPS)}; pass one as --dedup."
        )
    return DEDUPS[name]
