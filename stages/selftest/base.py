"""What a planted case gives, and judged objects made by hand.

# B rows, I items, D d_in, S d_sae
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..metrics.base import MetricResult, TaskData

Floats = NDArray[np.floating[Any]]

# Of numbers that are exact but for float32, which latents and reconstructions are in.
EXACT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number: what it has to be, and what it is.

    metric: a name of METRICS, or what else is looked at; value: which of its numbers. None as
    what is expected: there must be no number.
    """

    metric: str
    value: str
    expected: float | None
    found: float | None
    tolerance: float = EXACT

    @property
    def passed(self) -> bool:
        if self.expected is None or self.found is None:
            return self.expected is self.found
        return math.isfinite(self.found) and abs(self.found - self.expected) <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A check of a case, or the error that ended the case; seconds: its share of the case's."""

    case: str
    seconds: float
    check: Check | None = None
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.check is not None and self.check.passed


def checks_of(
    metric: str,
    found: MetricResult,
    expected: dict[str, float | None],
    tolerance: float = EXACT,
) -> list[Check]:
    """A check for each value that is expected."""
    return [
        Check(
            metric=metric,
            value=name,
            expected=value,
            found=found.values[name].value,
            tolerance=tolerance,
        )
        for name, value in expected.items()
    ]


def labelled_task(
    x_ID: Floats,
    label_I: NDArray[np.integer[Any]],
    split_I: NDArray[np.integer[Any]],
    *,
    name: str,
    classes: Sequence[str] = ("without", "with"),
    suite: str = "csv",
    group_I: NDArray[np.integer[Any]] | None = None,
    texts: Sequence[str] | None = None,
) -> TaskData:
    """A task of an evaluation set, every item a document of its own."""
    from ..metrics.base import TaskData

    n_items = len(x_ID)
    return TaskData(
        name=name,
        suite=suite,
        classes=list(classes),
        groups=None if group_I is None else ["group 0", "group 1"],
        x_ID=np.asarray(x_ID, np.float32),
        label_I=label_I.astype(np.int32),
        group_I=np.full(n_items, -1, np.int32) if group_I is None else group_I.astype(np.int32),
        split_I=split_I.astype(np.uint8),
        document_I=np.arange(n_items, dtype=np.int64),
        texts=[f"item {item}" for item in range(n_items)] if texts is None else texts,
        seed=0,
    )
