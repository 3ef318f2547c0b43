"""BatchTopK SAE: the k * B largest activations of a batch (Bussmann et al. 2024, arXiv 2412.06410).

# B rows, D d_in, S d_sae, N kept entries

Rows that need more latents get them from rows that need fewer. At inference a row cannot borrow
from others: a latent stays when it exceeds the threshold averaged during the fit.
"""

import torch
from torch import Tensor

from .base import Sae, TrainingPass, squared_error


class BatchTopK(Sae):
    """Keeps `k` latents a row on average over a batch, and what exceeds the threshold later."""

    def select(self, candidates_BS: Tensor) -> Tensor:
        return torch.where(candidates_BS > self.threshold, candidates_BS, 0)

    @property
    def is_ready(self) -> bool:
        return bool(self.threshold >= 0)

    def training_pass(self, x_BD: Tensor) -> TrainingPass:
        candidates_BS = self.candidates(x_BD)
        latents_BS = keep_per_batch(candidates_BS, self.train_k)
        reconstruction, x_hat_BD = self.reconstruct(x_BD, latents_BS)
        latents_BS = latents_BS.detach()
        active_BS = latents_BS > 0
        return TrainingPass(
            x_hat_BD=x_hat_BD,
            reconstruction=reconstruction,
            candidates_BS=candidates_BS,
            fired_S=active_BS.any(dim=0),
            l0=active_BS.sum() / len(x_BD),
            # Infinite when nothing fired, by which the threshold knows.
            smallest_kept=latents_BS.masked_fill(~active_BS, torch.inf).amin(),
        )

    def reconstruct(self, x_BD: Tensor, latents_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction loss and x_hat; Matryoshka has a loss for each prefix instead."""
        x_hat_BD = self.decode(latents_BS)
        return squared_error(x_BD, x_hat_BD), x_hat_BD


def keep_per_batch(candidates_BS: Tensor, k: int) -> Tensor:
    """The k * B largest of the whole batch; everything else 0."""
    flat = candidates_BS.detach().flatten()
    index_N = flat.topk(k * len(candidates_BS), sorted=False).indices
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, index_N, True)
    return candidates_BS.masked_fill(~kept.view_as(candidates_BS), 0)
