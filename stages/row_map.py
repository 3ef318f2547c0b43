"""Which rows a split holds and where each is stored: a pure function of corpus and recipe.

# C contexts, T positions of a context, R rows of a block

Rows are counted through the contexts of the corpus in order. A block is a run of block_rows of
them; it may begin and end inside a context, whose forward pass then runs for both blocks. Inside a
block the rows are permuted, so that every block, shard and chunk is a fair sample.

A store that was extended has cuts: row numbers at which it ended before. The rows of a block before
and behind a cut are parts of it, each permuted and computed by itself.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..storage.corpus import TokenTable, row_positions
from ..storage.counter import permutation, stream_key
from ..storage.layout import Layout
from .masking import MaskConfig, mask_tokens

_SLICE_CONTEXTS = 2048
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class KeepRule:
    """Which positions become rows.

    keep_first: keep the first position of a context and BOS positions (attention sinks);
    bos_id: the tokenizer's; drop_masked: leave out positions whose token was replaced.
    """

    keep_first: bool
    bos_id: int | None
    drop_masked: bool

    def keeps(
        self,
        tokens_CT: NDArray[np.uint32],
        lengths_C: NDArray[np.uint32],
        is_masked_CT: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Whether each position becomes a row, (C, T). Padding never does."""
        kept_CT = row_positions(
            tokens_CT, lengths_C, bos_id=self.bos_id, keep_first=self.keep_first
        )
        if self.drop_masked:
            kept_CT &= ~is_masked_CT
        return kept_CT


@dataclass(frozen=True)
class BlockRows:
    """The rows of one block before any of them is computed.

    split: its name for messages; tokens_CT: what the model is given (masked); lengths_C; kept_CT: positions that are rows of this
    block; places_R: row j (in text order) is stored at first_row + places_R[j]; source_R and
    masked_R: of row j, in text order; part_ends: one past the last context of each part, of which
    a context on a cut is in two.
    """

    split: str
    first_row: int
    part_ends: tuple[int, ...]
    tokens_CT: NDArray[np.uint32]
    lengths_C: NDArray[np.uint32]
    kept_CT: NDArray[np.bool_]
    places_R: NDArray[np.int64]
    source_R: NDArray[np.int64]
    masked_R: NDArray[np.bool_]

    @property
    def n_rows(self) -> int:
        return len(self.places_R)

    @property
    def n_contexts(self) -> int:
        return len(self.lengths_C)

    def stored(self, values_R: NDArray[Scalar]) -> NDArray[Scalar]:
        """Values of rows in text order, put into stored order."""
        out = np.empty_like(values_R)
        out[self.places_R] = values_R
        return out


@dataclass(frozen=True)
class Span:
    """Where a block lies in the text: its contexts, [begin, end), and the number of the first row
    of the first of them. All that has to be counted to make its rows."""

    begin: int
    end: int
    first_number: int


