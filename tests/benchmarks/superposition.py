"""Synthetic activations with a known dictionary: sparse non-negative codes, a common mean, noise.

# N rows, D d_in, F features

x = scale (m + sum_f c_f d_f + noise) with unit directions d_f, more of them than dimensions, and
E||x||^2 = 1. A feature is on with its own probability, falling like 1 / rank as frequencies of
features do, or the same for all; what is on is 0.5 plus an exponential.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

_SEED_OFFSET = 7_368_787
_RANK_OFFSET = 10  # without it the most frequent feature would be on in most rows


@dataclass(kw_only=True)
class Superposition:
    """`active` features are on in a row on average; shares are of the mean squared norm."""

    n_features: int
    d_in: int
    active: float
    seed: int = 0
    equal_frequencies: bool = False
    mean_share: float = 0.3
    noise_share: float = 0.0
    directions_FD: Tensor = field(init=False)
    mean_D: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Far from an SAE's seeds: one that is drawn like the directions would start at the solution.
        self.random = torch.Generator().manual_seed(self.seed + _SEED_OFFSET)
        directions_FD = torch.randn(self.n_features, self.d_in, generator=self.random)
        self.directions_FD = directions_FD / directions_FD.norm(dim=1, keepdim=True)
        frequency_F = 1 / (torch.arange(self.n_features) + _RANK_OFFSET)
        if self.equal_frequencies:
            frequency_F = torch.ones(self.n_features)
        self.frequency_F = (self.active * frequency_F / frequency_F.sum()).clamp_max(0.5)
        self.mean_D, self.noise, self.scale = torch.zeros(self.d_in), 0.0, 1.0
        coded = float(self.rows(8192).square().sum(dim=1).mean())
        rest = 1 - self.mean_share - self.noise_share
        towards_D = torch.randn(self.d_in, generator=self.random)
        self.mean_D = towards_D / towards_D.norm() * (coded * self.mean_share / rest) ** 0.5
        self.noise = (coded * self.noise_share / rest / self.d_in) ** 0.5
        # Not exact from the shares alone: codes are non-negative and have a mean of their own.
        self.scale = float(self.rows(8192).square().sum(dim=1).mean()) ** -0.5
        self.mean_D = self.mean_D * self.scale

    def rows(self, n_rows: int) -> Tensor:
        """The next n_rows activations (N, D)."""
        on_NF = torch.rand(n_rows, self.n_features, generator=self.random) < self.frequency_F
        codes_NF = torch.empty(n_rows, self.n_features).exponential_(generator=self.random)
        rows_ND = (codes_NF + 0.5) * on_NF @ self.directions_FD
        noise_ND = torch.randn(n_rows, self.d_in, generator=self.random)
        return self.scale * (rows_ND + self.noise * noise_ND) + self.mean_D
