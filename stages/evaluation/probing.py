"""What a probe scores on the items that it is judged on, with replicates; and means over tasks.

# I items, S d_sae, K columns a probe sees, R replicates, T tasks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..metrics.base import Value
from .bootstrap import valued
from .item_bootstrap import (
    Counts,
    mean_defined,
    over_tasks,
    weighted_accuracy,
    weighted_auc,
)
from .probes import auc, balanced_accuracy, f1

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """A number and its replicates (R,)."""

    value: float
    replicates: Floats

    @classmethod
    def mean(cls, parts: Sequence[Self]) -> Self:
        """The mean of several that were drawn together, such as the classes of one task."""
        return cls(
            float(mean_defined(np.array([part.value for part in parts]), axis=0)),
            mean_defined(np.stack([part.replicates for part in parts]), axis=0),
        )

    def __sub__(self, other: Found) -> Found:
        return Found(self.value - other.value, self.replicates - other.replicates)

    def at_least(self, floor: float) -> Found:
        return Found(max(self.value, floor), np.maximum(self.replicates, floor))

    def or_more(self, other: Found) -> Found:
        """The larger of two, in each replicate too."""
        return Found(max(self.value, other.value), np.maximum(self.replicates, other.replicates))


@dataclass(frozen=True)
class Score:
    """How a probe does on items: balanced accuracy, AUC, F1 (a positive answer: score above 0)."""

    accuracy: Found
    auc: Found
    f1: float

    @classmethod
    def of(cls, positive_I: Flags, score_I: Floats, counts_RI: Counts) -> Self:
        answer_I = score_I > 0
        right_I1 = (answer_I == positive_I)[:, None]
        return cls(
            Found(
                balanced_accuracy(positive_I, answer_I),
                weighted_accuracy(positive_I, right_I1, counts_RI)[:, 0],
            ),
            auc_of(positive_I, score_I, counts_RI),
            f1(positive_I, answer_I),
        )

    def described(self) -> dict[str, float]:
        return {"accuracy": self.accuracy.value, "auc": self.auc.value, "f1": self.f1}


def auc_of(positive_I: Flags, score_I: Floats, counts_RI: Counts) -> Found:
    return Found(auc(positive_I, score_I), weighted_auc(positive_I, score_I, counts_RI))


@dataclass
class TaskMeans:
    """Numbers by name and task; their mean over tasks with an interval over tasks and items."""

    tasks: dict[str, Mapping[str, Found]] = field(default_factory=dict)

    def add(self, task: str, found: Mapping[str, Found]) -> None:
        self.tasks[task] = found

    def value(self, name: str, *, seed: int, without: Sequence[str] = ()) -> Value:
        """The mean over tasks that have it, tasks `without` left out; None over none."""
        chosen = [
            found[name]
            for task, found in self.tasks.items()
            if name in found and task not in without
        ]
        if not chosen:
            return Value(value=None)
        values_T = np.array([found.value for found in chosen])
        replicates_TR = np.stack([found.replicates for found in chosen])
        return valued(float(mean_defined(values_T, axis=0)), over_tasks(replicates_TR, seed=seed))
