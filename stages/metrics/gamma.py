"""Gamma, relative reconstruction bias: sum ||x_hat||^2 / sum x . x_hat, pooled over all rows.

No unit. The factor by which the best rescaling of x_hat would divide it (Rajamanoharan et al. 2024,
arXiv 2404.16014): below 1, reconstructions are too small (shrinkage).
"""

from collections.abc import Mapping

from torch import Tensor

from .rows import Floats, RowBatch, SumMetric, ratio


class Gamma(SumMetric):
    definition = "sum ||x_hat||^2 / sum x . x_hat, pooled over rows; below 1 is shrinkage"
    summed = ("power", "overlap")

    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        return {"power": batch.power_B, "overlap": batch.overlap_B}

    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"gamma": ratio(totals["power"], totals["overlap"])}
