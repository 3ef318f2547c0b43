"""Which latents stand for a concept: k-sparse probes, and when a concept is split over several.

# I items, S d_sae

As in Chanin et al. 2024 (arXiv 2409.14507) and the published evaluation. An L1 probe on all
latents, the minimum of mean_i(w_i log(1 + exp(-y_i (f_i . w + b)))) + 0.01 |w|_1 with positives
weighted by negatives / positives, puts latents in the order of their weight. For k = 1, 2, ... a
logistic regression (balanced classes, C = 1) on the first k of them answers yes where its score is
above 0; F1 is taken on the test items. As long as F1 rises by more than 0.03 the next latent
belongs to the concept too, up to 10: the concept's main latents. Latents without a positive weight
speak for nothing and are never main, so there may be none.

The published L1 probe is where Adam is after 50 epochs, which are 50 steps when the training items
are fewer than a batch, and then picks wrong latents. Here it is the minimum itself, by coordinate
descent; its steps, and whether they sufficed, are reported beside what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .probes import balanced, f1, fit_l1, fit_l2, positives_weighted

L1_DECAY = 0.01
F1_JUMP = 0.03
MOST_MAIN = 10
MOST_STEPS = 1000

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class MainLatents:
    """latents: the main ones; f1_by_k: F1 of the first k latents, for every k that was tried."""

    latents: NDArray[np.int64]
    f1_by_k: tuple[float, ...]
    steps: int
    converged: bool

    @property
    def f1(self) -> float:
        """F1 at k = 1; 0 when no latent speaks for the concept."""
        return self.f1_by_k[0] if self.f1_by_k else 0.0


def main_latents(
    train_IS: csr_array, train_I: Flags, test_IS: csr_array, test_I: Flags, *, seed: int
) -> MainLatents:
    """The main latents of one concept; latents in the units of `probes.Units`, CSR."""
    probe = fit_l1(
        train_IS,
        train_I,
        c=1 / (len(train_I) * L1_DECAY),
        weight_I=positives_weighted(train_I),
        seed=seed,
        most_steps=MOST_STEPS,
    )
    order_S = np.argsort(-probe.weight_K, kind="stable")[:MOST_MAIN]
    order_S = order_S[probe.weight_K[order_S] > 0]
    train_IK, test_IK = train_IS[:, order_S].toarray(), test_IS[:, order_S].toarray()
    f1_by_k: list[float] = []
    n_main, best = 0, -np.inf
    for k in range(1, len(order_S) + 1):
        f1_by_k.append(_f1_of(train_IK[:, :k], train_I, test_IK[:, :k], test_I))
        if f1_by_k[-1] <= best + F1_JUMP:
            break
        n_main, best = k, f1_by_k[-1]
    return MainLatents(order_S[:n_main], tuple(f1_by_k), probe.steps, probe.converged)


def _f1_of(train_IK: NDArray[Any], train_I: Flags, test_IK: NDArray[Any], test_I: Flags) -> float:
    probe = fit_l2(train_IK, train_I, c=1.0, weight_I=balanced(train_I))
    return f1(test_I, probe.scores(test_IK) > 0)
