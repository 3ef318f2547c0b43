"""Intervals by resampling whole documents: the bootstrap (Efron 1979), percentile intervals.

# U units (documents), R resamples, K whatever is summed

Rows of one document are alike, so that rows are not independent draws and documents (nearly) are:
a resample draws U documents with replacement, each with all of its rows. Draws are counter-based
(storage/counter.py): the same seed and number of units give the same resamples to every metric and
every SAE, which is what makes differences between two SAEs a matter of subtracting replicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...storage.counter import draw, stream_key
from ..metrics.base import Value

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK_BYTES = 1 << 25  # of draws that are held at once
_LEAST_DEFINED = 0.9  # share of resamples that must define a value for an interval to be given
_DIGITS = 7


@dataclass(frozen=True)
class Resamples:
    """R draws of U units with replacement; the same for the same seed, U and stream.

    stream: of draws that have nothing to do with those of another.
    """

    n_units: int
    seed: int
    count: int = RESAMPLES
    stream: str = ""

    @property
    def is_possible(self) -> bool:
        """Whether there is anything to resample: one unit has no spread."""
        return self.n_units > 1

    def units(self) -> Iterator[NDArray[np.int64]]:
        """The drawn units, in pieces (some resamples, U) that together have R rows."""
        key = stream_key(self.seed, "bootstrap", self.n_units, self.stream)
        step = max(1, _CHUNK_BYTES // (8 * max(self.n_units, 1)))
        for start in range(0, self.count, step):
            resamples = np.arange(start, min(start + step, self.count), dtype=np.uint64)
            counters = resamples[:, None] * np.uint64(self.n_units) + np.arange(
                self.n_units, dtype=np.uint64
            )
            upper = draw(key, counters) >> np.uint64(32)
            yield ((upper * np.uint64(self.n_units)) >> np.uint64(32)).astype(np.int64)

    def weights(self) -> Iterator[NDArray[np.float64]]:
        """How often each unit was drawn, in pieces (some resamples, U)."""
        for units in self.units():
            offset = np.arange(len(units))[:, None] * self.n_units
            counts = np.bincount((units + offset).ravel(), minlength=units.size)
            yield counts.reshape(units.shape).astype(np.float64)

    def totals(self, sums_U: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of sums over each unit's rows (U, ...): their totals in each resample (R, ...)."""
        flat_UK = sums_U.reshape(self.n_units, -1)
        found = [weights @ flat_UK for weights in self.weights()]
        return np.concatenate(found).reshape(self.count, *sums_U.shape[1:])


def units_of(labels: ArrayLike) -> tuple[NDArray[np.int64], int]:
    """Any labels (document numbers) as dense units 0 .. U - 1, and U."""
    values, dense = np.unique(np.asarray(labels), return_inverse=True)
    return dense.reshape(-1).astype(np.int64), len(values)


def valued(value: float, replicates: ArrayLike | None = None) -> Value:
    """A value with its 95 % percentile interval, replicates kept to 7 digits.

    What is NaN or infinite becomes None. Without replicates, or where more than a tenth of the
    resamples do not define the value, there is no interval.
    """
    point = float(value) if math.isfinite(value) else None
    if replicates is None or point is None:
        return Value(value=point)
    found_R = np.asarray(replicates, dtype=np.float64)
    defined = found_R[np.isfinite(found_R)]
    if len(defined) < max(_LEAST_DEFINED * len(found_R), 2):
        return Value(value=point)
    low, high = percentile_interval(defined)
    return Value(value=point, low=low, high=high, replicates=rounded(found_R))


def percentile_interval(replicates: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of replicates, all of them finite."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def rounded(values: NDArray[np.float64]) -> tuple[float | None, ...]:
    """Numbers to 7 significant digits; None for what is not finite."""
    return tuple(
        float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()
    )


def described(unit: str, n_units: int, count: int = RESAMPLES) -> str:
    """How an interval was made, for a result: unit is a plural, such as documents."""
    if n_units < 2:
        return f"none: fewer than two {unit}"
    return f"{LEVEL:.0%}, bootstrap over {unit}, {count} resamples".replace("%", " %")


def bootstrapped(
    sums_U: dict[str, NDArray[np.float64]],
    resamples: Resamples,
) -> dict[str, NDArray[Any]]:
    """Totals of each named sum (U,) in each resample: (R,)."""
    names = list(sums_U)
    stacked_UK = np.stack([sums_U[name] for name in names], axis=1)
    totals_RK = resamples.totals(stacked_UK)
    return {name: totals_RK[:, place] for place, name in enumerate(names)}
