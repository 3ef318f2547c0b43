"""Intervals of item metrics: documents drawn again with replacement, inside each stratum.

# R replicates, I items, E score columns

Counts (R, I) say how often an item is in a replicate. They depend on documents, strata and the seed
alone, so that two SAEs judged on the same items with the same seed have the same replicates, and
their difference has an interval of its own. Strata are what a metric averages over (letters,
classes), so that none is ever empty in a replicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...storage.counter import draw, stream_key
from .bootstrap import RESAMPLES

Floats = NDArray[np.floating[Any]]
Whole = NDArray[np.integer[Any]]
Counts = NDArray[np.float32]

_PIECE_VALUES = 1 << 22


def draw_units(
    n_units: int, *, seed: int, purpose: str
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Units drawn with replacement, as many as there are, in pieces: which of the R resamples, and
    what they drew (resamples of the piece, n_units)."""
    key = stream_key(seed, "item bootstrap", purpose, n_units)
    for piece in _pieces(n_units):
        counters = np.arange(piece.start * n_units, piece.stop * n_units, dtype=np.uint64)
        upper = draw(key, counters) >> np.uint64(32)
        units = ((upper * np.uint64(n_units)) >> np.uint64(32)).astype(np.int64)
        yield piece, units.reshape(-1, n_units)


def draw_items(document_I: Whole, stratum_I: Whole, *, seed: int, purpose: str) -> Counts:
    """How often each item is drawn, (R, I). A document belongs to the stratum of its first item."""
    counts_RI = np.zeros((RESAMPLES, len(document_I)), dtype=np.float32)
    _, first, which_I = np.unique(document_I, return_index=True, return_inverse=True)
    stratum_of_document = stratum_I[first]
    for stratum in np.unique(stratum_of_document).tolist():
        documents = np.flatnonzero(stratum_of_document == stratum)
        n = len(documents)
        place = np.full(len(first), -1)
        place[documents] = np.arange(n)
        inside_I = np.flatnonzero(place[which_I] >= 0)
        for piece, drawn_RN in draw_units(n, seed=seed, purpose=f"{purpose}/{stratum}"):
            offset_R1 = np.arange(len(drawn_RN))[:, None] * n
            often_RN = np.bincount((drawn_RN + offset_R1).ravel(), minlength=drawn_RN.size)
            often_RN = often_RN.reshape(drawn_RN.shape)
            counts_RI[piece, inside_I] = often_RN[:, place[which_I[inside_I]]]
    return counts_RI


def _pieces(n_columns: int) -> Iterator[slice]:
    """The R resamples in pieces of so many numbers as may be held at once."""
    step = max(1, _PIECE_VALUES // max(n_columns, 1))
    for start in range(0, RESAMPLES, step):
        yield slice(start, min(start + step, RESAMPLES))


def weighted_mean(value_I: Floats, counts_RI: Counts) -> NDArray[np.float64]:
    """Mean of the values of the drawn items, (R,); NaN where none is drawn."""
    total_R = counts_RI.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((counts_RI @ value_I.astype(np.float64)) / total_R)


def weighted_auc(
    positive_I: NDArray[np.bool_], score_I: Floats, counts_RI: Counts
) -> NDArray[np.float64]:
    """AUC of the drawn items, ties counted half, (R,); NaN where a class is not drawn."""
    negative_N = np.flatnonzero(~positive_I)
    negative_N = negative_N[np.argsort(score_I[negative_N], kind="stable")]
    # Of each positive: how many of the sorted negatives are below it, and how many not above it.
    below_P, upto_P = (
        np.searchsorted(score_I[negative_N], score_I[positive_I], side=side)
        for side in ("left", "right")
    )
    parts = []
    for piece in _pieces(len(score_I)):
        summed_RN = np.zeros((piece.stop - piece.start, len(negative_N) + 1))
        np.cumsum(counts_RI[piece, negative_N], axis=1, out=summed_RN[:, 1:])
        beaten_RP = (summed_RN[:, below_P] + summed_RN[:, upto_P]) / 2
        positives_RP = counts_RI[piece, positive_I]
        pairs_R = positives_RP.sum(axis=1, dtype=np.float64) * summed_RN[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(np.einsum("rp,rp->r", positives_RP, beaten_RP) / pairs_R)
    return np.concatenate(parts)


def weighted_accuracy(
    stratum_I: Whole | NDArray[np.bool_], correct_IE: NDArray[np.bool_], counts_RI: Counts
) -> NDArray[np.float64]:
    """Mean over strata of the share of drawn items that are right, (R, E).

    With classes as strata it is the balanced accuracy. NaN where a stratum is not drawn.
    """
    strata = np.unique(stratum_I)
    total_RE = np.zeros((len(counts_RI), correct_IE.shape[1]))
    for stratum in strata.tolist():
        counts = counts_RI[:, stratum_I == stratum]
        # Counts and flags are small whole numbers: their float32 sums are exact to 2^24.
        right_RE = counts @ correct_IE[stratum_I == stratum].astype(np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            total_RE += right_RE / counts.sum(axis=1, keepdims=True, dtype=np.float64)
    return total_RE / len(strata)


def over_tasks(value_TR: Floats, *, seed: int) -> NDArray[np.float64]:
    """Mean over tasks, which are drawn again too: replicate r takes replicate r of drawn tasks, (R,).

    Tasks without a value in a replicate (NaN) are left out of its mean.
    """
    n_tasks = len(value_TR)
    if n_tasks == 1:
        return np.asarray(value_TR[0], dtype=np.float64)
    drawn = [units for _, units in draw_units(n_tasks, seed=seed, purpose="tasks")]
    drawn_RT = np.concatenate(drawn)
    return mean_defined(value_TR[drawn_RT.T, np.arange(RESAMPLES)], axis=0)


def mean_defined(values: Floats, *, axis: int) -> NDArray[np.float64]:
    """The mean of what is not NaN; NaN where nothing is defined."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(defined, values, 0.0).sum(axis=axis) / defined.sum(axis=axis))
