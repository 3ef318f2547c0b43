"""Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2, pooled over all rows.

No unit. 1 - explained variance, kept apart because papers report either.
"""

from collections.abc import Mapping

from torch import Tensor

from .rows import Floats, RowBatch, SumMetric, ratio


class Fvu(SumMetric):
    definition = "sum ||x - x_hat||^2 / sum ||x - mean||^2, pooled over rows"
    direction = "down"
    summed = ("error",)

    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        return {"error": batch.error_B}

    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"fvu": ratio(totals["error"], totals["scatter"])}
