"""Which entries of a matrix of pre-activations are the largest: of each row, or of the whole batch.

# B rows, S d_sae, N kept entries

Exact, whatever the shortcut: on a CPU only what exceeds a bound of the limit, of the batch or of
each row, is compared with each other. Entries come as ascending flat indices
row * S + latent. Zeros and negative entries may be among them where there are too few positive
ones; relu makes nothing of them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .asking import may_ask
from .support import flat_nonzero

# Of a row: so few groups that finding the bound is quick, so many that it is close.
_LEAST_GROUPS, _GROUPS_A_K, _LEAST_GROUP_SIZE, _MOST_LEFT = 128, 4, 4, 2
_SAMPLED_ROWS = 32
# Of the sampled limit: low enough to hold for the batch nearly always, high enough to leave few.
_MARGINS = (0.9, 0.6, 0.0)


def largest_of_rows(pre_BS: Tensor, k: int) -> Tensor:
    """The k largest entries of each row: (B * k,) flat indices, ascending."""
    n_rows, n_latents = pre_BS.shape
    n_groups = max(_LEAST_GROUPS, _GROUPS_A_K * k)
    is_worth_it = _LEAST_GROUP_SIZE * n_groups <= n_latents and pre_BS.dtype != torch.bfloat16
    if may_ask(pre_BS) and is_worth_it:
        latent_BK = _largest_above_a_bound(pre_BS, k, n_groups)
    else:
        latent_BK = pre_BS.topk(k, dim=1, sorted=False).indices
    first_B1 = torch.arange(n_rows, device=pre_BS.device)[:, None] * n_latents
    return (latent_BK.sort(dim=1).values + first_B1).view(-1)


def _largest_above_a_bound(pre_BS: Tensor, k: int, n_groups: int) -> Tensor:
    """The k largest of each row (B, k), in no order, in half the time of topk over the rows.

    The k-th largest of the maxima of n_groups >= k groups is at most the k-th largest of all: k
    groups have an entry that large. Few entries more than k reach it.
    """
    n_rows, n_latents = pre_BS.shape
    size = n_latents // n_groups
    maxima_BG = pre_BS[:, : size * n_groups].view(n_rows, size, n_groups).amax(dim=1).numpy()
    bound_B1 = np.partition(maxima_BG, n_groups - k, axis=1)[:, n_groups - k, None]
    flat_N = flat_nonzero(pre_BS >= torch.from_numpy(bound_B1)).numpy()
    row_N = flat_N // n_latents
    count_B = np.bincount(row_N, minlength=n_rows)
    # NaN reaches no bound, and a bound that many reach (0 after relu) leaves too much to look at.
    if count_B.min() < k or count_B.max() > _MOST_LEFT * n_groups:
        return pre_BS.topk(k, dim=1, sorted=False).indices
    first_B = np.cumsum(count_B) - count_B
    # What is left of each row side by side, in a matrix as wide as the longest.
    table_BM = np.full((n_rows, int(count_B.max())), -np.inf, maxima_BG.dtype)
    table_BM[row_N, np.arange(len(flat_N)) - first_B[row_N]] = pre_BS.numpy().reshape(-1)[flat_N]
    place_BK = torch.from_numpy(table_BM).topk(k, dim=1, sorted=False).indices.numpy()
    return torch.from_numpy(flat_N[first_B[:, None] + place_BK] % n_latents)


def largest_of_batch(pre_BS: Tensor, k: int) -> Tensor:
    """The k * B largest entries of all rows together, on a CPU only positive ones: flat indices.

    Of equal entries at the limit the first are kept (on a GPU, whichever torch's topk takes).
    """
    n_kept = k * len(pre_BS)
    if not may_ask(pre_BS):
        return pre_BS.view(-1).topk(n_kept, sorted=False).indices.sort().values
    guess = _sampled_limit(pre_BS, k)
    for margin in _MARGINS:
        # 0 keeps all positive entries, and then there may be fewer than n_kept of them.
        flat_N = flat_nonzero(pre_BS > guess * margin)
        if len(flat_N) >= n_kept or guess * margin == 0:
            break
    if len(flat_N) > n_kept:
        flat_N = flat_N[torch.from_numpy(_largest(_as_numpy(pre_BS.view(-1)[flat_N]), n_kept))]
    return flat_N


def _sampled_limit(pre_BS: Tensor, k: int) -> float:
    """The limit among some rows, at least 0."""
    sample = _as_numpy(pre_BS[:: max(len(pre_BS) // _SAMPLED_ROWS, 1)].reshape(-1))
    rank = max(sample.size - k * (sample.size // pre_BS.shape[1]), 0)
    return max(float(np.partition(sample, rank)[rank]), 0.0)


def _largest(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Places of the `count` largest values, ascending."""
    limit = np.partition(values, len(values) - count)[len(values) - count]
    kept = values > limit
    ties = np.flatnonzero(values == limit)
    kept[ties[: count - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept)


def _as_numpy(values: Tensor) -> NDArray[np.floating]:
    """Without a copy, except for bfloat16, which numpy does not know."""
    array: NDArray[np.floating] = (
        values.float() if values.dtype == torch.bfloat16 else values
    ).numpy()
    return array
