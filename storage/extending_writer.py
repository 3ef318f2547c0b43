"""Writing the shards that an extension adds to a store, and the one that it fills up.

# R rows of a shard, D d_in, M rows that the store had

The rows that were there keep their places and their values: whole chunks of the shard that is filled
up keep their frames, and in the chunk that was not full the new rows come behind the old ones. A
lossy codec encodes the rows of that chunk a second time, which has to give the same values again.
"""

from concurrent.futures import Executor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .errors import StoreError
from .layout import Layout
from .rows import SplitReader
from .statistics import Distortion, Moments
from .values import Floats, Rows
from .writer import SplitWriter


class ExtendingWriter(SplitWriter):
    """Writes the training shards behind the first M rows into a folder of their own.

    What it is given are the new rows of a shard alone; the statistics in its commit records are of
    them alone.
    """

    def __init__(
        self, folder: Path, layout: Layout, codec: Codec, pool: Executor, *, kept: SplitReader
    ) -> None:
        """folder: where the shards are written; layout: of the store as it will be; kept: its M rows
        as they are.
        """
        super().__init__(folder, "", layout, codec, pool, with_masked=True)
        self._kept = kept
        self.committed |= set(range(kept.n_rows // layout.shard_rows))

    def write(
        self,
        shard: int,
        rows_RD: Rows,
        source_R: NDArray[np.int64],
        masked_R: NDArray[np.bool_] | None = None,
    ) -> None:
        """Encode, write and commit one shard. rows_RD, source_R, masked_R: of its new rows."""
        there = self._rows_there(shard)
        assert masked_R is not None
        super().write(
            shard,
            rows_RD,
            np.concatenate([self._kept.read_source(there), source_R]),
            np.concatenate([self._kept.read_masked(there), masked_R]),
        )

    def _rows_there(self, shard: int) -> slice:
        first, last = self.layout.rows_of_shard(shard)
        return slice(first, min(max(first, self._kept.n_rows), last))

    def _encode(self, shard: int, rows_RD: Rows) -> tuple[list[bytes], Moments, Distortion | None]:
        there, last = self._rows_there(shard), self.layout.rows_of_shard(shard)[1]
        assert rows_RD.shape == (last - there.stop, self.layout.d_in)
        whole, rest = divmod(there.stop - there.start, self.layout.chunk_rows)
        first_chunk = there.start // self.layout.chunk_rows
        frames = [
            frame
            for chunk in range(first_chunk, first_chunk + whole)
            for frame in self._kept.chunk_frames(chunk)
        ]
        before_KD = self._kept.read(slice(there.stop - rest, there.stop)) if rest else None
        more, moments, distortion = self._encode_chunks(shard, rows_RD, before_KD)
        return frames + more, moments, distortion

    def close(self) -> None:
        """Close the files of the rows that are there."""
        self._kept.close()


def check_can_be_filled_up(kept: SplitReader, codec: Codec, path: Path) -> None:
    """StoreError unless the rows of the last chunk, if it is not full, survive to be encoded again."""
    rest = kept.n_rows % kept.layout.chunk_rows
    if not rest or not codec.is_lossy:
        return
    values_KD: Floats = kept.read(slice(kept.n_rows - rest, kept.n_rows))
    if not np.array_equal(codec.kept(values_KD), values_KD):
        raise StoreError(
            f"Store {path} cannot be extended: its last {rest:,} rows share a chunk with new ones, "
            f"and the codec {codec.spelling} would round them once more, to other values. Harvest a "
            "store of the larger size."
        )
