"""Mean squared error a value: sum ||x - x_hat||^2 / (N d_in), the mean over rows and dimensions.

# N all rows

In squared units of the activations. `mse_per_token` is d_in times this.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .rows import Floats, RowBatch, SumMetric, ratio


class Mse(SumMetric):
    definition = "sum ||x - x_hat||^2 / (rows * d_in)"
    direction = "down"
    summed = ("error", "values")

    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        n_rows, d_in = batch.rows.x_BD.shape
        return {
            "error": batch.error_B,
            "values": torch.full((n_rows,), d_in, dtype=torch.float64),
        }

    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"mse": ratio(totals["error"], totals["values"])}
