"""hier4: a parent and three children that fire with it, independently of one another.

# N rows, D d_in, F features, S latents

Four orthonormal features in 50 dimensions. The parent fires with probability 0.25; given the
parent each child fires with 0.15, by its own coin; all magnitudes are 1. An SAE has four latents.

What is known. The dictionary of an L1 SAE is p, and c_i + a_i p for the children, and the cost of a
row its error + coefficient * sum of latents. One child costs sqrt(1 + a^2) + (1 - a), which falls
as the child's latent takes over more of the parent (a). Of two children the latents bring
(a_i + a_j) p, which may be no more than p without an error. So a = 1/2 for all: the parent's latent
fires alone and with one child, and is silent with two or three. Recall is 1 without a child, and

    with one  1 - (3 * 0.15^2 * 0.85 + 0.15^3) / (1 - 0.85^3) = 0.843,  gap 0.157

This is the minimum that gradient descent on the whole population (9 kinds of rows) finds for
coefficients from 0.05 to 0.3 on rows of magnitude 1. At 0.03 the parent's latent is at 0.03 and
less with some of the pairs, so that gaps of 0.06, 0.11 and 0.16 cost the same to five digits. Other
minima have one child's latent take the whole parent (gap 0.39), or one latent for two features
(explained variance 0.89).

A Matryoshka SAE with prefixes of 1 and 4 latents has to reconstruct by its first latent alone,
which must therefore fire on every row of the parent: gap 0. That latent is tilted to the children's
mean, which costs explained variance (0.984). k = 1 is more than a row has (0.36 features), so the
selection does not bind, and most starts end with a latent that never fires or that doubles
another: of several starts the one with the smallest loss counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .base import Family, Setting, Toy, orthonormal

D_IN = 50
P_PARENT, P_CHILD = 0.25, 0.15
N_CHILDREN = 3


class Hier4(Toy):
    settings: ClassVar[Mapping[str, Setting]] = {
        "relu": Setting(
            steps=4000,
            fields={"sparsity": 3e-2, "normalise": False, "resample_steps": 400},
            known={"recall_gap": (0.157, 0.08), "explained_variance": (0.999, 0.002)},
        ),
        "matryoshka": Setting(
            steps=2500,
            fields={"k": 1, "group_fractions": (1 / 4, 3 / 4)},
            known={"recall_gap": (0.0, 0.01), "explained_variance": (0.984, 0.01)},
            starts=20,
        ),
    }

    def __init__(self, *, seed: int = 0, rows_seed: int | None = None) -> None:
        features_FD = orthonormal(1 + N_CHILDREN, D_IN, seed)
        family = Family(parent=0, children=tuple(range(1, 1 + N_CHILDREN)))
        super().__init__(features_FD, [family], seed=seed, rows_seed=rows_seed)

    def fires(self, n_rows: int) -> Tensor:
        coins = torch.rand(n_rows, 1 + N_CHILDREN, generator=self.random)
        parent_N1 = coins[:, :1] < P_PARENT
        return torch.cat([parent_N1, parent_N1 & (coins[:, 1:] < P_CHILD)], dim=1)
