"""The activation threshold for inference: an average of the smallest activation that was kept.

Batch-wise selection needs the other rows of a batch; at inference a latent is kept when it exceeds
the threshold instead, so that a row's latents do not depend on its neighbours.
"""

import torch
from torch import Tensor


@torch.no_grad()
def update_threshold_(threshold: Tensor, smallest_kept: Tensor, beta: float) -> None:
    """Copy the first value (the threshold is negative before), then average exponentially.

    A batch in which nothing fired has no smallest activation and leaves the threshold as it is.
    In float32 whatever the activations are, as the reference keeps it.
    """
    sample, old = smallest_kept.float(), threshold.float()
    average = torch.where(old < 0, sample, beta * old + (1 - beta) * sample)
    threshold.copy_(torch.where(sample.isfinite(), average, old))
