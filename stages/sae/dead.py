"""Which latents are dead: tokens since each fired.

# S d_sae
"""

import torch
from torch import Tensor


class DeadLatents:
    """Counts tokens since each latent was last active, on the device of the SAE."""

    def __init__(self, d_sae: int, dead_after_tokens: int, device: torch.device) -> None:
        self.dead_after_tokens = dead_after_tokens
        self.tokens_since_fired_S = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update_(self, fired_S: Tensor, n_tokens: int) -> None:
        """Count one batch; called once a step, by the trainer only."""
        self.tokens_since_fired_S.add_(n_tokens).masked_fill_(fired_S, 0)

    def mask(self) -> Tensor:
        """True for each dead latent."""
        return self.tokens_since_fired_S >= self.dead_after_tokens
