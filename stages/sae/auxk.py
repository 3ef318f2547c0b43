"""AuxK: dead latents learn to explain the residual (Gao et al. 2024, appendix A.2).

# B rows, D d_in, S d_sae, N dead latents

The k_aux largest candidates of dead latents in each row, decoded without bias, against the detached
residual; the squared error is divided by the residual's variance around its batch mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..parallel import ALONE, Group
from .asking import may_ask
from .base import squared_error
from .selection import largest_of_rows
from .support import DENSE_SHARE, FullSupport, entries_at, flat_nonzero, rows_of
from .whole_batch import spread_and_size

if TYPE_CHECKING:
    from .base import Sae, TrainingPass

# Share of all latents from which on whole matrices are the less work on a GPU, by whether they are
# bfloat16: an entry moves 4 * d_in bytes for each 2 * d_in operations of a product, and a current GPU
# does 10 to 20 of float32, 200 of bfloat16 in the time of a byte. Estimated, not measured.
_FULL_FROM = {False: 0.05, True: 0.01}


def auxk_loss(
    sae: Sae, passed: TrainingPass, residual_BD: Tensor, dead_S: Tensor, k_aux: int
) -> Tensor:
    """The normalised auxiliary loss; 0 when nothing is dead or the residual has no variance.

    passed: of the same batch, whose pre-activations nothing has overwritten.
    """
    residual_BD = residual_BD.detach()
    if not may_ask(residual_BD):
        x_hat_BD = behind_a_mask(sae, passed, dead_S, k_aux)
        return normalised_error(residual_BD, x_hat_BD, dead_S.any(), sae.group)
    # Asking a CPU how many are dead costs nothing, and they are few: work on them only.
    dead_N = dead_S.nonzero().squeeze(1)
    if len(dead_N) == 0:
        return residual_BD.new_zeros(())
    x_hat_BD = of_the_dead(sae, passed, dead_N, k_aux)
    return normalised_error(residual_BD, x_hat_BD, dead_S.any(), sae.group)


def of_the_dead(sae: Sae, passed: TrainingPass, dead_N: Tensor, k_aux: int) -> Tensor:
    """What the dead latents reconstruct, by their columns alone."""
    w_enc_DN = rows_of(sae.W_enc.T, dead_N).T
    bias_N = sae.encoder_bias(sae.b_enc)[dead_N]
    if sae.low_precision:  # the values are asked for in full precision
        pre_BN = torch.addmm(bias_N.detach(), passed.centred_BD, w_enc_DN.detach())
        pre_BN = pre_BN.to(bias_N.dtype)  # autocast may have made it bfloat16
    else:
        pre_BN = passed.pre_BS.index_select(1, dead_N)
    w_dec_ND = rows_of(sae.W_dec, dead_N)
    kept_BN = largest_positive(pre_BN, k_aux)
    if torch.count_nonzero(kept_BN) > DENSE_SHARE * kept_BN.numel():
        values_BN = pre_BN.mul_(kept_BN)
        x_hat_BD: Tensor = _Dense.apply(w_enc_DN.T, bias_N, w_dec_ND, values_BN, passed.centred_BD)  # type: ignore[no-untyped-call]
        return x_hat_BD
    support = entries_at(pre_BN, flat_nonzero(kept_BN))
    values_N = torch.relu(support.encode(passed.centred_BD, w_enc_DN, bias_N))
    return support.decode(values_N, w_dec_ND)


def largest_positive(pre_BN: Tensor, k: int) -> Tensor:
    """Which entries are positive and among the k largest of their row: bool (B, N). For a CPU."""
    if k >= pre_BN.shape[1]:
        return pre_BN > 0
    # The k-th largest of each row by numpy, in less than half the processor time of torch's topk.
    place = pre_BN.shape[1] - k
    limit_B1 = np.partition(pre_BN.numpy(), place, axis=1)[:, place, None]
    kept_BN = (pre_BN >= torch.from_numpy(limit_B1)).logical_and_(pre_BN > 0)
    tied_B = kept_BN.sum(dim=1) > k
    if tied_B.any():
        index_RK = pre_BN[tied_B].topk(k, dim=1, sorted=False).indices
        kept_BN[tied_B] &= torch.zeros_like(kept_BN[tied_B]).scatter_(1, index_RK, True)
    return kept_BN


class _Dense(torch.autograd.Function):
    """values @ W_dec for values = relu(x W_enc + bias) that are known already, 0 what is not kept.

    The four products and nothing beside them; in the type that autocast gives the first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w_enc_ND: Tensor,
        bias_N: Tensor,
        w_dec_ND: Tensor,
        values_BN: Tensor,
        x_BD: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(w_dec_ND, values_BN, x_BD)
        return values_BN @ w_dec_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BD,), (w_dec_ND, values_BN, x_BD) = grads, ctx.saved_tensors
        of_products, own = grad_BD.dtype, w_dec_ND.dtype
        grad_BN = _where_positive(grad_BD @ w_dec_ND.to(of_products).T, values_BN)
        w_enc_grad_ND = grad_BN.T @ x_BD.to(of_products)
        w_dec_grad_ND = values_BN.to(of_products).T @ grad_BD
        bias_grad_N = grad_BN.to(own).sum(dim=0)
        return w_enc_grad_ND.to(own), bias_grad_N, w_dec_grad_ND.to(own), None, None


