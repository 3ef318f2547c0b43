"""Means over seeds, and differences of two groups of runs with their 95 % intervals.

# P pairs of runs, R replicates

A replicate is a metric's value on one bootstrap resample of the documents. Two results that were
judged on the same data with the same seed have the same resamples, so that replicate r of one minus
replicate r of the other is a difference on the same documents: what makes a document easy or hard
drops out of it. The interval is that of the percentiles of those differences, pooled over seeds of
the SAEs, so that what the seed decides widens it.

Else the two are taken as independent, which makes the interval wider, and the difference is called
unpaired: replicates are drawn independently of each other; of two intervals without replicates the
method of variance estimates recovery is used (Zou and Donner 2008, doi:10.1002/sim.3095, eq. 5),

    low  = d - sqrt((a - low_a)^2 + (high_b - b)^2)      d = a - b
    high = d + sqrt((high_a - a)^2 + (b - low_b)^2)

and of several pairs of runs the lowest low and the highest high.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (2.5, 97.5)
_DRAWS = 4000  # of independent pairs of replicates
_LEAST_REPLICATES = 20  # fewer say nothing of a 95 % interval

PAIRED, UNPAIRED, NO_INTERVAL = "paired", "unpaired", "no interval"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run's value. replicates_R: NaN where a resample does not define it; None: there are none.

    low, high: its own interval; seed: of the SAE; judged_with: what has to agree for replicates to
    be of the same resamples.
    """

    value: float
    replicates_R: NDArray[np.float64] | None
    seed: object
    judged_with: object
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over runs, with its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[object, ...] = ()

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of one group minus mean of another; how: paired, unpaired, or no interval."""

    value: float
    low: float | None
    high: float | None
    how: str

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0: what alone makes a difference bold."""
        if self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0


def mean_of(samples: Sequence[Sample]) -> Estimate:
    """The mean over runs; its interval is that of the replicates of all of them pooled."""
    value = float(np.mean([sample.value for sample in samples]))
    low, high = _interval([_finite(sample.replicates_R) for sample in samples])
    if len(samples) == 1 and low is None:
        low, high = samples[0].low, samples[0].high
    return Estimate(value=value, low=low, high=high, seeds=tuple(s.seed for s in samples))


def difference(of: Sequence[Sample], against: Sequence[Sample]) -> Difference:
    """Mean of the one minus mean of the other.

    Runs are paired by their seed where each side has the same seeds, each once; else every run of
    one side with every run of the other.
    """
    value = float(np.mean([s.value for s in of]) - np.mean([s.value for s in against]))
    pairs = _pairs(of, against)
    paired = all(_share_resamples(one, other) for one, other in pairs)
    differences = [_differences(one, other, paired=paired) for one, other in pairs]
    low, high = _interval(differences)
    if low is None:
        low, high = _recovered(pairs)
    if low is None:
        return Difference(value=value, low=None, high=None, how=NO_INTERVAL)
    return Difference(value=value, low=low, high=high, how=PAIRED if paired else UNPAIRED)


def _pairs(of: Sequence[Sample], against: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    by_seed = {sample.seed: sample for sample in against}
    if len(by_seed) == len(against) == len(of) and {s.seed for s in of} == set(by_seed):
        return [(sample, by_seed[sample.seed]) for sample in of]
    return [(one, other) for one in of for other in against]


def _share_resamples(one: Sample, other: Sample) -> bool:
    if one.replicates_R is None or other.replicates_R is None:
        return False
    return one.judged_with == other.judged_with and len(one.replicates_R) == len(other.replicates_R)


def _differences(one: Sample, other: Sample, *, paired: bool) -> NDArray[np.float64] | None:
    if one.replicates_R is None or other.replicates_R is None:
        return None
    if paired:
        return _finite(one.replicates_R - other.replicates_R)
    drawn = []
    generator = np.random.default_rng(0)  # fixed: the same files give the same table
    for replicates_R in map(_finite, (one.replicates_R, other.replicates_R)):
        if replicates_R is None:
            return None
        drawn.append(generator.choice(replicates_R, _DRAWS))
    return np.asarray(drawn[0] - drawn[1])


def _recovered(pairs: Sequence[tuple[Sample, Sample]]) -> tuple[float, float] | tuple[None, None]:
    """From the intervals of the two sides alone; none where a side has none."""
    lows, highs = [], []
    for one, other in pairs:
        a, b = one.value, other.value
        if one.low is None or one.high is None or other.low is None or other.high is None:
            return None, None
        lows.append(a - b - float(np.hypot(a - one.low, other.high - b)))
        highs.append(a - b + float(np.hypot(one.high - a, b - other.low)))
    return min(lows), max(highs)


def _finite(replicates_R: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    if replicates_R is None:
        return None
    finite = replicates_R[np.isfinite(replicates_R)]
    return finite if len(finite) >= _LEAST_REPLICATES else None


def _interval(
    pools: Sequence[NDArray[np.float64] | None],
) -> tuple[float, float] | tuple[None, None]:
    """Percentiles of several pools together, each of the same weight; none where one is missing."""
    found = [pool for pool in pools if pool is not None]
    if len(found) < len(pools) or not found:
        return None, None
    values = np.concatenate(found)
    weights = np.concatenate([np.full(len(pool), 1 / len(pool)) for pool in found])
    if len({len(pool) for pool in found}) == 1:
        low, high = np.percentile(values, PERCENTILES)
    else:
        low, high = (_weighted_quantile(values, weights, q / 100) for q in PERCENTILES)
    return float(low), float(high)


def _weighted_quantile(
    values: NDArray[np.float64], weights: NDArray[np.float64], share: float
) -> float:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(reached, share)])
