"""AuxK: dead latents learn to explain the residual (Gao et al. 2024, appendix A.2).

# B rows, D d_in, S d_sae, N dead latents

The k_aux largest dead candidates of each row, decoded without bias, against the detached residual;
the squared error is divided by the residual's variance around its batch mean.
"""

import torch
from torch import Tensor


def auxk_loss(
    residual_BD: Tensor, candidates_BS: Tensor, dead_S: Tensor, w_dec_SD: Tensor
) -> Tensor:
    """The normalised auxiliary loss; 0 when nothing is dead or the residual has no variance."""
    residual_BD = residual_BD.detach()
    if residual_BD.device.type != "cpu":
        return masked_auxk_loss(residual_BD, candidates_BS, dead_S, w_dec_SD)
    # Asking a CPU how many are dead costs nothing, and they are few: work on them only.
    dead_N = dead_S.nonzero().squeeze(1)
    if len(dead_N) == 0:
        return residual_BD.new_zeros(())
    return masked_auxk_loss(residual_BD, candidates_BS[:, dead_N], dead_S[dead_N], w_dec_SD[dead_N])


def masked_auxk_loss(
    residual_BD: Tensor, candidates_BS: Tensor, dead_S: Tensor, w_dec_SD: Tensor
) -> Tensor:
    """The same without asking how many are dead, which would make a GPU wait in every step."""
    x_hat_BD = _largest_dead(candidates_BS, dead_S, residual_BD.shape[1] // 2) @ w_dec_SD
    error = (residual_BD - x_hat_BD).square().sum(dim=-1).mean()
    variance = (residual_BD - residual_BD.mean(dim=0)).square().sum(dim=-1).mean()
    # One row, or equal rows, have a variance of 0 up to rounding: dividing by that would blow up.
    rounding = (16 * torch.finfo(residual_BD.dtype).eps) ** 2
    counts = (variance > rounding * residual_BD.square().sum(dim=-1).mean()) & dead_S.any()
    # The denominator is made safe before the division: 0 * NaN in the backward pass is NaN.
    loss = error / torch.where(counts, variance, 1)
    return torch.where(counts, loss, 0).nan_to_num(nan=0.0)


def _largest_dead(candidates_BS: Tensor, dead_S: Tensor, k_aux: int) -> Tensor:
    """Per row the k_aux largest candidates of dead latents, all of them if there are fewer.

    k_aux = D // 2 is the heuristic of the paper's appendix.
    """
    if k_aux >= candidates_BS.shape[1]:
        return torch.where(dead_S, candidates_BS, 0)
    ranked_BS = torch.where(dead_S, candidates_BS.detach(), -torch.inf)
    index_BK = ranked_BS.topk(k_aux, dim=1, sorted=False).indices
    kept_BS = torch.zeros_like(candidates_BS, dtype=torch.bool).scatter_(1, index_BK, True)
    return torch.where(kept_BS & dead_S, candidates_BS, 0)
