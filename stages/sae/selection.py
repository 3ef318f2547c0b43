"""Which entries of a matrix of pre-activations are the largest: of each row, or of the whole batch.

# B rows, S d_sae, N kept entries

Exact, whatever the shortcut: of a batch only what exceeds a guess of the limit is compared with
each other, and a guess that leaves too little is lowered. Entries come as ascending flat indices
row * S + latent. Zeros and negative entries may be among them where there are too few positive
ones; relu makes nothing of them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .asking import may_ask
from .support import flat_nonzero

_SAMPLED_ROWS = 32
# Of the sampled limit: low enough to hold for the batch nearly always, high enough to leave few.
_MARGINS = (0.9, 0.6, 0.0)


def largest_of_rows(pre_BS: Tensor, k: int) -> Tensor:
    """The k largest entries of each row: (B * k,) flat indices, ascending."""
    n_rows, n_latents = pre_BS.shape
    latent_BK = pre_BS.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    first_B1 = torch.arange(n_rows, device=pre_BS.device)[:, None] * n_latents
    return (latent_BK + first_B1).view(-1)


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
