"""Resampling of dead latents, for ReLU SAEs (Bricken et al. 2023, "Neuron resampling").

# B rows, D d_in, S d_sae

Every so many steps, latents that have not fired for half as many become rows that are reconstructed
badly: drawn from the batch with a probability proportional to the squared error, their direction
becomes the decoder row, the encoder column is the row scaled to a fifth of the mean norm of the
living ones, the bias 0, and Adam forgets them. The reference trainer draws in proportion to the
error itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...storage.counter import stream_key

if TYPE_CHECKING:
    from .base import Sae

_SHARE_OF_NORM = 0.2


class Resampler:
    """Counts steps since each latent fired, and resamples after every `every` steps."""

    def __init__(self, sae: Sae, every: int, seed: int, device: torch.device) -> None:
        self._sae, self._every, self._seed = sae, every, seed
        self.steps_since_fired_S = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)

    def observe_(self, fired_S: Tensor) -> None:
        """Count one pass."""
        self.steps_since_fired_S.add_(1).masked_fill_(fired_S, 0)

    @torch.no_grad()
    def after_step_(self, step: int, x_BD: Tensor) -> Tensor:
        """Resample if this step is one to do it after; which latents were."""
        none = self.steps_since_fired_S[:0]
        if step == 0 or step % self._every:
            return none
        sae = self._sae
        dead_N = (self.steps_since_fired_S > self._every / 2).nonzero().squeeze(1)
        n_alive = sae.d_sae - len(dead_N)
        if len(dead_N) == 0 or n_alive == 0:
            return none
        alive_norm = self._norm_of_living(dead_N)
        dead_N = dead_N[: len(x_BD)]
        rows_ND = x_BD[self._draw(step, x_BD, len(dead_N)).to(x_BD.device)]
        sae.W_dec[dead_N] = rows_ND / rows_ND.norm(dim=1, keepdim=True)
        sae.W_enc[:, dead_N] = (rows_ND * alive_norm * _SHARE_OF_NORM).T
        sae.b_enc[dead_N] = 0
        return dead_N

    def _norm_of_living(self, dead_N: Tensor) -> Tensor:
        alive_S = torch.ones_like(self.steps_since_fired_S, dtype=torch.bool)
        alive_S[dead_N] = False
        norms_S: Tensor = self._sae.W_enc[:, alive_S].norm(dim=0)
        return norms_S.mean()

    def _draw(self, step: int, x_BD: Tensor, count: int) -> Tensor:
        """Rows of the batch without replacement, a function of the seed and the step alone."""
        error_B = (x_BD - self._sae(x_BD)).norm(dim=1).double().cpu()
        weights_B = error_B if self._sae.reference else error_B.square()
        key = stream_key(self._seed, "resample", step) >> 1  # torch's seeds have 63 bits
        generator = torch.Generator().manual_seed(int(key))
        drawn: Tensor = torch.multinomial(weights_B.clamp_min(1e-30), count, generator=generator)
        return drawn

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a later resampling depends on."""
        return {"steps_since_fired": self.steps_since_fired_S}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up another's state."""
        self.steps_since_fired_S = state["steps_since_fired"].clone()
