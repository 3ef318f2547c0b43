"""AuxK: dead latents learn to explain the residual (Gao et al. 2024, appendix A.2).

# B rows, D d_in, S d_sae, N dead latents

The k_aux largest candidates of dead latents in each row, decoded without bias, against the detached
residual; the squared error is divided by the residual's variance around its batch mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .asking import may_ask
from .base import squared_error
from .selection import largest_of_rows
from .support import FullSupport, rows_of, support_of

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
        return normalised_error(residual_BD, x_hat_BD, dead_S.any())
    # Asking a CPU how many are dead costs nothing, and they are few: work on them only.
    dead_N = dead_S.nonzero().squeeze(1)
    if len(dead_N) == 0:
        return residual_BD.new_zeros(())
    x_hat_BD = of_the_dead(sae, passed, dead_N, k_aux)
    return normalised_error(residual_BD, x_hat_BD, dead_S.any())


def of_the_dead(sae: Sae, passed: TrainingPass, dead_N: Tensor, k_aux: int) -> Tensor:
    """What the dead latents reconstruct, by their columns alone."""
    w_enc_DN = rows_of(sae.W_enc.T, dead_N).T
    bias_N = sae.encoder_bias(sae.b_enc)[dead_N]
    if sae.low_precision:  # the values are asked for in full precision
        pre_BN = torch.addmm(bias_N.detach(), passed.centred_BD, w_enc_DN.detach())
        pre_BN = pre_BN.to(bias_N.dtype)  # autocast may have made it bfloat16
    else:
        pre_BN = passed.pre_BS.index_select(1, dead_N)
    kept_BN = pre_BN > 0
    if k_aux < len(dead_N):
        index_BK = pre_BN.topk(k_aux, dim=1, sorted=False).indices
        kept_BN &= torch.zeros_like(kept_BN).scatter_(1, index_BK, True)
    support = support_of(pre_BN, kept_BN, pre_BN.dtype)
    values_V = torch.relu(support.encode(passed.centred_BD, w_enc_DN, bias_N))
    if isinstance(support, FullSupport):
        values_V = torch.where(kept_BN, values_V, 0)
    return support.decode(values_V, rows_of(sae.W_dec, dead_N))


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


def normalised_error(residual_BD: Tensor, x_hat_BD: Tensor, counts: Tensor) -> Tensor:
    """||residual - x_hat||^2 over the variance of the residual; 0 unless it counts."""
    error = squared_error(residual_BD, x_hat_BD)
    spread = torch.linalg.vector_norm(residual_BD - residual_BD.mean(dim=0))
    variance = spread.square() / len(residual_BD)
    # One row, or equal rows, have a variance of 0 up to rounding: dividing by that would blow up.
    rounding = (16 * torch.finfo(residual_BD.dtype).eps) ** 2
    size = torch.linalg.vector_norm(residual_BD).square() / len(residual_BD)
    counts = counts & (variance > rounding * size)
    # The denominator is made safe before the division: 0 * NaN in the backward pass is NaN.
    loss = error / torch.where(counts, variance, 1)
    return torch.where(counts, loss, 0).nan_to_num(nan=0.0)
