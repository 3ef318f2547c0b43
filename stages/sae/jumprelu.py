"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435; Erichson et al. 2019 for the function).

# B rows, D d_in, S d_sae, V values

z = x W_enc + b_enc, f = z H(z - theta), theta (S) a parameter of its own, x_hat = f W_dec + b_dec.
L = ||x - x_hat||^2 + c (L0 / target - 1)^2, with L0 the batch's mean number of z > theta (equation 10
there penalises L0 itself; the target is of its appendix).

H has no useful derivative, so gradients of theta are estimated with a rectangle kernel of width eps
(equations 11 and 12): of f, -(theta / eps) 1[|z - theta| < eps / 2]; of the count,
-(1 / eps) 1[|z - theta| < eps / 2].

With `reference` the count's kernel sees f in place of z, as the reference trainer has it: of the
entries below theta only zeros can be inside it, so half of the kernel is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import Sae, TrainingPass, squared_error
from .support import Support

if TYPE_CHECKING:
    from ..fitconfig import FitConfig


class JumpRelu(Sae):
    """W_enc (D, S), b_enc, threshold (S), W_dec (S, D), b_dec (D).

    A fit does not subtract b_dec; SAEs of other tools that do can be held.
    """

    scaled_by_norm = ("b_enc", "b_dec", "threshold")

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int | None,
        bandwidth: float = 0.001,
        start_threshold: float = 0.001,
        subtract_b_dec: bool = False,
    ) -> None:
        """k: the target; bandwidth: eps; start_threshold: theta at first; subtract_b_dec: whether
        the encoder sees x - b_dec."""
        super().__init__(d_in=d_in, d_sae=d_sae, k=k)
        self.bandwidth, self.start_threshold = bandwidth, start_threshold
        self._subtracts_b_dec = subtract_b_dec

    def add_biases(self) -> None:
        super().add_biases()
        self.threshold = nn.Parameter(torch.zeros(self.d_sae))

    @classmethod
    def options_from(cls, config: FitConfig) -> dict[str, Any]:
        return {"bandwidth": config.bandwidth, "start_threshold": config.start_threshold}

    @property
    def options(self) -> dict[str, Any]:
        options = {"bandwidth": self.bandwidth, "start_threshold": self.start_threshold}
        # Not in the configs of fits, so that they are what they were before there was a choice.
        return options | ({"subtract_b_dec": True} if self._subtracts_b_dec else {})

    @property
    def subtracts_b_dec(self) -> bool:
        return self._subtracts_b_dec

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        super().initialise_(seed)
        self.threshold.fill_(self.start_threshold)

    @torch.no_grad()
    def set_threshold_(self, threshold: float) -> None:
        self.threshold.fill_(threshold)

    def activate(self, pre_BS: Tensor) -> Tensor:
        return torch.where(pre_BS > self.threshold, torch.relu(pre_BS), 0)

    def training_pass(self, x_BD: Tensor, sparsity: Tensor | float = 0.0) -> TrainingPass:
        assert self.k is not None
        centred_BD = self.centred(x_BD)
        pre_BS = self.pre_activations(centred_BD, self.b_enc)
        # Everything that is active or inside the kernel.
        lowest_S = (self.threshold.detach() - self.bandwidth / 2).to(pre_BS.dtype)
        support = self.support(pre_BS, centred_BD, self.b_enc, pre_BS > lowest_S)
        z_V = support.encode(centred_BD, self.W_enc, self.encoder_bias(self.b_enc))
        theta_V = support.per_latent(self.threshold)
        latents_V: Tensor = _Jump.apply(z_V, theta_V, self.bandwidth)  # type: ignore[no-untyped-call]
        x_hat_BD = support.decode(latents_V, self.W_dec) + self.b_dec
        l2 = squared_error(x_BD, x_hat_BD)
        active_V = (z_V > theta_V).detach().to(x_BD.dtype)
        near_S = self._near(z_V.detach(), theta_V.detach(), active_V, support)
        l0: Tensor = _Count.apply(  # type: ignore[no-untyped-call]
            self.threshold,
            self.group.mean(active_V.sum() / len(x_BD)),  # the penalty is no mean over rows
            near_S / len(x_BD),
            self.bandwidth,
        )
        penalty = (l0 / self.k - 1).square()
        return TrainingPass(
            loss=l2 + sparsity * penalty,
            parts={"l2": l2.detach(), "sparsity": penalty.detach()},
            x_hat_BD=x_hat_BD.detach(),
            centred_BD=centred_BD,
            pre_BS=pre_BS,
            fired_S=support.latent_sums(active_V) > 0,
            l0=l0.detach(),
        )

    def _near(self, z_V: Tensor, theta_V: Tensor, active_V: Tensor, support: Support) -> Tensor:
        """How many entries of each latent the count's kernel sees: (S,)."""
        if not self.reference:
            inside_V = _inside(z_V, theta_V, self.bandwidth)
            return support.latent_sums(inside_V.to(z_V.dtype))
        f_V = z_V * active_V
        inside_V = _inside(f_V, theta_V, self.bandwidth) * active_V
        zeros_S = support.n_rows - support.latent_sums(active_V)
        zero_is_inside_S = _inside(torch.zeros_like(self.threshold), self.threshold, self.bandwidth)
        return support.latent_sums(inside_V) + zero_is_inside_S.detach() * zeros_S


def _inside(z_V: Tensor, theta_V: Tensor, bandwidth: float) -> Tensor:
    """1 inside the rectangle |z - theta| / eps < 1/2, else 0."""
    return (((z_V - theta_V) / bandwidth).abs() < 0.5).to(z_V.dtype)


class _Jump(torch.autograd.Function):
    """z H(z - theta), its gradient for theta estimated."""

    @staticmethod
    def forward(ctx: Any, z_V: Tensor, theta_V: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_V, theta_V)
        ctx.bandwidth = bandwidth
        return torch.where(z_V > theta_V, z_V, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z_V, theta_V), eps = ctx.saved_tensors, ctx.bandwidth
        z_grad_V = torch.where(z_V > theta_V, grads[0], 0)
        theta_grad_V = -(theta_V / eps) * _inside(z_V, theta_V, eps) * grads[0]
        return z_grad_V, theta_grad_V.sum_to_size(theta_V.shape), None


class _Count(torch.autograd.Function):
    """The mean number of active latents a row, its gradient for theta estimated."""

    @staticmethod
    def forward(
        ctx: Any, threshold_S: Tensor, l0: Tensor, near_S: Tensor, bandwidth: float
    ) -> Tensor:
        ctx.save_for_backward(near_S)
        ctx.bandwidth = bandwidth
        return l0.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (near_S,) = ctx.saved_tensors
        return -(near_S / ctx.bandwidth) * grads[0], None, None, None
