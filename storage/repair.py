"""Shards of a complete store written once more, and its statistics counted once more.

# R rows of a shard, D d_in

A shard that comes out with its recorded digest goes straight to its place. One that does not (other
hardware, other library versions) is kept aside in `.repair/`, and how far its values are from those
that can still be read is measured, so that the caller can decide.
"""

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .errors import StoreError
from .files import fsync_folder, write_whole
from .layout import Layout
from .rows import SplitReader
from .shard import assemble_shard
from .statistics import Moments
from .values import Rows
from .writer import SplitWriter

ASIDE = ".repair"
_COMPARED_CHUNKS = 4  # of a shard: thousands of rows, which is enough to see a difference

Record = dict[str, Any]


class Difference:
    """How far rows computed now are from the stored ones: sum ||x - x'||^2 / sum ||x - mean||^2."""

    def __init__(self) -> None:
        self.rows, self._squares, self._spread = 0, 0.0, 0.0
        self._lock = threading.Lock()

    def add(self, stored_RD: NDArray[np.float32], computed_RD: NDArray[np.float32]) -> None:
        """Compare some rows."""
        squares = float(((stored_RD - computed_RD).astype(np.float64) ** 2).sum())
        spread = float(Moments.of(stored_RD).deviations.sum())
        with self._lock:
            self.rows += len(stored_RD)
            self._squares += squares
            self._spread += spread

    @property
    def relative(self) -> float:
        """Over all rows compared; 0 without any difference."""
        if self._squares == 0:
            return 0.0
        return self._squares / self._spread if self._spread > 0 else float("inf")


class ShardRepairer(SplitWriter):
    """Writes the activations of damaged shards of one split, and of no others.

    differing: records of the shards that came out otherwise than recorded, which are kept aside.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        layout: Layout,
        codec: Codec,
        pool: Executor,
        *,
        records: Sequence[Record],
        redo: set[int],
        compare: set[int],
        difference: Difference,
    ) -> None:
        """records: the manifest's; redo: the damaged shards; compare: whole ones, which are only
        compared with what is computed now.
        """
        committed = set(range(layout.n_shards)) - redo - compare
        super().__init__(root, split, layout, codec, pool, with_masked=False, committed=committed)
        self._records, self._redo, self._difference = records, redo, difference
        self._reader = SplitReader(root, split, layout, list(records), codec)
        self.differing: dict[int, Record] = {}

    def write(
        self,
        shard: int,
        rows_RD: Rows,
        source_R: NDArray[np.int64],
        masked_R: NDArray[np.bool_] | None = None,
    ) -> None:
        """Put the shard to its place if it is what it was, else aside."""
        self._compare(shard, rows_RD)
        if shard in self._redo:
            frames, _, _ = self._encode(shard, rows_RD)
            parts, size, digest = assemble_shard(frames, self._frames_per_shard)
            if digest == self._records[shard]["files"]["activations"]["sha256"]:
                write_whole(self._path("activations", shard), *parts)
            else:
                write_whole(self._aside(shard), *parts)
                self.differing[shard] = {"bytes": size, "sha256": digest}
        self.committed.add(shard)

    def _compare(self, shard: int, rows_RD: Rows) -> None:
        """Measure against the chunks of the stored shard that can still be read."""
        first, last = self.layout.rows_of_shard(shard)
        step, compared = self.layout.chunk_rows, 0
        for start in range(first, last, step):
            stop = min(start + step, last)
            try:
                stored_RD = self._reader.read(slice(start, stop))
            except StoreError:
                continue
            computed_RD = np.empty(stored_RD.shape, np.float32)
            self.codec.values.to_floats(rows_RD[start - first : stop - first], computed_RD)
            self._difference.add(stored_RD, self.codec.kept(computed_RD))
            compared += 1
            if compared == _COMPARED_CHUNKS:
                return

    def _aside(self, shard: int) -> Path:
        return self.root / ASIDE / f"{self.split or 'train'}-{shard}"

    def accept(self) -> dict[int, Record]:
        """Put the shards that differ to their places as well; returns their new records.

        The caller writes the manifest next. A kill before that leaves shards whose digests are not
        those recorded, which the next repair makes once more.
        """
        for shard in self.differing:
            path = self._path("activations", shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._aside(shard), path)
            fsync_folder(path.parent)
        return self.differing

    def close(self) -> None:
        """Close the files that comparing has opened."""
        self._reader.close()


def moments_of_rows(
    root: Path,
    layout: Layout,
    codec: Codec,
    records: Sequence[Record],
    advance: Callable[[int], object] = lambda n: None,
    *,
    cuts: Sequence[int] = (),
) -> Moments:
    """The moments of all training rows, read from the shards: bit for bit those of the harvest.

    cuts: numbers of rows at which the store was extended. What was added was summed by itself, and
    then joined to what the store had recorded.
    """
    reader = SplitReader(root, "", layout, list(records), codec)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            total = Moments.empty(layout.d_in)
            # A part of a store has fewer rows than its recipe.
            bounds = [0, *(cut for cut in cuts if cut < layout.n_rows), layout.n_rows]
            for first, last in itertools.pairwise(bounds):
                part = _moments_between(reader, first, last, pool, advance)
                if first == 0:
                    total = part
                else:
                    total = Moments(first, total.mean, total.variance * first)
                    total.merge(part)
    finally:
        reader.close()
    return total


def _moments_between(
    reader: SplitReader,
    first: int,
    last: int,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], object],
) -> Moments:
    """Of rows first to last: chunk by chunk to shards, shard by shard to the whole."""
    layout = reader.layout

    def of_shard(shard: int) -> Moments:
        moments = Moments.empty(layout.d_in)
        begin, end = layout.rows_of_shard(shard)
        for start in range(begin, end, layout.chunk_rows):
            rows = slice(max(start, first), min(start + layout.chunk_rows, end, last))
            if rows.start < rows.stop:
                moments.merge(Moments.of(reader.read(rows)))
        return moments

    total = Moments.empty(layout.d_in)
    shards = range(first // layout.shard_rows, -(-last // layout.shard_rows))
    for moments in pool.map(of_shard, shards):
        total.merge(moments)
        advance(moments.count)
    return total
