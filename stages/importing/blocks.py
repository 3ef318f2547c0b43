"""Blocks of an import: read from the input in slices, put to their places, written behind.

# R rows, D d_in
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...storage.errors import InputError
from ...storage.loader import scatter_rows
from ...storage.values import Floats, Rows, ValueType, widen
from ...storage.writer import SplitWriter
from .base import RawRows, RowInput
from .order import BlockOfInput

_SLICE_BYTES = 1 << 20  # of float32 rows that one thread reads at once: they stay in the cache
# Largest values that do not become Inf in a number format; a little less than the truth.
_LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38}


@dataclass(frozen=True)
class RowReader:
    """Rows of an input in the number format of a store. Any thread may use it."""

    input: RowInput
    values: ValueType

    def read(self, rows_R: NDArray[np.int64]) -> Rows:
        """Rows of the input in the store's number format; InputError for NaN, Inf or too large."""
        raw_RD, values = self.input.read(rows_R), self.values
        if self.input.number_format == "bfloat16":
            if ((raw_RD & 0x7F80) == 0x7F80).any():
                raise self._not_finite(rows_R, _floats(raw_RD))
            if values.name == "bfloat16":
                return raw_RD
            raw_RD = _floats(raw_RD)
        # Both ends propagate NaN, and need no memory.
        low, high = float(raw_RD.min()), float(raw_RD.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise self._not_finite(rows_R, raw_RD)
        if max(-low, high) > _LARGEST[values.name]:
            row, column = np.unravel_index(np.abs(raw_RD).argmax(), raw_RD.shape)
            raise InputError(
                f"Row {rows_R[row]} of {self.input.name} holds {raw_RD[row, column]:g} at dimension "
                f"{column}, and {values.name} ends at {_LARGEST[values.name]:g}. Pass another "
                "--store-dtype."
            )
        if self.input.number_format == values.name:
            return raw_RD
        return values.of_floats(np.asarray(raw_RD, np.float32))

    def _not_finite(self, rows_R: NDArray[np.int64], floats_RD: RawRows) -> InputError:
        row, column = (int(i) for i in np.argwhere(~np.isfinite(floats_RD))[0])
        return InputError(
            f"Row {rows_R[row]} of {self.input.name} holds {floats_RD[row, column]} at dimension "
            f"{column}, which a store cannot hold. Leave such rows out of the input."
        )

    def slices(self, rows_R: NDArray[np.int64]) -> Iterator[slice]:
        """Parts of ascending rows that one thread reads; no unit of the input is in two of them."""
        count = max(_SLICE_BYTES // (self.input.d_in * 4), 1)
        ends = np.flatnonzero(np.diff(rows_R // self.input.rows_together)) + 1
        wanted = np.searchsorted(ends, np.arange(count, len(rows_R), count))
        cuts = np.unique(ends[wanted[wanted < len(ends)]]).tolist()
        for start, stop in zip([0, *cuts], [*cuts, len(rows_R)], strict=True):
            if stop > start:
                yield slice(start, stop)


def _floats(bits_RD: RawRows) -> Floats:
    floats_RD = np.empty(bits_RD.shape, np.float32)
    widen(bits_RD, floats_RD)
    return floats_RD


class BlockWriter:
    """Blocks filled in the caller's thread and its pool, written in a thread behind it."""

    def __init__(
        self,
        rows: "RowReader",
        pool: ThreadPoolExecutor,
        behind: ThreadPoolExecutor,
        advance: Callable[[int], object],
    ) -> None:
        self._reader, self._pool, self._behind, self._advance = rows, pool, behind, advance
        self._written: Future[None] | None = None
        self._spare: list[Rows] = []

    def run(self, writer: SplitWriter, block: int, rows: BlockOfInput, missing: set[int]) -> None:
        """Fill one block and hand it over to be written."""
        n_rows = len(rows.rows_R)
        # Memory is taken once and used again: fresh pages cost more than filling them.
        buffer = self._spare.pop() if self._spare else None
        if buffer is None or len(buffer) < n_rows:
            buffer = np.empty((n_rows, writer.layout.d_in), writer.codec.values.memory)
        filling = [
            self._pool.submit(self._fill, buffer, rows, part)
            for part in self._reader.slices(rows.rows_R)
        ]
        try:
            for part in filling:
                part.result()
        finally:
            for part in filling:
                part.cancel()
        self.wait()
        self._written = self._behind.submit(
            self._write, writer, block, buffer, rows.source(), sorted(missing)
        )

    def _fill(self, buffer_RD: Rows, rows: BlockOfInput, part: slice) -> None:
        values_RD = self._reader.read(rows.rows_R[part])
        scatter_rows(buffer_RD, rows.places_R[part], np.ascontiguousarray(values_RD))

    def _write(
        self,
        writer: SplitWriter,
        block: int,
        buffer_RD: Rows,
        source_R: NDArray[np.int64],
        missing: Sequence[int],
    ) -> None:
        begin, _ = writer.layout.rows_of_block(block)
        for shard in missing:
            first, last = writer.layout.rows_of_shard(shard)
            part = slice(first - begin, last - begin)
            masked_R = None if writer.split else np.zeros(last - first, np.bool_)
            writer.write(shard, buffer_RD[part], source_R[part], masked_R)
            self._advance(last - first)
        self._spare.append(buffer_RD)

    def wait(self) -> None:
        """Until the block behind is written; raise what writing it raised."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()
