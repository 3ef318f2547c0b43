"""Absorption of one concept in words whose latents, probe and main latents are known.

# W words, D d_in, S d_sae

Chanin et al. 2024, "A is for Absorption" (arXiv 2409.14507), with the thresholds of the published
evaluation. p is the probe's direction of length 1, x a word's activation, f_i d_i what latent i
adds to the reconstruction, cos_i the cosine of d_i and p. What latent i contributes to the concept
is f_i (d_i . p): the published f_i cos_i where decoder rows have length 1, and unlike that the same
however a latent and its decoder row are rescaled against each other.

Full absorption of a word: no main latent is at 1e-8 or above, x . p > 0, and the latent that
contributes most has cos >= 0.025 and contributes at least 0.4 x . p.

Absorption fraction of a word: A is the sum of the three largest positive contributions of latents
that are not main and have cos >= 0.1, M that of all main latents. 0 if M >= x . p or
A < 0.4 x . p; else 1 if M <= 0; else a / (a + M) with a = min(A, x . p - M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .directions import Direction

Floats = NDArray[np.floating[Any]]

ACTIVE = 1e-8
FULL_COSINE = 0.025
FRACTION_COSINE = 0.1
LEAST_SHARE = 0.4
MOST_ABSORBERS = 3


@dataclass(frozen=True)
class Absorbed:
    """What was found in W words; absorber_W: the latent that contributes most, -1 where none does;
    share_W: its contribution over x . p."""

    full_W: NDArray[np.bool_]
    fraction_W: NDArray[np.float64]
    absorber_W: NDArray[np.int64]
    share_W: NDArray[np.float64]


def absorbed(
    latents_WS: csr_array, x_WD: Floats, direction: Direction, main: NDArray[np.integer[Any]]
) -> Absorbed:
    """Full absorption and absorption fraction of each word."""
    n_words = len(x_WD)
    found = Absorbed(
        full_W=np.zeros(n_words, dtype=np.bool_),
        fraction_W=np.zeros(n_words),
        absorber_W=np.full(n_words, -1),
        share_W=np.zeros(n_words),
    )
    projection_W = np.asarray(x_WD, dtype=np.float64) @ direction.unit_D
    is_main_S = np.zeros(latents_WS.shape[1], dtype=np.bool_)
    is_main_S[main] = True
    for word in range(n_words):
        entries = slice(latents_WS.indptr[word], latents_WS.indptr[word + 1])
        latent_N = latents_WS.indices[entries]
        value_N = latents_WS.data[entries].astype(np.float64)
        part_N = value_N * direction.along_S[latent_N]
        projection, is_main_N = projection_W[word], is_main_S[latent_N]
        if projection <= 0:
            continue
        if len(part_N) and part_N.max() > 0:
            top = int(part_N.argmax())
            found.absorber_W[word] = latent_N[top]
            found.share_W[word] = part_N[top] / projection
            found.full_W[word] = (
                not (value_N[is_main_N] >= ACTIVE).any()
                and direction.cosine_S[latent_N[top]] >= FULL_COSINE
                and found.share_W[word] >= LEAST_SHARE
            )
        is_absorber_N = ~is_main_N & (direction.cosine_S[latent_N] >= FRACTION_COSINE)
        found.fraction_W[word] = _fraction(
            part_N[is_absorber_N], float(part_N[is_main_N].sum()), projection
        )
    return found


def _fraction(absorber_N: Floats, main: float, projection: float) -> float:
    largest = np.sort(absorber_N[absorber_N > 0])[-MOST_ABSORBERS:]
    together = float(largest.sum())
    if main >= projection or together < LEAST_SHARE * projection:
        return 0.0
    if main <= 0:
        return 1.0
    taken = min(together, projection - main)
    return taken / (taken + main)
