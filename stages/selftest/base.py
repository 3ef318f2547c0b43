"""What a planted case gives: numbers, what they have to be, and how far apart they may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..metrics.base import MetricResult

# Of numbers that are exact but for float32, which latents and reconstructions are in.
EXACT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number: passes when it is not further than `tolerance` from what is expected.

    metric: a name of METRICS, or what else is tried; name: which of its values.
    """

    metric: str
    name: str
    expected: float
    found: float | None
    tolerance: float = EXACT

    @property
    def passed(self) -> bool:
        """False for a number that is missing or NaN."""
        found = math.nan if self.found is None else self.found
        return abs(found - self.expected) <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """A case, its checks, and how long it took; error: what ended it instead, with its traceback."""

    case: str
    checks: tuple[Check, ...]
    seconds: float
    error: str | None = None

    @property
    def n_failed(self) -> int:
        """Numbers that are wrong; an error counts as one."""
        return sum(not check.passed for check in self.checks) + (self.error is not None)


def checks_of(
    metric: str, found: MetricResult, expected: Mapping[str, float], tolerance: float = EXACT
) -> Iterator[Check]:
    """A check for each value of a result that is expected."""
    for name, value in expected.items():
        yield Check(
            metric=metric,
            name=name,
            expected=value,
            found=found.values[name].value,
            tolerance=tolerance,
        )
