"""L0: the number of latents that are not 0 on a row, mean over all rows.

# B rows, D d_in, S d_sae
"""

from torch import Tensor

from .base import divide


class L0:
    def __init__(self) -> None:
        self._active: Tensor | int = 0
        self._n_rows = 0

    def update(self, x_BD: Tensor, latents_BS: Tensor, x_hat_BD: Tensor) -> None:
        self._active = self._active + (latents_BS != 0).sum()
        self._n_rows += len(x_BD)

    def result(self) -> dict[str, float]:
        return {"l0": divide(self._active, self._n_rows)}
