"""Explained variance: 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, pooled over all rows.

No unit. mean is that of all rows, per dimension; both sums run over rows and dimensions. At most 1;
0 for an SAE that always answers the mean; negative for a worse one.
"""

from collections.abc import Mapping

from torch import Tensor

from .rows import Floats, RowBatch, SumMetric, ratio


class ExplainedVariance(SumMetric):
    definition = "1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, pooled over rows"
    direction = "up"
    summed = ("error",)

    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        return {"error": batch.error_B}

    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"explained_variance": 1 - ratio(totals["error"], totals["scatter"])}
