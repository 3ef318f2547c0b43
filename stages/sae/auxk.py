"""AuxK: dead latents learn to explain the residual (Gao et al. 2024, appendix A.2).

# B rows, D d_in, S d_sae, N dead latents

The k_aux largest candidates of dead latents in each row, decoded without bias, against the detached
residual; the squared error is divided by the residual's variance around its batch mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..parallel import ALONE, Group
from .base import squared_error
from .selection import largest_of_rows
from .support import FullSupport, rows_of, support_of
from .whole_batch import spread_and_size

if TYPE_CHECKING:
    from .base import Sae, TrainingPass


def auxk_loss(
    sae: Sae, passed: TrainingPass, residual_BD: Tensor, dead_S: Tensor, k_aux: int
) -> Tensor:
    """The normalised auxiliary loss; 0 when nothing is dead or the residual has no variance.

    passed: of the same batch, whose pre-activations nothing has overwritten.
    """
    residual_BD = residual_BD.detach()
    if residual_BD.device.type != "cpu":
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
    candidates_BS = torch.where(dead_S, passed.pre_BS, -torch.inf)
    flat_N = largest_of_rows(candidates_BS, min(k_aux, sae.d_sae))
    support = sae.entries(passed.pre_BS, passed.centred_BD, sae.b_enc, flat_N)
    bias_S = sae.encoder_bias(sae.b_enc)
    values_N = torch.relu(support.encode(passed.centred_BD, sae.W_enc, bias_S))
    # Where fewer are dead than k_aux, others are among the largest.
    values_N = torch.where(support.per_latent(dead_S), values_N, 0)
    return support.decode(values_N, sae.W_dec)


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
