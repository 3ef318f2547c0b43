"""TopK SAE: the k largest activations of each row (Gao et al. 2024, arXiv 2406.04093).

# B rows, D d_in, S d_sae, K kept

f = TopK(relu((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec, loss = ||x - x_hat||^2 plus AuxK
on dead latents. Inference is the same per-row selection; the threshold is estimated all the same
(the mean over rows of each row's smallest kept activation), for formats and tools that need one.
"""

import torch
from torch import Tensor

from .base import Sae, TrainingPass, squared_error


class TopK(Sae):
    """Keeps `k` latents in every row, fewer where fewer are positive."""

    def select(self, candidates_BS: Tensor) -> Tensor:
        return keep_per_row(candidates_BS, self.k)

    def training_pass(self, x_BD: Tensor) -> TrainingPass:
        candidates_BS = self.candidates(x_BD)
        latents_BS = keep_per_row(candidates_BS, self.train_k)
        x_hat_BD = self.decode(latents_BS)
        active_BS = latents_BS.detach() > 0
        return TrainingPass(
            x_hat_BD=x_hat_BD,
            reconstruction=squared_error(x_BD, x_hat_BD),
            candidates_BS=candidates_BS,
            # Kept zeros have not fired: counting them, as the reference does, would call a latent
            # alive that no gradient reaches.
            fired_S=active_BS.any(dim=0),
            l0=active_BS.sum() / len(x_BD),
            smallest_kept=_mean_of_smallest(latents_BS.detach(), active_BS),
        )


def keep_per_row(candidates_BS: Tensor, k: int) -> Tensor:
    """The k largest of each row; everything else 0."""
    index_BK = candidates_BS.detach().topk(k, dim=1, sorted=False).indices
    kept_BS = torch.zeros_like(candidates_BS, dtype=torch.bool).scatter_(1, index_BK, True)
    return candidates_BS.masked_fill(~kept_BS, 0)


def _mean_of_smallest(latents_BS: Tensor, active_BS: Tensor) -> Tensor:
    """Mean over rows of the smallest active latent; rows in which nothing fired do not count."""
    smallest_B = latents_BS.masked_fill(~active_BS, torch.inf).amin(dim=1).float()
    counts_B = smallest_B.isfinite()
    # 0 / 0, when no row counts, is the NaN by which the threshold knows.
    return torch.where(counts_B, smallest_B, 0).sum() / counts_B.sum()
