"""The coefficient of the sparsity term from step to step: warmed up, and led to an L0.

An L1-like penalty has no L0 of its own, so a coefficient that gives the L0 asked for has to be
found. It is found while the SAE is fitted, by a controller: while more latents are active than
asked for the coefficient grows, else it falls, by a share that depends on how far off the L0 is,

    log c += gain * clip(log(L0 / target), -1, 1),

with the batch's L0 averaged over some steps. The gain is set by the length of the run, so that a
short run gets there, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Averages over 1 / (1 - _MEMORY) steps: the L0 of single batches is noisy.
_MEMORY = 0.9


class Sparsity:
    """`weight(warmth(step))` of each step's penalty; `observe_` after it."""

    def __init__(
        self,
        *,
        coefficient: float,
        warmup_steps: int,
        target_l0: float | None,
        gain: float,
        device: torch.device,
    ) -> None:
        """coefficient: at first; target_l0: None keeps it; gain: of the controller."""
        self.warmup_steps, self.target_l0, self.gain = warmup_steps, target_l0, gain
        # float64 on a CPU; a device may not know it.
        dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        self.coefficient = torch.tensor(coefficient, dtype=dtype, device=device)
        self.mean_l0 = torch.tensor(-1.0, dtype=dtype, device=device)

    def warmth(self, step: int) -> float:
        """How much of the coefficient counts: it rises from 0 to 1 over the warm-up."""
        return min(step / self.warmup_steps, 1.0) if self.warmup_steps else 1.0

    def weight(self, warmth: float | Tensor) -> Tensor:
        """The coefficient as far as it counts."""
        return self.coefficient * warmth

    def observe_(self, step: int, l0: Tensor) -> None:
        """Count one step's L0; nothing waits for the device."""
        if self.target_l0 is None:
            return
        l0 = l0.to(self.mean_l0)
        averaged = _MEMORY * self.mean_l0 + (1 - _MEMORY) * l0
        self.mean_l0.copy_(torch.where(self.mean_l0 < 0, l0, averaged))
        if step < self.warmup_steps:
            return
        # An L0 of 0 counts as a hundredth of a latent: its logarithm has an end.
        distance = torch.log(self.mean_l0.clamp_min(0.01) / self.target_l0)
        self.scale_(torch.exp(self.gain * distance.clamp(-1, 1)))

    def scale_(self, factor: Tensor) -> None:
        """Multiply the coefficient."""
        self.coefficient.mul_(factor.to(self.coefficient))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that later weights depend on."""
        return {"sparsity": torch.stack([self.coefficient, self.mean_l0])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up another's state."""
        for own, saved in zip((self.coefficient, self.mean_l0), state["sparsity"], strict=True):
            own.copy_(saved)
