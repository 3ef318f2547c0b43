"""tree20: three parents with three exclusive children each, and eight features beside them.

# N rows, D d_in, F features

Twenty orthogonal features in 20 dimensions, of norms 1 + 0.05 N(0, 1). Parents fire with 0.15;
given its parent each of three children fires with 0.2 and none with 0.4, never two; eight
independent features fire with 0.05. What fires is 1. 1.12 features a row.

What is known. A child's latent that stands for child and parent costs an L1 SAE sqrt(2) where two
latents cost 2, and nothing else, because no two children meet: any coefficient absorbs wholly. The
parent's latent fires on every row of the parent alone and on none with a child: recall 1 and 0.
Every feature but the children still has a latent of exactly its direction, so the median over
features of the largest cosine is 1.000: it does not see absorption. A Matryoshka SAE with prefixes
of 3, 12 and 20 latents has its first three reconstruct alone: recall 1 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .base import Family, Setting, Toy, orthonormal

N_PARENTS, N_CHILDREN, N_ALONE = 3, 3, 8
N_FEATURES = N_PARENTS * (1 + N_CHILDREN) + N_ALONE
P_PARENT, P_CHILD, P_ALONE = 0.15, 0.2, 0.05
NORM_SPREAD = 0.05
_NORMS = 49_979_687


class Tree20(Toy):
    """Features: the parents, the children of the first, second, third parent, the others."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "relu": Setting(
            steps=8000,
            fields={"sparsity": 6e-2, "normalise": False, "resample_steps": 800},
            known={"recall_gap": (1.0, 0.05), "explained_variance": (0.999, 0.001)},
        ),
        "matryoshka": Setting(
            steps=4000,
            fields={
                "k": 2,
                "group_fractions": (3 / 20, 9 / 20, 8 / 20),
                "dead_after_tokens": 25_600,
            },
            known={"recall_gap": (0.0, 0.02), "explained_variance": (0.978, 0.02)},
            starts=4,  # in about one of five a prefix of three ends without one of the parents
        ),
    }

    def __init__(self, *, seed: int = 0, rows_seed: int | None = None) -> None:
        random = torch.Generator().manual_seed(_NORMS + seed)
        norms_F1 = 1 + NORM_SPREAD * torch.randn(N_FEATURES, 1, generator=random)
        features_FD = norms_F1 * orthonormal(N_FEATURES, N_FEATURES, seed)
        families = [
            Family(parent=parent, children=tuple(range(first, first + N_CHILDREN)))
            for parent in range(N_PARENTS)
            for first in [N_PARENTS + N_CHILDREN * parent]
        ]
        super().__init__(features_FD, families, seed=seed, rows_seed=rows_seed)

    def fires(self, n_rows: int) -> Tensor:
        parent_NP = torch.rand(n_rows, N_PARENTS, generator=self.random) < P_PARENT
        # Which child, 0 to 2, or none from 3 on.
        child_NP = torch.rand(n_rows, N_PARENTS, generator=self.random) / P_CHILD
        child_NPC = child_NP.floor()[..., None] == torch.arange(N_CHILDREN)
        alone_NA = torch.rand(n_rows, N_ALONE, generator=self.random) < P_ALONE
        children_NC = (parent_NP[..., None] & child_NPC).flatten(1)
        return torch.cat([parent_NP, children_NC, alone_NA], dim=1)
