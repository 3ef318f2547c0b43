"""The stored order and the reader's, as `source` tells them, for `storage/shuffle.py`."""

# B rows of a batch, N batches, C contexts

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .layout import Layout
from .order import Order
from .shuffle_statistics import Ints, RangeTable, SeenPositions, rows_met, spearman
from .shuffle_tokens import Contexts
from .store import ActivationStore

MAX_BATCHES, BATCHES_TOGETHER = 200, 50  # neighbouring batches share what must be read for them
MAX_RANGES, MIN_CELL_ROWS, MIN_RANGE_CONTEXTS = 256, 5, 5


def shards_to_read(layout: Layout, max_rows: int | None) -> list[int]:
    """All shards, or some that are evenly spread."""
    if max_rows is None or layout.n_rows <= max_rows:
        return list(range(layout.n_shards))
    count = max(max_rows // layout.shard_rows, 2)
    return sorted({round(s) for s in np.linspace(0, layout.n_shards - 1, count)})


class StoredOrder:
    """What one pass over `source`, in the stored order, tells."""

    def __init__(
        self,
        layout: Layout,
        contexts: Contexts,
        shards: list[int],
        batch: int,
        cuts: Sequence[int] = (),
    ) -> None:
        """cuts: rows at which the store was extended, which are bounds of what is permuted."""
        self._layout, self._contexts, self._shards, self._cuts = layout, contexts, shards, cuts
        rows = [last - first for first, last in map(layout.rows_of_shard, shards)]
        self.n_rows = sum(rows)
        self.seen = SeenPositions(contexts.n * contexts.size)
        self.counts_C = np.zeros(contexts.n, np.int64)
        self._place_sums_C = np.zeros(contexts.n)
        self._run_rows = min(batch, layout.shard_rows)
        self._met: list[tuple[float, float]] = []
        n_ranges = min(
            MAX_RANGES,
            math.isqrt(self.n_rows // MIN_CELL_ROWS),
            contexts.n // MIN_RANGE_CONTEXTS,
        )
        parts = {
            "stored_ranges": np.linspace(0, self.n_rows, n_ranges + 1).astype(np.int64),
            "shards": np.cumsum([0, *rows]),
        }
        range_C = np.empty(contexts.n, np.int64)
        range_C[contexts.order_C] = np.arange(contexts.n) * n_ranges // max(contexts.n, 1)
        self._tables = {
            name: RangeTable(bounds, range_C, n_ranges)
            for name, bounds in parts.items()
            if n_ranges > 1 and len(bounds) > 2
        }

    @property
    def is_full(self) -> bool:
        return self.n_rows == self._layout.n_rows

    def read(self, store: ActivationStore, advance: Callable[[int], object]) -> None:
        place = 0
        for shard in self._shards:
            first, last = self._layout.rows_of_shard(shard)
            source = store._train.read_source(slice(first, last))
            self.seen.add(source)
            contexts = self._contexts.of_source(source)
            self._count(contexts, place)
            for table in self._tables.values():
                table.add(contexts)
            self._add_run(contexts, first)
            place += len(contexts)
            advance(len(contexts))

    def _count(self, contexts: Ints, place: int) -> None:
        """Add rows that begin at a place; blocks follow the corpus, so their contexts are near."""
        first = int(contexts.min())
        near, places = contexts - first, np.arange(place, place + len(contexts), dtype=np.float64)
        counts = np.bincount(near)
        self.counts_C[first : first + len(counts)] += counts
        self._place_sums_C[first : first + len(counts)] += np.bincount(near, places)

    def _add_run(self, contexts: Ints, first_row: int) -> None:
        """Neighbouring rows of a shard, as a plain reader meets them, and the rows of the block."""
        if len(contexts) < self._run_rows:
            return
        begin, end = self._layout.rows_of_block(first_row // self._layout.block_rows)
        begin = max([begin, *(cut for cut in self._cuts if cut <= first_row)])
        end = min([end, *(cut for cut in self._cuts if cut > first_row)])
        met = float(rows_met(contexts[None, : self._run_rows])[0])
        self._met.append((met, (self._run_rows - 1) / max(end - begin - 1, 1)))

    def runs(self, mates: float) -> dict[str, Any] | None:
        """Rows met from the same context in runs of stored rows; mates: other rows of a context.

        Expected: those of a uniform permutation inside blocks, mates * (run - 1) / (block - 1).
        """
        if len(self._met) < 2:
            return None
        met_N, share_N = np.array(self._met).T
        return {
            "rows": self._run_rows,
            "count": len(met_N),
            "met": met_N.mean(),
            "expected": mates * share_N.mean(),
            "standard_error": met_N.std(ddof=1) / math.sqrt(len(met_N)),
        }

    def correlations(self) -> dict[str, Any]:
        rho, error = spearman(self.counts_C, self._place_sums_C, self._contexts.order_C)
        in_corpus, _ = spearman(self.counts_C, self._place_sums_C, np.arange(self._contexts.n))
        return {"text": rho, "standard_error": error, "corpus": in_corpus}

    def tables(self) -> dict[str, Any]:
        return {
            name: {
                "source_ranges": table.n_ranges,
                "parts": table.n_parts,
                "per_dof": table.per_dof,
                "expected": table.expected_per_dof(self.counts_C),
                "standard_error_uniform": math.sqrt(2 / table.dof),
                "standard_error_at_most": table.expected_per_dof(self.counts_C)
                * table.relative_error,
            }
            for name, table in self._tables.items()
        }


# --- the reader's order ---


def served_rows(order: Order, start: int, stop: int) -> Ints:
    """Row numbers of places start to stop of the reader's order, counted through all epochs."""
    layout, parts = order.layout, []
    for window in order.windows(start):
        first_rows = window.chunks[:, None] * layout.chunk_rows
        laid = (first_rows + np.arange(layout.chunk_rows)).reshape(-1)
        rows = np.empty(window.n_rows, np.int64)
        rows[window.places()] = laid[laid < layout.n_rows]
        begin = window.first_row + window.epoch * layout.n_rows
        parts.append(rows[max(start - begin, 0) : stop - begin])
        if begin + window.n_rows >= stop:
            break
    return np.concatenate(parts)


class ServedBatches:
    """Batches of the first epoch of seed 0: source_NB of their rows."""

    def __init__(self, store: ActivationStore, contexts: Contexts, batch: int) -> None:
        in_epoch = store.n_rows // batch
        together = BATCHES_TOGETHER if in_epoch > MAX_BATCHES else max(in_epoch, 1)
        count = MAX_BATCHES // together if in_epoch > MAX_BATCHES else min(in_epoch, 1)
        parts = [np.empty(0, np.int64)]
        for first in np.linspace(0, in_epoch - together, count).astype(np.int64).tolist():
            order = Order(layout=store._train.layout, seed=0)
            rows = served_rows(order, first * batch, (first + together) * batch)
            parts.append(store._train.read_source(rows))
        source = np.clip(np.concatenate(parts), 0, max(contexts.n * contexts.size - 1, 0))
        self.source_NB: Ints = source.reshape(-1, batch)

    def correlation(self, contexts: Contexts) -> dict[str, Any]:
        of_row = contexts.of_source(self.source_NB.reshape(-1))
        counts_C = np.bincount(of_row, minlength=contexts.n)
        places = np.arange(len(of_row), dtype=np.float64)
        sums_C = np.asarray(np.bincount(of_row, places, minlength=contexts.n), np.float64)
        rho, error = spearman(counts_C, sums_C, contexts.order_C)
        return {"reader": rho, "reader_standard_error": error}


def predicted_met(layout: Layout, mates: float, batch: int) -> float:
    """Rows met from the same context in the reader's batches when blocks are well permuted.

    A mate of a row stands in its chunk, its shard or another shard of its block in the proportions
    of their sizes; it is in the same group of shards, then in the same window, then in the same
    batch with the probabilities of those permutations. With many shards that is about
    mates * batch / (rows of a group) * (shards of a group / shards of a block), and more where
    windows are small.
    """
    chunk, shards = layout.chunk_rows, max(layout.n_shards, 1)
    shard = min(layout.shard_rows, layout.n_rows)
    block = min(layout.block_rows, layout.n_rows)
    if layout.n_rows <= chunk or block < 2:
        return mates * (batch - 1) / max(layout.n_rows - 1, 1)
    order = Order(layout=layout, seed=0)
    opened = min(order.open_shards, shards)
    chunks = min(opened * shard, layout.n_rows) / chunk
    per_window = chunks / math.ceil(chunks * chunk / order.largest_window)
    same_chunk = (chunk - 1) / (block - 1)
    other_shard = (block - shard) / (block - 1)
    same_group = 1.0 - same_chunk - other_shard
    if shards > 1:
        same_group += other_shard * (opened - 1) / (shards - 1)
    same_window = same_chunk + same_group * (per_window - 1) / max(chunks - 1, 1)
    return mates * same_window * min((batch - 1) / (per_window * chunk - 1), 1.0)
