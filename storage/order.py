"""The order in which readers serve rows: a pure function of (layout, seed, world size, rank).

One epoch: shards are permuted and taken in groups of `open_shards` for each rank; the chunks of a
group are permuted, dealt to the ranks in turn and cut into windows; the rows of a window are
permuted. A batch is a run of rows of that order, and epochs follow one another without a gap. Rows
of one context stand in one block (in two at its border), so a batch meets them as often as in a
window of about open_shards blocks.

Each rank serves as many rows in every epoch, and the ranks together serve each row exactly once. So
the place of any batch follows from its number, and nothing has to be read to find it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .counter import permutation, stream_key
from .errors import InputError
from .layout import VALUE_BYTES, Layout

OPEN_SHARDS = 32
WINDOW_BYTES = 256 << 20  # of bfloat16 rows; the reader holds two windows


@dataclass(frozen=True)
class Window:
    """A run of the epoch's order that is decoded at once.

    chunks: chunk numbers in the order they are laid out before the permutation; first_row: place of
    the window's first row in the rank's epoch; n_rows: rows in it; key: of its row permutation;
    group: number in the epoch of the group that the chunks are of.
    """

    epoch: int
    group: int
    chunks: NDArray[np.int64]
    first_row: int
    n_rows: int
    key: int

    def places(self) -> NDArray[np.int64]:
        """Row j of the window's chunks, laid end to end, is served at places()[j]."""
        return permutation(self.key, self.n_rows)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of all epochs over one split, for one of `world_size` ranks.

    in_stored_order: take the shards as they stand and not permuted, so that the first ones can be
    served while later ones are still to be written.
    """

    layout: Layout
    seed: int
    open_shards: int = OPEN_SHARDS
    window_rows: int = 0
    world_size: int = 1
    rank: int = 0
    in_stored_order: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise InputError(
                f"Rank {self.rank} is not one of {self.world_size}. "
                "Pass a rank from 0 to the world size less 1."
            )
        if self.n_rows < 1:
            raise InputError(
                f"{self._n_chunks} chunks cannot be dealt to {self.world_size} ranks. "
                "Use fewer ranks, or a larger store."
            )

    @property
    def rows_a_window(self) -> int:
        """Rows aimed at for a window; a pure function of the layout unless set."""
        default = WINDOW_BYTES // (self.layout.d_in * VALUE_BYTES)
        return max(self.window_rows or default, self.layout.chunk_rows)

    @property
    def largest_window(self) -> int:
        """No window holds more rows than this."""
        return -(-self.rows_a_window // self.layout.chunk_rows) * self.layout.chunk_rows

    @property
    def _n_chunks(self) -> int:
        return -(-self.layout.n_rows // self.layout.chunk_rows)

    @property
    def _short_chunk(self) -> int:
        """The chunk that is not full, if there is one: the last. Else a number no chunk has."""
        return self._n_chunks - 1 if self.layout.n_rows % self.layout.chunk_rows else -1

    @property
    def n_rows(self) -> int:
        """Rows that this rank serves in an epoch, the same in each.

        Full chunks are dealt in turn; the short one always goes to the last rank, which never has
        more full ones than another.
        """
        full, short = divmod(self.layout.n_rows, self.layout.chunk_rows)
        mine = len(range(self.rank, full, self.world_size)) * self.layout.chunk_rows
        return mine + (short if self.rank == self.world_size - 1 else 0)

    def windows(self, row: int) -> Iterator[Window]:
        """Windows without end, from the one that holds this rank's row `row` of all epochs."""
        epoch, offset = divmod(row, self.n_rows)
        while True:
            yield from self._epoch(epoch, offset)
            epoch, offset = epoch + 1, 0

    def shards_of_group(self, epoch: int, group: int) -> NDArray[np.int64]:
        """The shards whose chunks are mixed in one group."""
        step = self.open_shards * self.world_size
        return self._shards(epoch)[group * step : (group + 1) * step]

    def group_after(self, epoch: int, group: int) -> tuple[int, int]:
        """Epoch and number of the group that follows one."""
        step = self.open_shards * self.world_size
        is_last = (group + 1) * step >= self.layout.n_shards
        return (epoch + 1, 0) if is_last else (epoch, group + 1)

    def _shards(self, epoch: int) -> NDArray[np.int64]:
        n_shards = self.layout.n_shards
        if self.in_stored_order:
            return np.arange(n_shards, dtype=np.int64)
        return permutation(stream_key(self.seed, "shards", epoch), n_shards)

    def _epoch(self, epoch: int, offset: int) -> Iterator[Window]:
        shards = self._shards(epoch)
        step = self.open_shards * self.world_size
        first_row = dealt = 0
        for group, start in enumerate(range(0, len(shards), step)):
            members = shards[start : start + step]
            full, short = self._full_chunks(members)
            turns = range((self.rank - dealt) % self.world_size, full, self.world_size)
            in_group = len(turns) * self.layout.chunk_rows
            in_group += short if self.rank == self.world_size - 1 else 0
            if first_row + in_group > offset:
                for window in self._group(epoch, group, members, first_row, dealt):
                    if window.first_row + window.n_rows > offset:
                        yield window
            first_row += in_group
            dealt += full

    def _full_chunks(self, shards: NDArray[np.int64]) -> tuple[int, int]:
        """Full chunks of these shards, and the rows of the short one if it is among them."""
        rows = np.minimum((shards + 1) * self.layout.shard_rows, self.layout.n_rows)
        rows -= shards * self.layout.shard_rows
        return int((rows // self.layout.chunk_rows).sum()), int(
            (rows % self.layout.chunk_rows).sum()
        )

    def _group(
        self, epoch: int, group: int, shards: NDArray[np.int64], first_row: int, dealt: int
    ) -> Iterator[Window]:
        """dealt: full chunks of the epoch that were dealt before this group."""
        layout = self.layout
        chunks = shards[:, None] * layout.chunks_per_shard + np.arange(layout.chunks_per_shard)
        chunks = chunks.reshape(-1)
        chunks = chunks[chunks * layout.chunk_rows < layout.n_rows]
        chunks = chunks[permutation(stream_key(self.seed, "chunks", epoch, group), len(chunks))]
        is_full = chunks != self._short_chunk
        owner = (dealt + np.cumsum(is_full) - 1) % self.world_size
        owner[~is_full] = self.world_size - 1
        chunks = chunks[owner == self.rank]
        rows = np.minimum((chunks + 1) * layout.chunk_rows, layout.n_rows)
        rows -= chunks * layout.chunk_rows
        # Windows of equal size, so that no small one at the end of a group mixes badly.
        per_window = self.largest_window // layout.chunk_rows
        count = -(-len(chunks) // per_window)
        for number, part in enumerate(np.array_split(np.arange(len(chunks)), max(count, 1))):
            n_rows = int(rows[part].sum())
            if n_rows == 0:
                continue
            key = stream_key(self.seed, "window", epoch, group, number, self.rank, self.world_size)
            yield Window(epoch, group, chunks[part], first_row, n_rows, key)
            first_row += n_rows
