"""What every metric is: an accumulator over batches, in float64, whose result knows no batches.

# B rows, D d_in, S d_sae
"""

from typing import Protocol

import torch
from torch import Tensor


class Metric(Protocol):
    """update() for each batch, then result(): values by name."""

    def update(self, x_BD: Tensor, latents_BS: Tensor, x_hat_BD: Tensor) -> None:
        """Count one batch. Implementations keep sums only, on the device of the batch."""
        ...

    def result(self) -> dict[str, float]:
        """The values over all rows so far; NaN where the rows do not define one."""
        ...


def to_float64(values: Tensor) -> Tensor:
    """float64, for sums; on the CPU where the device (Apple's) has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def divide(numerator: Tensor | float, denominator: Tensor | float) -> float:
    """The quotient, NaN where the denominator is 0."""
    below = float(denominator)
    return float(numerator) / below if below != 0 else float("nan")


class Scatter:
    """sum ||x - mean||^2 over all rows, with the mean of all rows, from one pass.

    Batches are merged by Chan, Golub and LeVeque's formula: sum ||x||^2 - N ||mean||^2 cancels
    when the mean is large, and a mean per batch would make the result depend on the batch size.
    """

    def __init__(self) -> None:
        self.n_rows = 0
        self._mean_D = torch.zeros(1, dtype=torch.float64)
        self._sum = torch.zeros((), dtype=torch.float64)

    def update(self, x_BD: Tensor) -> None:
        x_BD = to_float64(x_BD)
        if len(x_BD) == 0:
            return
        mean_D = x_BD.mean(dim=0)
        own = (x_BD - mean_D).square().sum()
        total = self.n_rows + len(x_BD)
        if self.n_rows == 0:
            self._mean_D, self._sum = mean_D, own
        else:
            shift_D = mean_D - self._mean_D
            between = shift_D.square().sum() * (self.n_rows * len(x_BD) / total)
            self._sum = self._sum + own + between
            self._mean_D = self._mean_D + shift_D * (len(x_BD) / total)
        self.n_rows = total

    @property
    def total(self) -> float:
        return float(self._sum)


class FractionUnexplained:
    """sum ||x - x_hat||^2 / sum ||x - mean||^2, which two metrics are made of."""

    def __init__(self) -> None:
        self._scatter = Scatter()
        self._error: Tensor | float = 0.0

    def update(self, x_BD: Tensor, latents_BS: Tensor, x_hat_BD: Tensor) -> None:
        self._scatter.update(x_BD)
        self._error = self._error + (to_float64(x_BD) - to_float64(x_hat_BD)).square().sum()

    @property
    def fraction(self) -> float:
        return divide(self._error, self._scatter.total)
