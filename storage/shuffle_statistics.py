"""Statistics that tell whether stored rows are shuffled: each a formula beside its definition.

# B rows of a batch, N batches, C contexts, T ranges of the text, R parts of the stored order

Rows of a context are alike, and the text is permuted by whole contexts, so rows are no independent
draws. Every standard error here is that of the real null hypothesis: the contexts are a uniform
permutation of the text, and each keeps the rows it has. A row-wise formula would call a perfect
store a failure as soon as it has more blocks than one.
"""

import math

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Contexts counted by a table of all contexts, or by sorting, whichever is smaller.
_DENSE_SHARE = 4


def rows_met(groups_NB: NDArray[np.integer]) -> Floats:
    """Rows met from the own group for each row of a batch, mean over its rows: float64 (N,).

    A row of a group of which the batch holds n rows meets n - 1, so a batch's mean is the sum of
    n (n - 1) over its groups, divided by B.
    """
    n_rows = groups_NB.shape[1]
    met_N = np.empty(len(groups_NB))
    for batch, groups_B in enumerate(groups_NB):
        counts = np.unique(groups_B, return_counts=True)[1]
        met_N[batch] = (counts * (counts - 1)).sum() / n_rows
    return met_N


def pair_probability(counts: Ints) -> float:
    """Probability that two different rows are of one group: sum n (n - 1) / (N (N - 1)).

    Times B - 1 it is what a row meets in a batch of B rows of a uniform permutation.
    """
    total = float(counts.sum())
    n = counts.astype(np.float64)
    return float((n * (n - 1)).sum() / (total * (total - 1))) if total > 1 else 0.0


def spearman(counts_C: Ints, place_sums_C: Floats, order_C: Ints) -> tuple[float, float]:
    """Rank correlation of rows' places with the order of their contexts, and its standard error.

    counts_C: rows of each context; place_sums_C: sum of the places (0, 1, ...) of its rows;
    order_C: the contexts in the order of the text. Rows of a context are ties and have their mean
    rank. The standard error is that of a linear statistic under a uniform permutation of the
    contexts (Hoeffding 1951): sqrt(sum a^2 sum (x - mean x)^2 / (C - 1)), with a the centred place
    sums and x the centred ranks.
    """
    counts = counts_C[order_C].astype(np.float64)
    sums = place_sums_C[order_C]
    present = counts > 0
    counts, sums = counts[present], sums[present]
    total, middle = counts.sum(), (counts.sum() - 1) / 2
    ranks = np.cumsum(counts) - counts + (counts - 1) / 2 - middle
    places = sums - counts * middle
    scale = math.sqrt(float((counts * ranks**2).sum()) * total * (total**2 - 1) / 12)
    if scale == 0:
        return math.nan, math.nan
    variance = (places**2).sum() * ((ranks - ranks.mean()) ** 2).sum() / (len(counts) - 1)
    return float((places * ranks).sum() / scale), math.sqrt(float(variance)) / scale


class RangeTable:
    """Ints of rows by range of the text and part of the stored order, taken in that order.

    Its chi-square has dof = (T - 1) (R - 1). Were rows permuted one by one, its mean would be dof.
    Contexts that stay together in a part raise that to what `expected_per_dof` says.
    """

    def __init__(self, bounds: Ints, range_C: NDArray[np.integer], n_ranges: int) -> None:
        """bounds: (R + 1,) places where parts begin, and the end; range_C: of each context."""
        self.n_ranges, self.n_parts = n_ranges, len(bounds) - 1
        self._bounds, self._range_C = bounds, range_C
        self.counts_RT = np.zeros((self.n_parts, n_ranges), np.int64)
        self._squares = 0.0  # sum over parts of (sum over contexts of m^2) / rows of the part
        self._pending: list[Ints] = []
        self._place = self._part = 0

    def add(self, contexts: Ints) -> None:
        """The contexts of the next rows of the stored order."""
        while len(contexts):
            room = int(self._bounds[self._part + 1]) - self._place
            head, contexts = contexts[:room], contexts[room:]
            self._pending.append(head)
            self._place += len(head)
            if self._place == self._bounds[self._part + 1]:
                self._close_part()

    def _close_part(self) -> None:
        contexts = np.concatenate(self._pending)
        self._pending.clear()
        self.counts_RT[self._part] = np.bincount(self._range_C[contexts], minlength=self.n_ranges)
        if len(contexts) * _DENSE_SHARE > len(self._range_C):
            held = np.bincount(contexts)
        else:
            held = np.unique(contexts, return_counts=True)[1]
        self._squares += float((held.astype(np.float64) ** 2).sum()) / len(contexts)
        self._part += 1

    @property
    def dof(self) -> int:
        return (self.n_ranges - 1) * (self.n_parts - 1)

    @property
    def per_dof(self) -> float:
        """chi-square / dof: sum over cells of (count - E)^2 / E, E = row sum * column sum / N."""
        counts = self.counts_RT.astype(np.float64)
        expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
        filled = expected > 0
        deviations = (counts - expected)[filled] ** 2 / expected[filled]
        return float(deviations.sum()) / self.dof

    def expected_per_dof(self, counts_C: Ints) -> float:
        """Mean of `per_dof` under a uniform permutation of contexts, as they lie in the parts.

        With m rows of context c in a part of n rows, a = m - n_c n / N is what it adds to a cell
        beyond its share. A cell's variance is T-1 / T^2 C / (C - 1) sum a^2, and summed over cells
        and divided by their means that is (T - 1) C / (C - 1) (sum m^2 / n - sum n_c^2 / N).
        """
        n_contexts, n = len(self._range_C), counts_C.astype(np.float64)
        excess = self._squares - float((n**2).sum() / n.sum())
        return n_contexts / (n_contexts - 1) * excess / (self.n_parts - 1)

    @property
    def relative_error(self) -> float:
        """No larger is the standard error of per_dof, as a share of its expected value.

        With S the covariance of a range's counts over the parts, the mean is (T - 1) tr S and the
        variance 2 (T - 1) tr S^2, which is at most 2 (T - 1) (tr S)^2. It is that large when whole
        blocks move together, and sqrt(2 / dof) when nothing does.
        """
        return math.sqrt(2 / (self.n_ranges - 1))


class SeenPositions:
    """Which positions have been met: one bit each, so that 500 million take 63 MB."""

    def __init__(self, n_positions: int) -> None:
        self.n_positions = n_positions
        self._bits = np.zeros(-(-n_positions // 8), np.uint8)
        self.repeated = self.outside = 0

    def add(self, positions: Ints) -> None:
        """Note positions; those met before are counted in `repeated`, impossible ones in `outside`."""
        ordered = np.sort(positions)
        inside = slice(*np.searchsorted(ordered, [0, self.n_positions]).tolist())
        self.outside += len(ordered) - len(ordered[inside])
        ordered = ordered[inside]
        if not len(ordered):
            return
        is_new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        bytes_, bits = ordered >> 3, np.uint8(1) << (ordered & 7).astype(np.uint8)
        starts = np.flatnonzero(np.concatenate(([True], bytes_[1:] != bytes_[:-1])))
        added, touched = np.bitwise_or.reduceat(bits, starts), bytes_[starts]
        before = self._bits[touched]
        self.repeated += len(ordered) - int(is_new.sum())
        self.repeated += int(np.bitwise_count(before & added).sum())
        self._bits[touched] = before | added

    def between(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether each position of [start, stop) has been met."""
        first = start // 8
        bits = np.unpackbits(self._bits[first : -(-stop // 8)], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].astype(np.bool_)
