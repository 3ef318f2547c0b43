"""Metrics on planted cases whose answers are known: a user's proof that they are right here.

A case is a function that makes data with a known truth, judges it by the metrics of the registry
and gives checks: what was found, what must be found, and how far apart they may be. To add one: a
function here below, one line in CASES. Cases are named by strings, so that listing them imports no
torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number: passes when it is not further than `tolerance` from what is expected."""

    name: str
    expected: float
    found: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        """False for a number that is missing or NaN."""
        found = math.nan if self.found is None else self.found
        return abs(found - self.expected) <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """A case, its checks, and how long it took."""

    case: str
    checks: tuple[Check, ...]
    seconds: float


CASES: dict[str, str] = {
    "reconstruction": "of_rows:reconstruction",
    "inference-time optimisation": "of_rows:pursuit",
    "absorption": "of_items:absorption",
    "probing": "of_items:probing",
    "out of distribution": "of_items:out_of_distribution",
    "probe loss": "of_items:best_probe_loss",
    "targeted perturbation": "of_items:targeted_perturbation",
    "spurious correlation removal": "of_items:spurious_correlation",
    "downstream loss": "of_text:downstream_loss",
}


def run_cases() -> Iterator[CaseResult]:
    """All cases, one after another. What a metric raises is our bug, and is not caught."""
    for name, where in CASES.items():
        module, _, function = where.partition(":")
        begun = time.monotonic()
        checks = tuple(getattr(import_module(f".{module}", __name__), function)())
        yield CaseResult(case=name, checks=checks, seconds=time.monotonic() - begun)
