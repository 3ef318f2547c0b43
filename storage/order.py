"""The order in which a reader serves rows: a pure function of (layout, seed, epoch).

One epoch: shards are permuted and taken in groups of `open_shards`; the chunks of a group are
permuted and cut into windows; the rows of a window are permuted. A batch is a run of rows of that
order, and epochs follow one another without a gap. Rows of one context stand in one block (in two
at its border), so a batch meets them as often as in a window of about open_shards blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .counter import permutation, stream_key
from .layout import VALUE_BYTES, Layout

OPEN_SHARDS = 32
WINDOW_BYTES = 256 << 20  # of bfloat16 rows; the reader holds two windows


@dataclass(frozen=True)
class Window:
    """A run of the epoch's order that is decoded at once.

    chunks: chunk numbers in the order they are laid out before the permutation; first_row: place of
    the window's first row in the epoch; n_rows: rows in it; key: of its row permutation.
    """

    epoch: int
    chunks: NDArray[np.int64]
    first_row: int
    n_rows: int
    key: int

    def places(self) -> NDArray[np.int64]:
        """Row j of the window's chunks, laid end to end, is served at places()[j]."""
        return permutation(self.key, self.n_rows)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of all epochs over one split."""

    layout: Layout
    seed: int
    open_shards: int = OPEN_SHARDS
    window_rows: int = 0

    @property
    def rows_a_window(self) -> int:
        """Rows aimed at for a window; a pure function of the layout unless set."""
        default = WINDOW_BYTES // (self.layout.d_in * VALUE_BYTES)
        return max(self.window_rows or default, self.layout.chunk_rows)

    @property
    def largest_window(self) -> int:
        """No window holds more rows than this."""
        return -(-self.rows_a_window // self.layout.chunk_rows) * self.layout.chunk_rows

    def windows(self, row: int) -> Iterator[Window]:
        """Windows without end, from the one that holds row `row` counted through all epochs."""
        epoch, offset = divmod(row, self.layout.n_rows)
        while True:
            yield from self._epoch(epoch, offset)
            epoch, offset = epoch + 1, 0

    def _epoch(self, epoch: int, offset: int) -> Iterator[Window]:
        layout = self.layout
        shards = permutation(stream_key(self.seed, "shards", epoch), layout.n_shards)
        rows = np.minimum((shards + 1) * layout.shard_rows, layout.n_rows)
        rows -= shards * layout.shard_rows
        first_row = 0
        for group, start in enumerate(range(0, layout.n_shards, self.open_shards)):
            members = slice(start, start + self.open_shards)
            in_group = int(rows[members].sum())
            if first_row + in_group > offset:
                for window in self._group(epoch, group, shards[members], first_row):
                    if window.first_row + window.n_rows > offset:
                        yield window
            first_row += in_group

    def _group(
        self, epoch: int, group: int, shards: NDArray[np.int64], first_row: int
    ) -> Iterator[Window]:
        layout = self.layout
        chunks = shards[:, None] * layout.chunks_per_shard + np.arange(layout.chunks_per_shard)
        chunks = chunks.reshape(-1)
        chunks = chunks[chunks * layout.chunk_rows < layout.n_rows]
        chunks = chunks[permutation(stream_key(self.seed, "chunks", epoch, group), len(chunks))]
        rows = np.minimum((chunks + 1) * layout.chunk_rows, layout.n_rows)
        rows -= chunks * layout.chunk_rows
        # Windows of equal size, so that no small one at the end of a group mixes badly.
        per_window = self.largest_window // layout.chunk_rows
        count = -(-len(chunks) // per_window)
        for number, part in enumerate(np.array_split(np.arange(len(chunks)), count)):
            n_rows = int(rows[part].sum())
            key = stream_key(self.seed, "window", epoch, group, number)
            yield Window(epoch, chunks[part], first_row, n_rows, key)
            first_row += n_rows
