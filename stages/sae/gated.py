"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014, equations 5 to 8).

# B rows, D d_in, S d_sae, V values

One product z = (x - b_dec) W_enc serves both paths: the gate pi = z + b_gate, the magnitude
m = exp(r_mag) z + b_mag (weights tied by r_mag), f = 1[pi > 0] relu(m).
L = ||x - x_hat||^2 + c ||relu(pi)||_1 + ||x - (relu(pi) W_dec + b_dec)||^2, W_dec and b_dec frozen in the
last term. The gate is only trained through relu(pi), so that the penalty shrinks it and not f.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Sae, TrainingPass, squared_error
from .initialise import gaussian_rows


class Gated(Sae):
    """W_enc (D, S), b_gate, b_mag, r_mag (S), W_dec (S, D), b_dec (D)."""

    scaled_by_norm = ("b_gate", "b_mag", "b_dec")

    def __init__(self, *, d_in: int, d_sae: int, k: int | None = None) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, k=k)

    def add_biases(self) -> None:
        self.b_gate = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        self._tie_to(gaussian_rows(self.d_sae, self.d_in, torch.Generator().manual_seed(seed)))

    @torch.no_grad()
    def set_threshold_(self, threshold: float) -> None:
        self.b_gate.fill_(-threshold)

    @property
    def offset(self) -> Tensor | None:
        return None

    def activate(self, pre_BS: Tensor) -> Tensor:
        magnitude_BS = torch.relu(self.r_mag.exp() * pre_BS + self.b_mag)
        return torch.where(pre_BS + self.b_gate > 0, magnitude_BS, 0)

    def training_pass(self, x_BD: Tensor, sparsity: Tensor | float = 0.0) -> TrainingPass:
        centred_BD = self.centred(x_BD)
        pre_BS = self.pre_activations(centred_BD, None)
        open_BS = pre_BS > -self.b_gate.detach().to(pre_BS.dtype)
        support = self.support(pre_BS, centred_BD, None, open_BS)
        z_V = support.encode(centred_BD, self.W_enc, self.encoder_bias(None))
        gate_V = torch.relu(z_V + support.per_latent(self.b_gate))
        scale_V = support.per_latent(self.r_mag.exp())
        magnitude_V = torch.relu(scale_V * z_V + support.per_latent(self.b_mag))
        latents_V = torch.where(gate_V > 0, magnitude_V, 0)
        x_hat_BD = support.decode(latents_V, self.W_dec) + self.b_dec
        by_gate_BD = support.decode(gate_V, self.W_dec.detach()) + self.b_dec.detach()
        l2, gate_l2 = squared_error(x_BD, x_hat_BD), squared_error(x_BD, by_gate_BD)
        penalty = gate_V.sum() / len(x_BD)
        active_V = (latents_V.detach() > 0).to(x_BD.dtype)
        return TrainingPass(
            loss=l2 + sparsity * penalty + gate_l2,
            parts={
                "l2": l2.detach(),
                "sparsity": penalty.detach(),
                "gate_l2": gate_l2.detach(),
            },
            x_hat_BD=x_hat_BD.detach(),
            centred_BD=centred_BD,
            pre_BS=pre_BS,
            fired_S=support.latent_sums(active_V) > 0,
            l0=active_V.sum() / len(x_BD),
        )
