"""What a training pass has to know of the rows that other processes have.

# W processes, B rows of this process, D d_in, S d_sae, N entries

Losses and gradients are means over rows, so their mean over processes is that of the whole batch.
Here is what is not: a selection that rows compete for, what fired at all, distances to the mean.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..parallel import Group
from .base import TrainingPass
from .selection import largest_of_batch
from .support import flat_nonzero


def of_whole_batch(passed: TrainingPass, group: Group) -> TrainingPass:
    """The same pass with l0, parts, fired_S and smallest_kept of the whole batch.

    loss, which the backward pass begins at, stays that of this process's rows. One exchange.
    """
    if group.is_alone:
        return passed
    smallest, seat = passed.smallest_kept, group.seat
    # Room for each process's own smallest among the sums, because a minimum is none.
    smallest_W = passed.fired_S.new_zeros(seat.world_size, dtype=passed.loss.dtype)
    if smallest is not None:
        smallest_W[seat.rank] = smallest
    scalars = torch.stack([passed.l0, *passed.parts.values()])
    mine = [scalars, smallest_W, passed.fired_S.to(scalars)]
    sums = group.sum(torch.cat([part.to(scalars) for part in mine]))
    scalars, smallest_W, fired_S = torch.split(sums, [len(part) for part in mine])
    l0, *parts = (scalars / seat.world_size).unbind()
    return replace(
        passed,
        l0=l0,
        parts=dict(zip(passed.parts, parts, strict=True)),
        fired_S=fired_S > 0,
        smallest_kept=None if smallest is None else smallest_W.amin(),
    )


def spread_and_size(x_BD: Tensor, y_BD: Tensor, group: Group, *means: Tensor) -> tuple[Tensor, ...]:
    """sqrt(sum ||x - mean of x||^2), sqrt(sum ||y||^2) over the whole batch, and the means of
    scalars over the processes.

    From each process's sums around its own mean m_w: the sum around the common one is larger by
    B ||m_w - m||^2 (Chan, Golub and LeVeque 1979, "Updating formulae"). One exchange.
    """
    mean_D = x_BD.mean(dim=0)
    spread: Tensor = torch.linalg.vector_norm(x_BD - mean_D)
    size: Tensor = torch.linalg.vector_norm(y_BD)
    if group.is_alone:
        return spread, size, *means
    mine = torch.stack([spread.square(), size.square(), *means])
    all_W = group.gather(torch.cat([mean_D, mine]))
    mean_WD, sums_W = torch.split(all_W, [len(mean_D), len(mine)], dim=1)
    between = len(x_BD) * (mean_WD - mean_WD.mean(dim=0)).square().sum()
    spread = (sums_W[:, 0].sum() + between).sqrt()
    return spread, sums_W[:, 1].sum().sqrt(), *sums_W[:, 2:].mean(dim=0).unbind()


def largest_of_whole_batch(pre_BS: Tensor, k: int, group: Group) -> Tensor:
    """The entries of these rows that are among the k a row largest, and positive ones, of the whole
    batch: ascending flat indices.

    Of equal entries at the limit the first are kept, rows in the order of the processes: what
    `largest_of_batch` keeps of all rows together. Each process has k a row that are no less than
    the least of its own k a row largest, so the limit is no less than the least of those of all
    processes. What reaches that is exchanged, a little more than is kept.
    """
    if group.is_alone:
        return largest_of_batch(pre_BS, k)
    own_N = _widened(pre_BS.view(-1)[largest_of_batch(pre_BS, k)])
    has_all = len(own_N) == k * len(pre_BS)
    bound = own_N.amin().clamp_min(0) if has_all else own_N.new_zeros(())
    flat_N = flat_nonzero((pre_BS > 0) & (pre_BS >= group.min(bound)))
    value_N = _widened(pre_BS.view(-1)[flat_N])
    kept_N = largest_of_processes(value_N, k * len(pre_BS) * group.world_size, group)
    return flat_N[kept_N]


def _widened(values: Tensor) -> Tensor:
    """bfloat16 as float32, which every backend exchanges."""
    return values.float() if values.dtype == torch.bfloat16 else values


def largest_of_processes(value_N: Tensor, count: int, group: Group) -> Tensor:
    """Which of this process's positive values are among the `count` largest of all processes.

    All, where there are no more. Of equal ones the first are kept, in the order of the processes.
    """
    sizes = group.gather(torch.tensor(len(value_N), device=value_N.device)).tolist()
    if sum(sizes) <= count:
        return torch.ones_like(value_N, dtype=torch.bool)
    padded = value_N.new_zeros(max(sizes))
    padded[: len(value_N)] = value_N
    each = [values[:size] for values, size in zip(group.gather(padded), sizes, strict=True)]
    all_M = torch.cat(each)
    limit = all_M.kthvalue(len(all_M) - count + 1).values
    above_M, equal_M = all_M > limit, all_M == limit
    kept_M = above_M | (equal_M & (equal_M.cumsum(0) <= count - above_M.sum()))
    start = sum(sizes[: group.seat.rank])
    return kept_M[start : start + len(value_N)]
