"""Density: the share of rows on which a latent is not 0; summarised over latents.

# B rows, D d_in, S d_sae

`per_latent` is the whole vector; result() gives its 10th, 50th and 90th percentile and its maximum,
because a mean over latents is only L0 / d_sae.
"""

import numpy as np
import torch
from torch import Tensor

QUANTILES = {"density_p10": 0.1, "density_p50": 0.5, "density_p90": 0.9, "density_max": 1.0}


class FiringCounts:
    """Rows on which each latent was not 0."""

    def __init__(self) -> None:
        self.n_rows = 0
        self.rows_fired_S: Tensor | None = None

    def update(self, x_BD: Tensor, latents_BS: Tensor, x_hat_BD: Tensor) -> None:
        fired_S = (latents_BS != 0).sum(dim=0)
        self.rows_fired_S = fired_S if self.rows_fired_S is None else self.rows_fired_S + fired_S
        self.n_rows += len(x_BD)


class Density(FiringCounts):
    @property
    def per_latent(self) -> Tensor:
        """Density of each latent (S), in float64, on the CPU."""
        if self.rows_fired_S is None or self.n_rows == 0:
            return torch.full((1,), torch.nan, dtype=torch.float64)
        return self.rows_fired_S.cpu().double() / self.n_rows

    def result(self) -> dict[str, float]:
        density_S = self.per_latent.numpy()
        return {name: float(np.quantile(density_S, q)) for name, q in QUANTILES.items()}
