"""Two labels of the same items, and the probes that spurious correlation removal reads.

# I items, D d_in

A task with two classes and two groups has four quadrants. A biased probe is trained on the two in
which class and group agree (class 1 in group 1, class 0 in group 0), where nothing tells the labels
apart; clean probes for the class and for the group on all four, each quadrant with the same weight.
All are L2 logistic regressions with the ground-truth probes' weight decay (`concepts.py`).
Accuracies are means over the quadrants of the test items, the same as the accuracy on a balanced
set. Worked out once a task, for all SAEs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics.base import TaskData
from .concepts import TEST, TRAIN, WEIGHT_DECAY, raw_units, units_of
from .probes import fit_l2

LEAST_TRAIN, LEAST_TEST = 5, 2

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class RawProbe:
    """score = x . weight_D + bias of activations as they are."""

    weight_D: NDArray[np.float64]
    bias: float

    def scores(self, x_ID: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(x_ID, dtype=np.float64) @ self.weight_D + self.bias


@dataclass(frozen=True)
class Quadrants:
    """Items of one split that have both labels: their places in the task, and the labels."""

    item_I: NDArray[np.int64]
    class_I: Flags
    group_I: Flags

    @classmethod
    def of(cls, task: TaskData, split: int) -> Quadrants:
        has_both_I = (task.label_I >= 0) & (task.group_I >= 0)
        item_I = np.flatnonzero((task.split_I == split) & has_both_I)
        return cls(item_I, task.label_I[item_I] == 1, task.group_I[item_I] == 1)

    @property
    def quadrant_I(self) -> NDArray[np.int64]:
        """0 to 3."""
        return 2 * self.class_I.astype(np.int64) + self.group_I

    def smallest(self) -> int:
        """Items of the smallest quadrant."""
        return int(np.bincount(self.quadrant_I, minlength=4).min())


@dataclass(frozen=True)
class SpuriousProbes:
    """of_class and of_group: clean; biased: of both at once."""

    of_class: RawProbe
    of_group: RawProbe
    biased: RawProbe


def obstacle(task: TaskData) -> str | None:
    """Why a task has no such probes; None when it can have them."""
    if task.groups is None or len(task.groups) != 2 or len(task.classes) != 2:
        n_groups = len(task.groups or ())
        return f"it has {len(task.classes)} classes and {n_groups} groups, and 2 of both are needed"
    for split, least, name in ((TRAIN, LEAST_TRAIN, "training"), (TEST, LEAST_TEST, "test")):
        found = Quadrants.of(task, split).smallest()
        if found < least:
            return (
                f"a pair of class and group has {found} {name} items, and {least} of each of the "
                "four are needed"
            )
    return None


def spurious_probes(task: TaskData) -> SpuriousProbes:
    """The probes of a task without obstacle, from its cache once they are fitted."""
    if "spurious_probes" not in task.cache:
        train = Quadrants.of(task, TRAIN)
        agree_I = train.class_I == train.group_I
        everywhere_I = np.ones(len(agree_I), dtype=np.bool_)
        task.cache["spurious_probes"] = SpuriousProbes(
            of_class=_fitted(task, train, train.class_I, everywhere_I),
            of_group=_fitted(task, train, train.group_I, everywhere_I),
            biased=_fitted(task, train, train.class_I, agree_I),
        )
    found: SpuriousProbes = task.cache["spurious_probes"]
    return found


def _fitted(task: TaskData, train: Quadrants, positive_I: Flags, used_I: Flags) -> RawProbe:
    units = units_of(task)
    quadrant_I = train.quadrant_I[used_I]
    _, place_I, count = np.unique(quadrant_I, return_inverse=True, return_counts=True)
    probe = fit_l2(
        units.activations(task.x_ID[train.item_I[used_I]]),
        positive_I[used_I],
        c=1 / (len(quadrant_I) * WEIGHT_DECAY),
        weight_I=len(quadrant_I) / (len(count) * count[place_I]),
    )
    return RawProbe(*raw_units(probe, units))
