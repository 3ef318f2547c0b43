"""L1: the sum of a row's absolute latents, mean over all rows. In units of the latents.

Latents are those of the saved SAE. Where decoder rows are not of unit norm (relu, variant free) a
latent's unit is its own.
"""

from collections.abc import Mapping

from torch import Tensor

from .rows import Floats, RowBatch, SumMetric, ratio


class L1(SumMetric):
    definition = "mean over rows of the sum of absolute latents"
    summed = ("absolute",)

    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        return {"absolute": batch.latents.row_sums(batch.latents.values_N.abs())}

    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"l1": ratio(totals["absolute"], totals["n_rows"])}
