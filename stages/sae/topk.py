"""TopK SAE: the k largest activations of each row (Gao et al. 2024, arXiv 2406.04093).

# B rows, D d_in, S d_sae, K kept a row, N = B K entries

f = TopK(relu((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec, loss = ||x - x_hat||^2 plus AuxK
on dead latents. Inference is the same per-row selection; the threshold is estimated all the same
(the mean over rows of each row's smallest kept activation), for formats and tools that need one.
With MultiTopK (appendix A.3 there) the loss is L(k) + w L(4k), which keeps reconstructions from
more latents than k good; the paper's w is 1/8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import squared_error
from .ksparse import Kept, KSparse
from .selection import largest_of_rows
from .support import SparseSupport

if TYPE_CHECKING:
    from ..fitconfig import FitConfig

_MULTI = 4  # times k


class TopK(KSparse):
    """Keeps `k` latents in every row, fewer where fewer are positive."""

    def __init__(self, *, d_in: int, d_sae: int, k: int, multi_topk: float = 0.0) -> None:
        """multi_topk: w above; 0 is plain TopK."""
        super().__init__(d_in=d_in, d_sae=d_sae, k=k)
        self.multi_topk = multi_topk

    @classmethod
    def options_from(cls, config: FitConfig) -> dict[str, Any]:
        return {"multi_topk": config.multi_topk}

    @property
    def options(self) -> dict[str, Any]:
        return {"multi_topk": self.multi_topk}

    @property
    def is_ready(self) -> bool:
        return True

    def activate(self, pre_BS: Tensor) -> Tensor:
        top = torch.relu(pre_BS).topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(pre_BS).scatter(1, top.indices, top.values)

    def largest(self, pre_BS: Tensor, k: int) -> Tensor:
        # Which of equal zeros is kept only counts for the reference, where it counts as fired.
        return largest_of_rows(torch.relu(pre_BS) if self.reference else pre_BS, k)

    def fired(self, support: SparseSupport, active_N: Tensor) -> Tensor:
        # Kept zeros have not fired: counting them, as the reference does, would call a latent
        # alive that no gradient reaches.
        return super().fired(support, torch.ones_like(active_N) if self.reference else active_N)

    def smallest_kept(self, latents_N: Tensor, n_rows: int) -> Tensor:
        """Mean over rows of the smallest active latent; rows in which nothing fired do not count."""
        latents_BK = latents_N.view(n_rows, -1)
        smallest_B = torch.where(latents_BK > 0, latents_BK, torch.inf).amin(dim=1).float()
        counts_B = smallest_B.isfinite()
        # 0 / 0, when no row counts, is the NaN by which the threshold knows.
        sums = torch.stack([torch.where(counts_B, smallest_B, 0), counts_B.float()]).sum(dim=1)
        total, count = self.group.sum(sums).unbind()
        return total / count

    def reconstruct(self, x_BD: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        loss, x_hat_BD = super().reconstruct(x_BD, kept)
        if self.multi_topk:
            more = self.keep(
                kept.pre_BS, self.centred(x_BD), min(_MULTI * self.train_k, self.d_sae)
            )
            more_BD = more.support.decode(more.latents_N, self.W_dec) + self.b_dec
            loss = loss + self.multi_topk * squared_error(x_BD, more_BD)
        return loss, x_hat_BD
