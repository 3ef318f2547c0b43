"""Squared error a token: sum ||x - x_hat||^2 / N, summed over dimensions, the mean over rows.

# N all rows

In squared units of the activations. `mse` is the same divided by d_in.
"""

from collections.abc import Mapping

from torch import Tensor

from .rows import Floats, RowBatch, SumMetric, ratio


class MsePerToken(SumMetric):
    definition = "sum ||x - x_hat||^2 / rows, summed over dimensions"
    direction = "down"
    summed = ("error",)

    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        return {"error": batch.error_B}

    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"mse_per_token": ratio(totals["error"], totals["n_rows"])}
