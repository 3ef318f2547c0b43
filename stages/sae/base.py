"""What all SAEs share: parameters, the encoder product, decoding, and folding the norm factor.

# B rows, D d_in, S d_sae

While it is fitted an SAE sees rows divided by the norm factor; before it is saved the factor is
folded into biases and threshold, so that a loaded one takes raw activations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...storage.errors import InputError
from .initialise import unit_rows

if TYPE_CHECKING:
    from ..fitconfig import FitConfig

NO_THRESHOLD = -1.0  # a threshold that was not estimated yet; real ones are positive


@dataclass(frozen=True)
class TrainingPass:
    """What one pass over a batch gives the trainer. Nothing in it depends on how latents are held.

    reconstruction: the loss term, summed over D and averaged over B
    candidates_BS: activations before selection, which the auxiliary loss picks dead latents from
    fired_S: which latents were active on at least one row
    l0: active latents per row, mean over the batch
    smallest_kept: what the threshold averages; not finite when nothing fired
    """

    x_hat_BD: Tensor
    reconstruction: Tensor
    candidates_BS: Tensor
    fired_S: Tensor
    l0: Tensor
    smallest_kept: Tensor


class Sae(nn.Module, ABC):
    """A sparse autoencoder with W_enc (D, S), b_enc (S), W_dec (S, D), b_dec (D).

    `k` is the L0 asked for; `train_k` is what the next training pass keeps, which differs only
    while k is annealed.
    """

    threshold: Tensor

    def __init__(self, *, d_in: int, d_sae: int, k: int) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.k, self.train_k = d_in, d_sae, k, k
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        # Row-contiguous (S, D): projecting gradients and normalising rows touch whole cache lines.
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        # float32 whatever the weights are: it is an average of minima, and the reference's format.
        self.register_buffer("threshold", torch.tensor(NO_THRESHOLD))

    @classmethod
    def options_from(cls, config: FitConfig) -> dict[str, Any]:
        """Constructor arguments beyond d_in, d_sae and k that a fit's config decides."""
        return {}

    @property
    def options(self) -> dict[str, Any]:
        """The same arguments of this SAE, as its config.json keeps them."""
        return {}

    @classmethod
    def parameter_shapes(cls, d_in: int, d_sae: int) -> Mapping[str, tuple[int, ...]]:
        """Shape of every saved tensor; the sizes of a file are checked against it on loading."""
        return {
            "W_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_in),
            "b_dec": (d_in,),
            "threshold": (),
        }

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        """Decoder rows of unit norm, encoder tied to them, biases 0.

        Drawn on the CPU, so that a seed means the same weights on every device.
        """
        rows_SD = unit_rows(self.d_sae, self.d_in, torch.Generator().manual_seed(seed))
        self.W_dec.copy_(rows_SD)
        self.W_enc.copy_(rows_SD.T)
        self.b_enc.zero_()
        self.b_dec.zero_()
        self.threshold.fill_(NO_THRESHOLD)

    def candidates(self, x_BD: Tensor) -> Tensor:
        """relu((x - b_dec) W_enc + b_enc), without the product that b_dec's gradient would cost.

        d/d b_dec is -W_enc times the column sums of d/d pre: a vector product. Subtracting b_dec
        inside the graph would make autograd form the whole (B, D) gradient of x first, at the
        price of a second encoder product. So x - b_dec is detached (its value is needed: with
        low-precision products a large common mean must go before the product) and b_dec enters
        through a zero whose gradient is right.
        """
        centre_D = self.b_dec.detach()
        bias_S: Tensor = self.b_enc
        if torch.is_grad_enabled() and self.b_dec.requires_grad:
            bias_S = bias_S - (self.b_dec - centre_D) @ self.W_enc.detach()
        return torch.relu(torch.addmm(bias_S, x_BD - centre_D, self.W_enc))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The four parameters alone are a whole SAE whose threshold was not estimated yet.
        state_dict.setdefault(f"{prefix}threshold", self.threshold)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @abstractmethod
    def training_pass(self, x_BD: Tensor) -> TrainingPass:
        """Selection and reconstruction loss of one batch, with gradients; changes no state."""

    @abstractmethod
    def select(self, candidates_BS: Tensor) -> Tensor:
        """Inference: which candidates stay, the others set to 0; row by row."""

    def encode(self, x_BD: Tensor) -> Tensor:
        """Latents of activations (..., D), each row for itself. Raises InputError on another D."""
        if x_BD.shape[-1] != self.d_in:
            raise InputError(
                f"Activations have d_in={x_BD.shape[-1]}, but the SAE expects {self.d_in}. "
                "Pass activations of the model and layer that it was fitted on."
            )
        flat_BD = x_BD.reshape(-1, self.d_in).to(self.W_enc.dtype)
        latents_BS = self.select(self.candidates(flat_BD))
        return latents_BS.reshape(*x_BD.shape[:-1], self.d_sae)

    def decode(self, latents_BS: Tensor) -> Tensor:
        """Reconstruction of activations from latents (..., S)."""
        return latents_BS @ self.W_dec + self.b_dec

    def forward(self, x_BD: Tensor) -> Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x_BD))

    @property
    def is_ready(self) -> bool:
        """Whether inference keeps about k latents a row; needs the threshold where one is used."""
        return True

    @torch.no_grad()
    def fold_norm_factor_(self, norm_factor: float) -> None:
        """From rows divided by the factor to raw rows: what is added to x or f is scaled by it.

        relu((x / c - b) W + e) = relu((x - c b) W + c e) / c, so latents become c times larger and
        the threshold with them, and the decoder keeps its unit rows.
        """
        self.b_enc.mul_(norm_factor)
        self.b_dec.mul_(norm_factor)
        self.threshold.mul_(torch.where(self.threshold < 0, 1.0, norm_factor))


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """||x - x_hat||^2, summed over D and averaged over B."""
    return (x_BD - x_hat_BD).square().sum(dim=-1).mean()
