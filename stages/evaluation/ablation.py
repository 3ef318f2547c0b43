"""Taking latents out of activations, and what that does to a probe: one encode for all sizes.

# I items, D d_in, S d_sae, C concepts, N sizes

A probe on the mean x of an item's tokens reads, after latents of a set A are ablated with the SAE's
error kept, mean(x - sum_A f_i d_i) . w + b = (x . w + b) - sum_A mean(f)_i (d_i . w). So from mean
latents and the numbers d_i . w every size of every set follows, without another encode or decode;
pad tokens are not rows and take no part.

Effect of latent i on a concept (Marks et al. 2024, arXiv 2403.19647, as SAEBench uses it):
(mean of f_i over positives - over negatives) (d_i . w), on training items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .probes import mean_difference

SIZES = (2, 5, 10, 20, 50, 100, 500)

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]


def effects(train_IS: csr_array, positive_I: Flags, along_S: Floats) -> NDArray[np.float64]:
    """The effect of each latent on a concept, (S,). along_S: d_i . w."""
    return mean_difference(train_IS, positive_I) * along_S


def largest(effect_S: Floats) -> NDArray[np.int64]:
    """Latents in the order in which they are ablated: the largest effect first, equal ones
    ascending; only positive effects, as many as the largest size takes."""
    order_S = np.argsort(-effect_S, kind="stable")[: SIZES[-1]]
    return order_S[effect_S[order_S] > 0]


def removed(
    latents_IS: csr_array, along_S: Floats, orders: list[NDArray[np.int64]]
) -> NDArray[np.float64]:
    """What leaves the score of a probe when the first n latents of each order go, (I, C, N).

    along_S: d_i . w of the probe that is read; where an order is shorter than n, all of it goes.
    """
    n_columns = len(orders) * len(SIZES)
    latent_E, column_E = [], []
    for place, order_S in enumerate(orders):
        # Each latent enters at one size, the first that takes it; sizes add up from there.
        entered_S = np.searchsorted(SIZES, np.arange(len(order_S)), side="right")
        latent_E.append(order_S)
        column_E.append(place * len(SIZES) + entered_S)
    latents, columns = np.concatenate(latent_E), np.concatenate(column_E)
    enters_SE = csr_array(
        (along_S[latents], (latents, columns)), shape=(latents_IS.shape[1], n_columns)
    )
    added_IE = (csr_array(latents_IS, dtype=np.float64) @ enters_SE).toarray()
    return np.asarray(added_IE.reshape(-1, len(orders), len(SIZES)).cumsum(axis=2))
