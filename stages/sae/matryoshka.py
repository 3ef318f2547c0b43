"""Matryoshka SAE: nested prefixes that each reconstruct (Bussmann et al. 2025, arXiv 2503.17547).

# B rows, D d_in, S d_sae, G groups, N kept entries

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
from .batch_topk import BatchTopK
from .groups import group_sizes
from .ksparse import Kept

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
        self._groups: tuple[Tensor, Tensor] | None = None
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

    def reconstruct(self, x_BD: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        support, n_groups = kept.support, len(self.group_sizes)
        ends_G, weights_G = self._groups_on(x_BD)
        group_N = torch.bucketize(support.latent_N, ends_G, right=True)
        bag_N = support.row_N * n_groups + group_N  # ascending: latents ascend in each row
        parts = support.decode_to(kept.latents_N, self.W_dec, bag_N, len(x_BD) * n_groups)
        loss, x_hat_BD = nested_error(
            parts.view(len(x_BD), n_groups, self.d_in), x_BD, self.b_dec, weights_G
        )
        return loss, x_hat_BD

    def _groups_on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where groups end, and the weights of their prefixes' losses; made once for a device."""
        found = self._groups
        if found is None or found[0].device != like.device:
            ends = torch.tensor(self.group_sizes, device=like.device).cumsum(0)
            weights = torch.tensor(self.group_weights, dtype=torch.float64) / len(ends)
            found = self._groups = ends, weights.to(like)
        return found


def nested_error(
    parts_BGD: Tensor, x_BD: Tensor, b_dec_D: Tensor, weights_G: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_i w_i ||x - b_dec - (parts up to i)||^2, averaged over B, and the last reconstruction.

    The parts are used up: their memory becomes that of the errors.
    The gradient of part j is one suffix sum: -2 / B sum of w_i times the error of prefix i, i >= j.
    """
    loss, x_hat_BD = _NestedError.apply(parts_BGD, x_BD, b_dec_D, weights_G)  # type: ignore[no-untyped-call]
    return loss, x_hat_BD


class _NestedError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts_BGD: Tensor, x_BD: Tensor, b_dec_D: Tensor, weights_G: Tensor
    ) -> tuple[Tensor, Tensor]:
        errors_BGD = parts_BGD  # in their memory: fresh pages cost more than all of this
        error_BD, losses = x_BD - b_dec_D, []
        for group in range(parts_BGD.shape[1]):
            error_BD = torch.sub(error_BD, parts_BGD[:, group], out=errors_BGD[:, group])
            losses.append(torch.linalg.vector_norm(error_BD).square())
        ctx.save_for_backward(errors_BGD, weights_G)
        x_hat_BD = x_BD - error_BD
        ctx.mark_non_differentiable(x_hat_BD)
        return (torch.stack(losses) * weights_G).sum() / len(x_BD), x_hat_BD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        errors_BGD, weights_G = ctx.saved_tensors
        scale_G = weights_G * (-2 * grads[0] / len(errors_BGD))
        # Summed from the last prefix to the first, in the memory of the errors.
        gradients_BGD = errors_BGD.mul_(scale_G[:, None])
        for group in range(len(scale_G) - 2, -1, -1):
            gradients_BGD[:, group] += gradients_BGD[:, group + 1]
        return gradients_BGD, None, gradients_BGD[:, 0].sum(dim=0), None
