"""masked_tokens: a token-level toy, in which masking breaks a co-occurrence that is planted.

# n contexts, T positions, N rows, D d_in, F features, V tokens

Tokens: the mask token, three triggers, nine children (three of each trigger), eight neutral ones.
Text: behind trigger i comes one of its children, each with probability 0.2, or a neutral token
(0.4); anywhere else one of the triggers, each with 0.2, or a neutral token (0.4). So a child stands
behind its trigger and nowhere else.
"Model": the activation at a position is the sum of orthonormal features, one of the token itself
and, behind trigger i, that of parent i, which reads the token before it as a head for bigrams does.
24 features in 24 dimensions; the first position of a context, with nothing before it, is no row.
Harvest: with probability p each token is replaced by the mask token (`stages/masking.py`) before
the model sees it. SAEs are fitted on such rows and judged on rows at p = 0.

What is known. P(parent fires | child fires) = 1 - p: a child stays and its trigger is masked. At
p = 0 a child's latent may take the parent over. Its direction is then (c + a p) / sqrt(1 + a^2),
and on the child's rows an L1 SAE of coefficient l pays l (sqrt(1 + a^2) + 1 - a) instead of 2 l,
least at a = 1: the parent's latent is silent wherever a child fires, gap 1. At p > 0 the share p of
the child's rows has no parent. There the same latent, at best, leaves a^2 / (1 + a^2), and a = 1 is
no minimum any more once

    p / (1 - p) > l (2 - sqrt(2)),  p = 0.04 for l = 0.06 on rows of mean squared norm 1

(l = 0.07 for features of length 1). Beyond, a is about l (1 - p) / (2 p) and less, far from 1, and
the parent's latent fires beside the child's: gap 0. So at p = 0.3 the gap is 0 and at p = 0 it is
1, whatever the seed. (An encoder that has not learnt to tell the child's rows with and without
parent leaves a^2: in short fits absorption ends from p = 0.01 on.) For a TopK SAE with k = 2, the
most features that a row has, both dictionaries are without error at p = 0, and which one is found
is chance; at p > 0 only the separate one is.

This is the mechanism that arXiv 2604.06495 proposes, where it is sure to act. How often a language
model's parent reads tokens other than the child's own, the toy does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..masking import MaskConfig, mask_tokens
from .base import Family, Setting, Toy, orthonormal

N_PARENTS, N_CHILDREN, N_NEUTRAL = 3, 3, 8
P_TRIGGER, P_CHILD = 0.2, 0.2
CONTEXT = 64
MASK_ID = 0
FIRST_TRIGGER = 1
FIRST_CHILD = FIRST_TRIGGER + N_PARENTS
FIRST_NEUTRAL = FIRST_CHILD + N_PARENTS * N_CHILDREN
N_TOKENS = FIRST_NEUTRAL + N_NEUTRAL
N_FEATURES = N_PARENTS + N_TOKENS
POOL_CONTEXTS = 1024  # rows are permuted inside so many contexts

Tokens = NDArray[np.uint32]


class MaskedTokens(Toy):
    """Features: the parents, then one a token."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "relu": Setting(
            steps=4000,
            lr=1e-2,
            fields={"sparsity": 6e-2},
            known={"recall_gap": (1.0, 0.05), "explained_variance": (0.999, 0.001)},
        ),
        "topk": Setting(steps=3000, fields={"k": 2}, known={}),
    }

    def __init__(self, *, seed: int = 0, rows_seed: int | None = None, p: float = 0.0) -> None:
        """p: of masking."""
        families = [
            Family(parent=parent, children=tuple(range(first, first + N_CHILDREN)))
            for parent in range(N_PARENTS)
            for first in [N_PARENTS + FIRST_CHILD + N_CHILDREN * parent]
        ]
        features_FD = orthonormal(N_FEATURES, N_FEATURES, seed)
        super().__init__(features_FD, families, seed=seed, rows_seed=rows_seed)
        self.masking = MaskConfig(p=p, mask_id=MASK_ID, seed=seed)
        self._n_contexts = 0
        self._pool_NF = torch.empty(0, N_FEATURES, dtype=torch.bool)

    def fires(self, n_rows: int) -> Tensor:
        while len(self._pool_NF) < n_rows:
            tokens_nT = self.text(POOL_CONTEXTS)
            masked_nT, _ = mask_tokens(
                tokens_nT,
                first_context=self._n_contexts - POOL_CONTEXTS,
                context_size=CONTEXT,
                config=self.masking,
            )
            rows_NF = features_of(masked_nT)
            order_N = torch.randperm(len(rows_NF), generator=self.random)
            self._pool_NF = torch.cat([self._pool_NF, rows_NF[order_N]])
        taken_NF, self._pool_NF = self._pool_NF[:n_rows], self._pool_NF[n_rows:]
        return taken_NF

    def text(self, n_contexts: int) -> Tokens:
        """The next contexts (n, T), before masking: the same text for every p."""
        tokens_nT = np.empty((n_contexts, CONTEXT), dtype=np.uint32)
        trigger_n = np.full(n_contexts, -1)  # which one stands before, -1: none
        for position in range(CONTEXT):
            which_n, neutral_n = (
                torch.rand(n_contexts, generator=self.random).numpy() for _ in range(2)
            )
            neutral_n = FIRST_NEUTRAL + (neutral_n * N_NEUTRAL).astype(np.int64)
            child_n = np.floor(which_n / P_CHILD).astype(np.int64)
            next_n = np.floor(which_n / P_TRIGGER).astype(np.int64)
            tokens_n = np.where(
                trigger_n >= 0,
                np.where(
                    child_n < N_CHILDREN,
                    FIRST_CHILD + trigger_n * N_CHILDREN + child_n,
                    neutral_n,
                ),
                np.where(next_n < N_PARENTS, FIRST_TRIGGER + next_n, neutral_n),
            )
            tokens_nT[:, position] = tokens_n
            is_trigger_n = (tokens_n >= FIRST_TRIGGER) & (tokens_n < FIRST_CHILD)
            trigger_n = np.where(is_trigger_n, tokens_n - FIRST_TRIGGER, -1)
        self._n_contexts += n_contexts
        return tokens_nT


def features_of(tokens_nT: Tokens) -> Tensor:
    """The "model": which features fire at every position but the first of each context (N, F)."""
    ids_nT = torch.from_numpy(tokens_nT.astype(np.int64))
    before_N, here_N = ids_nT[:, :-1].reshape(-1), ids_nT[:, 1:].reshape(-1)
    triggers_P = torch.arange(N_PARENTS) + FIRST_TRIGGER
    parents_NP = before_N[:, None] == triggers_P
    return torch.cat([parents_NP, here_N[:, None] == torch.arange(N_TOKENS)], dim=1)
