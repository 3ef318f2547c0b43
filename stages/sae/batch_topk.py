"""BatchTopK SAE: the k * B largest activations of a batch (Bussmann et al. 2024, arXiv 2412.06410).

# B rows, S d_sae

Rows that need more latents get them from rows that need fewer. At inference a row cannot borrow
from others: a latent stays when it exceeds the threshold averaged during the fit.
"""

import torch
from torch import Tensor

from .ksparse import KSparse
from .whole_batch import largest_of_whole_batch


class BatchTopK(KSparse):
    """Keeps `k` latents a row on average over a batch, and what exceeds the threshold later."""

    def largest(self, pre_BS: Tensor, k: int) -> Tensor:
        return largest_of_whole_batch(pre_BS, k, self.group)

    def activate(self, pre_BS: Tensor) -> Tensor:
        return torch.where(pre_BS > self.threshold, torch.relu(pre_BS), 0)
