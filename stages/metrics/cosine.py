"""Cosine: x . x_hat / (||x|| ||x_hat||) of a row, mean over all rows.

No unit. A row whose x or x_hat is 0 counts as 0. Activations with a large mean have a large cosine
with any reconstruction that has it too: explained variance is what is left without the mean.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .rows import Floats, RowBatch, SumMetric, ratio


class Cosine(SumMetric):
    definition = "mean over rows of x . x_hat / (||x|| ||x_hat||)"
    direction = "up"
    summed = ("cosine",)

    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        norms_B = batch.rows.x64_BD.norm(dim=1) * batch.x_hat64_BD.norm(dim=1)
        defined_B = norms_B > 0
        cosine_B = torch.where(
            defined_B, batch.overlap_B / torch.where(defined_B, norms_B, 1.0), 0.0
        )
        return {"cosine": cosine_B}

    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"cosine": ratio(totals["cosine"], totals["n_rows"])}