class RowMap:
    """The rows of one split under one mask ratio. They are counted when that is first needed."""

    def __init__(
        self,
        table: TokenTable,
        rule: KeepRule,
        mask: MaskConfig,
        *,
        shuffle_seed: int | None,
        counted_by: "RowMap | None" = None,
        cuts: tuple[int, ...] = (),
        first_row: int = 0,
    ) -> None:
        """shuffle_seed: of the permutation inside blocks; None keeps text order.

        counted_by: a map of the same table and rule: unless masked rows are left out, its rows are
        those of any mask ratio, and the tokens need not be counted again. cuts: numbers of rows at
        which the store was extended, ascending; first_row: 0 or one of them, where the rows to be
        made begin.
        """
        self.table, self.rule, self.mask, self.shuffle_seed = table, rule, mask, shuffle_seed
        self.cuts, self.first_row = cuts, first_row
        self._counted_by = None if rule.drop_masked else counted_by

    @property
    def available_rows(self) -> int:
        """Rows that the corpus holds under this rule."""
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """First row of each context, and the total at the end: (n_contexts + 1,)."""
        if self._counted_by is not None:
            return self._counted_by._starts
        counts = np.zeros(self.table.n_contexts + 1, np.int64)
        for start in range(0, self.table.n_contexts, _SLICE_CONTEXTS):
            stop = min(start + _SLICE_CONTEXTS, self.table.n_contexts)
            tokens_CT, lengths_C = self.table.tokens(start, stop), self.table.lengths(start, stop)
            if self.rule.drop_masked:
                _, is_masked_CT = self._masked(tokens_CT, start)
            else:
                is_masked_CT = np.zeros(tokens_CT.shape, np.bool_)
            counts[start + 1 : stop + 1] = self.rule.keeps(tokens_CT, lengths_C, is_masked_CT).sum(
                axis=1
            )
        return np.cumsum(counts)

    def _masked(
        self, tokens_CT: NDArray[np.uint32], first_context: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        return mask_tokens(
            tokens_CT,
            first_context=first_context,
            context_size=self.table.context_size,
            config=self.mask,
        )

    def block(self, layout: Layout, block: int) -> BlockRows:
        """The rows of one block of a layout, from `first_row` on."""
        parts = [
            self._rows(part, self._span(part.first, part.last))
            for part in self._parts(layout, block)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def span(self, layout: Layout, block: int) -> Span:
        """Where the only part of a block lies in the text."""
        (part,) = self._parts(layout, block)
        return self._span(part.first, part.last)

    def rows(self, layout: Layout, block: int, span: Span) -> BlockRows:
        """The rows of a block whose place is known; the rows before it need not be counted."""
        (part,) = self._parts(layout, block)
        return self._rows(part, span)

    def _parts(self, layout: Layout, block: int) -> "list[_Part]":
        """The parts of a block, those before `first_row` left out."""
        first, last = layout.rows_of_block(block)
        bounds = [first, *(cut for cut in self.cuts if first < cut < last), last]
        parts = [
            _Part(block, number, begin, end)
            for number, (begin, end) in enumerate(itertools.pairwise(bounds))
        ]
        return [part for part in parts if part.first >= self.first_row]

    def _span(self, first: int, last: int) -> Span:
        begin = int(np.searchsorted(self._starts, first, side="right")) - 1
        end = int(np.searchsorted(self._starts, last, side="left"))
        return Span(begin, end, int(self._starts[begin]))

    def _rows(self, part: "_Part", span: Span) -> BlockRows:
        first, last = part.first, part.last
        begin, end = span.begin, span.end
        tokens_CT, lengths_C = self.table.tokens(begin, end), self.table.lengths(begin, end)
        masked_tokens_CT, is_masked_CT = self._masked(tokens_CT, begin)
        kept_CT = self.rule.keeps(tokens_CT, lengths_C, is_masked_CT)
        # Rows of the first and last context that belong to a neighbouring block.
        numbers = span.first_number + np.arange(int(kept_CT.sum()))
        kept_CT[kept_CT] = (numbers >= first) & (numbers < last)
        n_rows = last - first
        if self.shuffle_seed is None:
            places_R = np.arange(n_rows, dtype=np.int64)
        else:
            places_R = permutation(stream_key(self.shuffle_seed, *part.stream), n_rows)
        context_C, position_C = np.nonzero(kept_CT)
        return BlockRows(
            split={"train": "training", "heldout": "held-out"}[self.table.split],
            first_row=first,
            part_ends=(end - begin,),
            tokens_CT=masked_tokens_CT,
            lengths_C=lengths_C,
            kept_CT=kept_CT,
            places_R=places_R,
            source_R=(begin + context_C) * self.table.context_size + position_C,
            masked_R=is_masked_CT[kept_CT],
        )


@dataclass(frozen=True)
class _Part:
    """Rows [first, last) of a block, between its bounds and cuts; number: counted from 0."""

    block: int
    number: int
    first: int
    last: int

    @property
    def stream(self) -> tuple[str | int, ...]:
        """Of the permutation of its rows. The first part's is that of a block without cuts."""
        return ("rows", self.block, self.number) if self.number else ("rows", self.block)


def _joined(parts: list[BlockRows]) -> BlockRows:
    """The parts of a block as one: laid end to end, each permuted in itself."""
    first_row = parts[0].first_row
    together = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("tokens_CT", "lengths_C", "kept_CT", "source_R", "masked_R")
    }
    places_R = np.concatenate([part.places_R + part.first_row - first_row for part in parts])
    ends = np.cumsum([part.n_contexts for part in parts]).tolist()
    return BlockRows(
        split=parts[0].split,
        first_row=first_row,
        part_ends=tuple(ends),
        places_R=places_R,
        **together,
    )
