"""SAEBench's own variants, for matching published numbers; not for judging.

# B rows, D d_in, b the batches, N all rows

    compat_saebench_explained_variance         1 - mean ||x - x_hat||^2 / (mean ||x||^2 - sum_d (mean x_d^2)^2)
        as of version 0.6: what is squared and summed over dimensions is the mean of x_d^2 where the
        mean of x_d was meant. Depends on the scale of the activations.
    compat_saebench_explained_variance_legacy  mean over rows of 1 - ||x - x_hat||^2 / ||x - mean_b||^2
        with the mean of the row's batch. A mean of ratios: rows near the mean dominate it.
    compat_saebench_mse                        mean over rows of ||x - x_hat||^2 / (rows of the batch)
        divided by the number of tokens twice, so that it is smaller the larger the batches.

Batches are of 2,048 rows (16 prompts of 128 tokens, less the special ones there), in order of the
rows, whatever is read at once here. `explained_variance` and `mse_per_token` are what these would be.
The legacy variant and the MSE are from reading SAEBench's core evaluation; that of version 0.6 is
from a description and a measurement (0.869 where the centred value is 0.128). No code is taken.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..evaluation.bootstrap import valued
from .base import Direction, MetricResult
from .rows import Moments, RowBatch

BATCH_ROWS = 2048


class CompatSaebench:
    """Keeps sums, and the rows of the batch that is not full yet."""

    definition: ClassVar[str] = "SAEBench 0.6.0's own variants of explained variance and MSE"
    direction: ClassVar[Direction] = "none"
    version: ClassVar[int] = 1

    def __init__(self) -> None:
        self._n_rows = 0
        self._error: Tensor | float = 0.0
        self._squares_D: Tensor | float = 0.0
        self._legacy = self._mse = 0.0
        self._rest: list[tuple[Tensor, Tensor]] = []  # x (B, D) and error (B,)

    @property
    def options(self) -> dict[str, Any]:
        return {"batch_rows": BATCH_ROWS}

    def observe(self, batch: RowBatch) -> None:
        x_BD, error_B = batch.rows.x64_BD, batch.error_B
        self._n_rows += len(x_BD)
        self._error = self._error + error_B.sum()
        self._squares_D = self._squares_D + x_BD.square().sum(dim=0)
        while len(x_BD):
            room = BATCH_ROWS - sum(len(x) for x, _ in self._rest)
            self._rest.append((x_BD[:room], error_B[:room]))
            x_BD, error_B = x_BD[room:], error_B[room:]
            if sum(len(x) for x, _ in self._rest) == BATCH_ROWS:
                legacy, mse = self._of_rest()
                self._legacy, self._mse = self._legacy + legacy, self._mse + mse
                self._rest = []

    def _of_rest(self) -> tuple[float, float]:
        """Sums over the rows of one batch of the two values that depend on batches."""
        if not self._rest:
            return 0.0, 0.0
        x_BD = torch.cat([x for x, _ in self._rest])
        error_B = torch.cat([error for _, error in self._rest])
        total_B = (x_BD - x_BD.mean(dim=0)).square().sum(dim=1)
        return float((1 - error_B / total_B).sum()), float(error_B.sum() / len(x_BD))

    def values(self, data: Moments) -> dict[str, float]:
        nan, n = float("nan"), self._n_rows
        if n == 0:
            return dict.fromkeys(_NAMES, nan)
        mean_square_D = torch.as_tensor(self._squares_D) / n
        total = float(mean_square_D.sum() - mean_square_D.square().sum())
        legacy, mse = self._of_rest()
        variance = 1 - float(self._error) / n / total if total != 0 else nan
        return dict(
            zip(_NAMES, (variance, (self._legacy + legacy) / n, (self._mse + mse) / n), strict=True)
        )

    def result(self, data: Moments, *, seed: int) -> MetricResult:
        values = self.values(data)
        found = {name: valued(value) for name, value in values.items()}
        return MetricResult(
            values=found, sample={"rows": self._n_rows}, interval="none: not defined by documents"
        )


_NAMES = (
    "compat_saebench_explained_variance",
    "compat_saebench_explained_variance_legacy",
    "compat_saebench_mse",
)
