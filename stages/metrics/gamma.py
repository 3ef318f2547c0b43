"""Gamma, relative reconstruction bias: sum ||x_hat||^2 / sum x . x_hat, pooled over all rows.

# B rows, D d_in, S d_sae

The factor by which the best rescaling of x_hat would divide it (Rajamanoharan et al. 2024, arXiv
2404.16014): below 1, reconstructions are too small (shrinkage).
"""

from torch import Tensor

from .base import divide, to_float64


class Gamma:
    def __init__(self) -> None:
        self._power: Tensor | float = 0.0
        self._overlap: Tensor | float = 0.0

    def update(self, x_BD: Tensor, latents_BS: Tensor, x_hat_BD: Tensor) -> None:
        x_BD, x_hat_BD = to_float64(x_BD), to_float64(x_hat_BD)
        self._power = self._power + x_hat_BD.square().sum()
        self._overlap = self._overlap + (x_BD * x_hat_BD).sum()

    def result(self) -> dict[str, float]:
        return {"gamma": divide(self._power, self._overlap)}
