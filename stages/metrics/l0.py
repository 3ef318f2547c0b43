"""L0: the number of latents that are not 0 on a row, mean over all rows. In latents."""

from collections.abc import Mapping

from torch import Tensor

from .base import to_float64
from .rows import Floats, RowBatch, SumMetric, ratio


class L0(SumMetric):
    definition = "mean over rows of the number of latents that are not 0"
    summed = ("active",)

    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        return {"active": to_float64(batch.latents.counts_B)}

    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"l0": ratio(totals["active"], totals["n_rows"])}
