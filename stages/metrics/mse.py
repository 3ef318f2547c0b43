"""Mean squared error: sum ||x - x_hat||^2 / (N d_in), the mean over rows and dimensions.

# B rows, D d_in, S d_sae, N all rows
"""

from torch import Tensor

from .base import divide, to_float64


class Mse:
    def __init__(self) -> None:
        self._error: Tensor | float = 0.0
        self._n_values = 0

    def update(self, x_BD: Tensor, latents_BS: Tensor, x_hat_BD: Tensor) -> None:
        self._error = self._error + (to_float64(x_BD) - to_float64(x_hat_BD)).square().sum()
        self._n_values += x_BD.numel()

    def result(self) -> dict[str, float]:
        return {"mse": divide(self._error, self._n_values)}
