"""What the SAEs share that keep k latents a row: selection, threshold, bookkeeping.

# B rows, D d_in, S d_sae, N kept entries

Candidates are relu((x - b_dec) W_enc + b_enc). Training keeps the largest, of each row or of the
batch; batch-wise selection needs the other rows, so that at inference a latent is kept when it
exceeds a threshold that was averaged during the fit.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Sae, TrainingPass, squared_error
from .initialise import geometric_median
from .support import SparseSupport

NO_THRESHOLD = -1.0  # a threshold that was not estimated yet; real ones are positive


@dataclass(frozen=True)
class Kept:
    """The entries that a pass keeps, with their latents (N); and what they were chosen from."""

    support: SparseSupport
    latents_N: Tensor
    pre_BS: Tensor


class KSparse(Sae):
    """`k` is the L0 asked for; `train_k` what the next training pass keeps, which differs only
    while k is annealed."""

    k: int
    threshold: Tensor

    def __init__(self, *, d_in: int, d_sae: int, k: int) -> None:
        if k is None:  # in a config.json from elsewhere
            raise ValueError("k is missing")
        super().__init__(d_in=d_in, d_sae=d_sae, k=k)
        self.train_k = k
        # float32 whatever the weights are: it is an average of minima, and the reference's format.
        self.register_buffer("threshold", torch.tensor(NO_THRESHOLD))

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        super().initialise_(seed)
        self.threshold.fill_(NO_THRESHOLD)

    @torch.no_grad()
    def start_from(self, x_BD: Tensor) -> None:
        """b_dec becomes the geometric median of the first batch."""
        whole_BD = self.group.gather(x_BD).flatten(0, 1)
        self.b_dec.copy_(geometric_median(whole_BD))

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *rest: object
    ) -> None:
        # The four parameters alone are a whole SAE whose threshold was not estimated yet.
        state_dict.setdefault(f"{prefix}threshold", self.threshold)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @abstractmethod
    def largest(self, pre_BS: Tensor, k: int) -> Tensor:
        """Ascending flat indices of the entries that training keeps."""

    def smallest_kept(self, latents_N: Tensor, n_rows: int) -> Tensor:
        """Of a batch: what the threshold averages. Infinite when nothing fired."""
        return torch.where(latents_N > 0, latents_N, torch.inf).amin()

    def reconstruct(self, x_BD: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """The reconstruction loss and x_hat; Matryoshka has a loss for each prefix instead."""
        x_hat_BD = kept.support.decode(kept.latents_N, self.W_dec) + self.b_dec
        return squared_error(x_BD, x_hat_BD), x_hat_BD

    def keep(self, pre_BS: Tensor, centred_BD: Tensor, k: int) -> Kept:
        """The largest entries and their latents, with gradients."""
        support = self.entries(pre_BS, centred_BD, self.b_enc, self.largest(pre_BS, k))
        bias_S = self.encoder_bias(self.b_enc)
        latents_N = torch.relu(support.encode(centred_BD, self.W_enc, bias_S))
        return Kept(support, latents_N, pre_BS)

    def training_pass(self, x_BD: Tensor, sparsity: Tensor | float = 0.0) -> TrainingPass:
        centred_BD = self.centred(x_BD)
        pre_BS = self.pre_activations(centred_BD, self.b_enc)
        kept = self.keep(pre_BS, centred_BD, self.train_k)
        loss, x_hat_BD = self.reconstruct(x_BD, kept)
        latents_N = kept.latents_N.detach()
        active_N = (latents_N > 0).to(latents_N.dtype)
        none_fired = len(latents_N) == 0
        return TrainingPass(
            loss=loss,
            parts={"l2": loss.detach()},
            x_hat_BD=x_hat_BD.detach(),
            centred_BD=centred_BD,
            pre_BS=pre_BS,
            fired_S=self.fired(kept.support, active_N),
            l0=active_N.sum() / len(x_BD),
            smallest_kept=latents_N.new_full((), torch.inf)
            if none_fired
            else self.smallest_kept(latents_N, len(x_BD)),
        )

    def fired(self, support: SparseSupport, active_N: Tensor) -> Tensor:
        """Which latents count as active on at least one row."""
        return support.latent_sums(active_N) > 0

    @property
    def is_ready(self) -> bool:
        return bool(self.threshold >= 0)

    @torch.no_grad()
    def set_threshold_(self, threshold: float) -> None:
        self.threshold.fill_(threshold)

    @torch.no_grad()
    def fold_norm_factor_(self, norm_factor: float) -> None:
        super().fold_norm_factor_(norm_factor)
        self.threshold.mul_(torch.where(self.threshold < 0, 1.0, norm_factor))
