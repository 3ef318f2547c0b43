"""Which rows of an input are held out, and in which order the others are stored.

# R rows of a block

A pure function of the sizes and the seed, as a harvest's order is. Rows move in *pieces*: as many
whole contexts as stand for 1/65,536 of the input, at most 64 rows, at least one context. Pieces are
held out whole. The others are permuted globally in *runs*, which are single pieces unless the input
is read in larger units (chunks of a Zarr array), and then permuted row by row inside each block.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...storage.counter import permutation, stream_key
from ...storage.errors import InputError
from ...storage.layout import Layout

_PIECES = 16  # as a power of two: small inputs move in single rows, or single contexts
_PIECE_ROWS = 64
# A run is at most this share of a block, or blocks would be made of a few parts of the input.
_RUNS_A_BLOCK = 16


@dataclass(frozen=True)
class BlockOfInput:
    """rows_R: numbers of the input's rows, ascending; places_R: where each stands in the block."""

    rows_R: NDArray[np.int64]
    places_R: NDArray[np.int64]

    def source(self) -> NDArray[np.int64]:
        """Numbers of the input's rows in stored order."""
        source_R = np.empty_like(self.rows_R)
        source_R[self.places_R] = self.rows_R
        return source_R


class InputOrder:
    """The rows of one input, split and permuted.

    n_train, n_heldout: rows of each split; the latter is what was asked for, rounded up to pieces.
    """

    def __init__(
        self,
        n_rows: int,
        *,
        context_size: int,
        rows_together: int,
        block_rows: int,
        heldout_rows: int,
        seed: int,
    ) -> None:
        """rows_together: of the unit that the input is read in; block_rows: as planned."""
        self._n_rows, self._seed = n_rows, seed
        wanted = min(max(n_rows >> _PIECES, 1), _PIECE_ROWS)
        self._piece_rows = context_size * max(wanted // context_size, 1)
        n_pieces = -(-n_rows // self._piece_rows)
        together = min(rows_together, block_rows // _RUNS_A_BLOCK)
        self._run_pieces = max(together // self._piece_rows, 1)
        sizes = np.full(n_pieces, self._piece_rows)
        sizes[-1] = n_rows - (n_pieces - 1) * self._piece_rows
        self._is_heldout = np.zeros(n_pieces, np.bool_)
        if heldout_rows:
            drawn = permutation(stream_key(seed, "pieces", "heldout"), n_pieces)
            enough = int(np.searchsorted(np.cumsum(sizes[drawn]), heldout_rows)) + 1
            self._is_heldout[drawn[:enough]] = True
        train_sizes = np.where(self._is_heldout, 0, sizes)
        self.n_train = int(train_sizes.sum())
        self.n_heldout = n_rows - self.n_train
        if self.n_train == 0:
            raise InputError(
                f"--heldout-rows {heldout_rows} takes all {n_rows:,} rows of the input, which are "
                f"held out in runs of {self._piece_rows}. Pass fewer, or 0."
            )
        firsts = np.arange(0, n_pieces, self._run_pieces)
        of_run = np.add.reduceat(train_sizes, firsts)
        self._order = permutation(stream_key(seed, "contexts", "train"), len(firsts))
        self._starts = np.concatenate(([0], np.cumsum(of_run[self._order])))

    def first_rows(self, count: int) -> NDArray[np.int64]:
        """Numbers of the first training rows in permuted order, a fair sample; ascending."""
        return np.sort(self._train_rows(0, min(count, self.n_train)))

    def train_block(self, layout: Layout, block: int) -> BlockOfInput:
        """The training rows of one block of a layout."""
        first, last = layout.rows_of_block(block)
        places_R = permutation(stream_key(self._seed, "rows", block), last - first)
        rows_R = self._train_rows(first, last)
        ascending = np.argsort(rows_R)
        return BlockOfInput(rows_R[ascending], places_R[ascending])

    def heldout_block(self, layout: Layout, block: int) -> BlockOfInput:
        """The held-out rows of one block, in the order of the input."""
        first, last = layout.rows_of_block(block)
        # Only the last piece of the input may be shorter.
        of_block = slice(first // self._piece_rows, -(-last // self._piece_rows))
        rows_R = self._rows_of(np.flatnonzero(self._is_heldout)[of_block])
        skipped = first - of_block.start * self._piece_rows
        rows_R = rows_R[skipped : skipped + last - first]
        return BlockOfInput(rows_R, np.arange(len(rows_R)))

    def _train_rows(self, first: int, last: int) -> NDArray[np.int64]:
        """Rows first to last of the permuted order."""
        begin = int(np.searchsorted(self._starts, first, side="right")) - 1
        end = int(np.searchsorted(self._starts, last, side="left"))
        runs = self._order[begin:end]
        pieces = (runs[:, None] * self._run_pieces + np.arange(self._run_pieces)).reshape(-1)
        pieces = pieces[pieces < len(self._is_heldout)]
        rows_R = self._rows_of(pieces[~self._is_heldout[pieces]])
        skipped = first - int(self._starts[begin])
        return rows_R[skipped : skipped + last - first]

    def _rows_of(self, pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = (pieces[:, None] * self._piece_rows + np.arange(self._piece_rows)).reshape(-1)
        return rows[rows < self._n_rows]
