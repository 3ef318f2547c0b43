"""ReLU SAE with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity"; and its April 2024
update, "Update on how we train SAEs", transformer-circuits.pub).

# B rows, D d_in, S d_sae, V values

decoder_norm "unit": f = relu((x - b_dec) W_enc + b_enc), L = ||x - x_hat||^2 + c ||f||_1, decoder rows
held at unit norm. "free" (April): f = relu(x W_enc + b_enc), L = ||x - x_hat||^2 + c sum_s f_s ||W_dec,s||,
decoder rows as they come, gradients clipped. In both rows start at norm 0.1, encoder tied to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Sae, TrainingPass, squared_error
from .initialise import gaussian_rows
from .recipe import DECODER_NORMS
from .support import Support

if TYPE_CHECKING:
    from ..fitconfig import FitConfig

_START_NORM = 0.1


class Relu(Sae):
    """Latents are what is positive; how many follows from the coefficient of the penalty."""

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int | None = None,
        decoder_norm: str = "unit",
        subtract_b_dec: bool = True,
    ) -> None:
        """decoder_norm: one of DECODER_NORMS; subtract_b_dec: whether the encoder sees x - b_dec."""
        if decoder_norm not in DECODER_NORMS:
            raise ValueError(f"decoder_norm {decoder_norm!r}")
        super().__init__(d_in=d_in, d_sae=d_sae, k=k)
        self.decoder_norm, self._subtracts_b_dec = decoder_norm, subtract_b_dec

    @classmethod
    def options_from(cls, config: FitConfig) -> dict[str, Any]:
        # The reference's trainer of the April variant subtracts b_dec, the publication does not.
        subtract_b_dec = config.decoder_norm == "unit" or config.reference
        return {"decoder_norm": config.decoder_norm, "subtract_b_dec": subtract_b_dec}

    @property
    def options(self) -> dict[str, Any]:
        return {"decoder_norm": self.decoder_norm, "subtract_b_dec": self._subtracts_b_dec}

    @property
    def subtracts_b_dec(self) -> bool:
        return self._subtracts_b_dec

    @property
    def has_unit_rows(self) -> bool:
        return self.decoder_norm == "unit"

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        rows_SD = gaussian_rows(self.d_sae, self.d_in, torch.Generator().manual_seed(seed))
        self._tie_to(rows_SD * _START_NORM)

    def activate(self, pre_BS: Tensor) -> Tensor:
        return torch.relu(pre_BS)

    def penalty(self, latents_V: Tensor, support: Support) -> Tensor:
        """The sparsity term of a batch before its coefficient."""
        if not self.has_unit_rows:
            latents_V = latents_V * support.per_latent(self.W_dec.norm(dim=1))
        return latents_V.sum() / support.n_rows

    def more_parts(self, latents_V: Tensor, support: Support) -> dict[str, Tensor]:
        """What else a pass measures; of detached latents."""
        return {}

    def training_pass(self, x_BD: Tensor, sparsity: Tensor | float = 0.0) -> TrainingPass:
        centred_BD = self.centred(x_BD)
        pre_BS = self.pre_activations(centred_BD, self.b_enc)
        support = self.support(pre_BS, centred_BD, self.b_enc, pre_BS > 0)
        bias_S = self.encoder_bias(self.b_enc)
        latents_V = torch.relu(support.encode(centred_BD, self.W_enc, bias_S))
        x_hat_BD = support.decode(latents_V, self.W_dec) + self.b_dec
        l2, penalty = squared_error(x_BD, x_hat_BD), self.penalty(latents_V, support)
        latents_V = latents_V.detach()
        active_V = (latents_V > 0).to(x_BD.dtype)
        parts = {"l2": l2.detach(), "sparsity": penalty.detach()}
        return TrainingPass(
            loss=l2 + sparsity * penalty,
            parts=parts | self.more_parts(latents_V, support),
            x_hat_BD=x_hat_BD.detach(),
            centred_BD=centred_BD,
            pre_BS=pre_BS,
            fired_S=support.latent_sums(active_V) > 0,
            l0=active_V.sum() / len(x_BD),
        )