def _where_positive(grad_BN: Tensor, values_BN: Tensor) -> Tensor:
    """The gradient of relu: ten times as fast as a mask and `where`, which are not vectorised."""
    gradient: Tensor = torch.ops.aten.threshold_backward(grad_BN, values_BN.to(grad_BN.dtype), 0)
    return gradient


def behind_a_mask(sae: Sae, passed: TrainingPass, dead_S: Tensor, k_aux: int) -> Tensor:
    """The same without asking how many are dead, which would make a GPU wait in every step."""
    # Values that were only made to choose by are not what whole matrices should be made of.
    exact = sae.low_products == sae.low_precision
    if exact and k_aux > _FULL_FROM[sae.low_products] * sae.d_sae:
        return by_matrices(sae, passed, dead_S, k_aux)
    return by_entries(sae, passed, dead_S, k_aux)


def by_entries(sae: Sae, passed: TrainingPass, dead_S: Tensor, k_aux: int) -> Tensor:
    """Behind a mask, entry by entry."""
    candidates_BS = torch.where(dead_S, passed.pre_BS, -torch.inf)
    flat_N = largest_of_rows(candidates_BS, min(k_aux, sae.d_sae))
    support = sae.entries(passed.pre_BS, passed.centred_BD, sae.b_enc, flat_N)
    bias_S = sae.encoder_bias(sae.b_enc)
    values_N = torch.relu(support.encode(passed.centred_BD, sae.W_enc, bias_S))
    # Where fewer are dead than k_aux, others are among the largest.
    values_N = torch.where(support.per_latent(dead_S), values_N, 0)
    return support.decode(values_N, sae.W_dec)


def by_matrices(sae: Sae, passed: TrainingPass, dead_S: Tensor, k_aux: int) -> Tensor:
    """Behind a mask, by products of whole matrices."""
    candidates_BS = torch.where(dead_S, passed.pre_BS, -torch.inf)
    index_BK = candidates_BS.topk(min(k_aux, sae.d_sae), dim=1, sorted=False).indices
    kept_BS = torch.zeros_like(candidates_BS, dtype=torch.bool).scatter_(1, index_BK, True)
    kept_BS &= candidates_BS > 0
    support = FullSupport(passed.pre_BS.to(sae.W_dec.dtype), low_products=sae.low_products)
    bias_S = sae.encoder_bias(sae.b_enc)
    values_BS = torch.where(kept_BS, support.encode(passed.centred_BD, sae.W_enc, bias_S), 0)
    return support.decode(values_BS, sae.W_dec)


def normalised_error(
    residual_BD: Tensor, x_hat_BD: Tensor, counts: Tensor, group: Group = ALONE
) -> Tensor:
    """||residual - x_hat||^2 over the variance of the residual; 0 unless it counts.

    The variance is that of the whole batch, of which the group's other processes have rows.
    """
    error = squared_error(residual_BD, x_hat_BD)
    spread, norm = spread_and_size(residual_BD, residual_BD, group)
    n_rows = len(residual_BD) * group.world_size
    variance = spread.square() / n_rows
    # One row, or equal rows, have a variance of 0 up to rounding: dividing by that would blow up.
    rounding = (16 * torch.finfo(residual_BD.dtype).eps) ** 2
    size = norm.square() / n_rows
    counts = counts & (variance > rounding * size)
    # The denominator is made safe before the division: 0 * NaN in the backward pass is NaN.
    loss = error / torch.where(counts, variance, 1)
    return torch.where(counts, loss, 0).nan_to_num(nan=0.0)
