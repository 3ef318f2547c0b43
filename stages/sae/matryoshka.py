"""Matryoshka SAE: nested prefixes that each reconstruct (Bussmann et al. 2025, arXiv 2503.17547).

# B rows, D d_in, S d_sae, G groups

Latents are ordered into groups, and x_i = b_dec + sum of the groups up to i must reconstruct x for
every i, so that early latents stay general instead of being absorbed by specific ones. One BatchTopK
selection over all latents; L = (1 / G) sum_i w_i ||x - x_i||^2 with w_i = 1 / G unless given. The
paper sums over prefixes; the double 1 / G is the reference trainer's, which the learning rate, the
auxiliary coefficient and the clipping are tuned to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...storage.errors import InputError
from .base import squared_error
from .batch_topk import BatchTopK
from .groups import group_sizes

if TYPE_CHECKING:
    from ..fitconfig import FitConfig


class Matryoshka(BatchTopK):
    """BatchTopK whose latents form groups of the given sizes, the most general first."""

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int,
        group_sizes: Sequence[int],
        group_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, k=k)
        n_groups = len(group_sizes)
        self.group_sizes = tuple(group_sizes)
        self.group_weights = tuple(group_weights or (1 / n_groups for _ in group_sizes))
        if sum(self.group_sizes) != d_sae or min(self.group_sizes) < 1:
            raise InputError(
                f"The group sizes {list(self.group_sizes)} must be positive and add up to "
                f"d_sae={d_sae}. Pass sizes that divide the latents."
            )
        if len(self.group_weights) != n_groups:
            raise InputError(
                f"There are {n_groups} groups, but {len(self.group_weights)} group weights. "
                "Pass one weight for each group."
            )

    @classmethod
    def options_from(cls, config: FitConfig) -> dict[str, Any]:
        return {
            "group_sizes": group_sizes(config.group_fractions, config.d_sae),
            "group_weights": config.group_weights,
        }

    @property
    def options(self) -> dict[str, Any]:
        return {"group_sizes": list(self.group_sizes), "group_weights": list(self.group_weights)}

    def reconstruct(self, x_BD: Tensor, latents_BS: Tensor) -> tuple[Tensor, Tensor]:
        groups = zip(
            # split, not slices: autograd then joins the gradients once instead of adding G of them
            torch.split(latents_BS, list(self.group_sizes), dim=1),
            torch.split(self.W_dec, list(self.group_sizes), dim=0),
            self.group_weights,
            strict=True,
        )
        x_hat_BD, losses = self.b_dec.expand_as(x_BD), []
        for latents_BG, rows_GD, weight in groups:
            x_hat_BD = x_hat_BD + latents_BG @ rows_GD
            losses.append(weight * squared_error(x_BD, x_hat_BD))
        return torch.stack(losses).mean(), x_hat_BD
