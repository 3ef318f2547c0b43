"""Intervals of item metrics: documents drawn again with replacement, inside each stratum.

# R replicates, I items, E score columns

Counts (R, I) say how often an item is in a replicate. They depend on documents, strata and the seed
alone, so that two SAEs judged on the same items with the same seed have the same replicates, and
their difference has an interval of its own. Strata are what a metric averages over (letters,
classes), so that none is ever empty in a replicate.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Counts = NDArray[np.float32]


def generator(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names, not on what was drawn before."""
    return np.random.default_rng([seed, *(crc32(name.encode()) for name in names)])


def draw(
    document_I: NDArray[np.integer[Any]],
    stratum_I: NDArray[np.integer[Any]],
    *,
    replicates: int,
    rng: np.random.Generator,
) -> Counts:
    """How often each item is drawn, (R, I). A document belongs to the stratum of its first item."""
    counts_RI = np.zeros((replicates, len(document_I)), dtype=np.float32)
    _, first, which_I = np.unique(document_I, return_index=True, return_inverse=True)
    stratum_of_document = stratum_I[first]
    for stratum in np.unique(stratum_of_document):
        documents = np.flatnonzero(stratum_of_document == stratum)
        n = len(documents)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=replicates)
        position = np.full(len(first), -1)
        position[documents] = np.arange(n)
        inside_I = np.flatnonzero(position[which_I] >= 0)
        counts_RI[:, inside_I] = drawn[:, position[which_I[inside_I]]]
    return counts_RI


def weighted_mean(value_I: Floats, counts_RI: Counts) -> NDArray[np.float64]:
    """Mean of the values of the drawn items, (R,); NaN where none is drawn."""
    total_R = counts_RI.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((counts_RI @ value_I.astype(np.float64)) / total_R)


def weighted_auc(
    positive_I: NDArray[np.bool_], score_I: Floats, counts_RI: Counts
) -> NDArray[np.float64]:
    """AUC of the drawn items, ties counted half, (R,); NaN where a class is not drawn."""
    order_I = np.argsort(score_I, kind="stable")
    score_I, positive_I, counts_RI = score_I[order_I], positive_I[order_I], counts_RI[:, order_I]
    starts = np.flatnonzero(np.r_[True, np.diff(score_I) > 0])
    above_RU = np.add.reduceat(counts_RI * positive_I, starts, axis=1, dtype=np.float64)
    below_RU = np.add.reduceat(counts_RI * ~positive_I, starts, axis=1, dtype=np.float64)
    lower_RU = np.cumsum(below_RU, axis=1) - below_RU / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (above_RU * lower_RU).sum(axis=1) / (above_RU.sum(axis=1) * below_RU.sum(axis=1))


def weighted_balanced_accuracy(
    positive_I: NDArray[np.bool_], correct_IE: NDArray[np.bool_], counts_RI: Counts
) -> NDArray[np.float64]:
    """(recall of positives + recall of negatives) / 2 of the drawn items, (R, E)."""
    recalls = []
    for chosen_I in (positive_I, ~positive_I):
        counts = counts_RI[:, chosen_I]
        total_R1 = counts.sum(axis=1, keepdims=True, dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            # Counts and flags are small whole numbers: their float32 sums are exact to 2^24.
            recalls.append((counts @ correct_IE[chosen_I].astype(np.float32)) / total_R1)
    return np.asarray((recalls[0] + recalls[1]) / 2)


def over_tasks(value_TR: Floats, *, seed: int) -> NDArray[np.float64]:
    """Mean over tasks, which are drawn again too: replicate r takes replicate r of drawn tasks, (R,).

    Tasks without a value in a replicate (NaN) are left out of its mean.
    """
    n_tasks, replicates = value_TR.shape
    if n_tasks == 1:
        return np.asarray(value_TR[0], dtype=np.float64)
    drawn_RT = generator(seed, "tasks").integers(n_tasks, size=(replicates, n_tasks))
    return mean_defined(value_TR[drawn_RT.T, np.arange(replicates)], axis=0)


def mean_defined(values: Floats, *, axis: int) -> NDArray[np.float64]:
    """The mean of what is not NaN; NaN where nothing is defined."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(defined, values, 0.0).sum(axis=axis) / defined.sum(axis=axis))
