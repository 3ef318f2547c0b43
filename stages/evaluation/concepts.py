"""Concepts of a labelled task, and the probes that say where in the activations they are.

# I items, D d_in, C concepts

A task of more than two classes has a concept a class (this class against the rest); one of two
classes has one, its class 1 (class 0 is the absence of it). Items without a label take no part.

Ground-truth probes (Chanin et al. 2024, arXiv 2409.14507, as the published evaluation trains them):
for each concept the minimum of mean_i(w_i log(1 + exp(-y_i (x_i . w + b)))) + 1e-4 / 2 |w|^2 over
training items, positives weighted by negatives / positives. The published ones are where Adam is
after 50 epochs; here it is the minimum itself, which has no seed. Worked out once a task, for all
SAEs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..metrics.base import TaskData
from .item_bootstrap import Counts, draw_items
from .probes import Probe, Units, f1, fit_l2, positives_weighted

TRAIN, TEST, OOD = 0, 1, 2
WEIGHT_DECAY = 1e-4
LEAST_TRAIN, LEAST_TEST = 2, 1

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Concept:
    """A class that a probe tells from the rest; name: `task` or `task/class`."""

    label: int
    name: str


@dataclass(frozen=True)
class Split:
    """The labelled items of one split: their places in the task, and their labels."""

    item_I: NDArray[np.int64]
    label_I: NDArray[np.int32]

    @classmethod
    def of(cls, task: TaskData, split: int) -> Self:
        item_I = np.flatnonzero((task.split_I == split) & (task.label_I >= 0))
        return cls(item_I, task.label_I[item_I])

    def __len__(self) -> int:
        return len(self.item_I)

    def positive(self, concept: Concept) -> Flags:
        return np.asarray(self.label_I == concept.label)


def concepts(task: TaskData) -> list[Concept]:
    """The concepts of a task, whether or not there are items enough to judge them."""
    if len(task.classes) == 2:
        return [Concept(1, task.name)]
    return [Concept(label, name) for label, name in enumerate(task.classes)]


def shortage(task: TaskData, concept: Concept, *, tested_on: int = TEST) -> str | None:
    """Why a concept cannot be judged: too few items with or without it; None when it can."""
    for split, least in ((TRAIN, LEAST_TRAIN), (tested_on, LEAST_TEST)):
        positive_I = Split.of(task, split).positive(concept)
        found = {"with": int(positive_I.sum()), "without": int((~positive_I).sum())}
        for which, n in found.items():
            if n < least:
                name = ("training", "test", "out-of-distribution")[split]
                return f"{n} {name} items {which} it, and {least} are needed"
    return None


def units_of(task: TaskData) -> Units:
    """The units that probes of a task see activations and latents in."""
    if "units" not in task.cache:
        task.cache["units"] = Units.of(task.x_ID[Split.of(task, TRAIN).item_I])
    units: Units = task.cache["units"]
    return units


@dataclass(frozen=True)
class GroundTruth:
    """Probes of the concepts that can be judged, on activations as they are.

    score of concept c = x . weight_CD[c] + bias_C[c]; f1_C: on the test items; refused: reasons by
    the name of the concepts that have none.
    """

    concepts: tuple[Concept, ...]
    weight_CD: NDArray[np.float64]
    bias_C: NDArray[np.float64]
    f1_C: NDArray[np.float64]
    steps_C: NDArray[np.int64]
    converged_C: Flags
    refused: dict[str, str]

    def scores(self, x_ID: Floats) -> NDArray[np.float64]:
        """(I, C); a concept is found where its score is above 0."""
        return np.asarray(x_ID, dtype=np.float64) @ self.weight_CD.T + self.bias_C


def ground_truth(task: TaskData) -> GroundTruth:
    """The ground-truth probes of a task, from its cache once they are fitted."""
    if "ground_truth" not in task.cache:
        task.cache["ground_truth"] = _fitted(task)
    found: GroundTruth = task.cache["ground_truth"]
    return found


def raw_units(probe: Probe, units: Units) -> tuple[NDArray[np.float64], float]:
    """Weight and bias of a probe for activations as they are."""
    weight_D = probe.weight_K / units.scale
    return weight_D, probe.bias - float(units.mean_D @ weight_D)


def _fitted(task: TaskData) -> GroundTruth:
    units = units_of(task) if len(Split.of(task, TRAIN)) else Units(np.zeros(task.x_ID.shape[1]), 1)
    train, test = Split.of(task, TRAIN), Split.of(task, TEST)
    train_ID = units.activations(task.x_ID[train.item_I])
    test_ID = units.activations(task.x_ID[test.item_I])
    reasons = {concept: shortage(task, concept) for concept in concepts(task)}
    judged = tuple(concept for concept, reason in reasons.items() if reason is None)
    probes, scores = [], []
    for concept in judged:
        positive_I = train.positive(concept)
        probe = fit_l2(
            train_ID,
            positive_I,
            c=1 / (len(train) * WEIGHT_DECAY),
            weight_I=positives_weighted(positive_I),
        )
        probes.append(probe)
        scores.append(f1(test.positive(concept), probe.scores(test_ID) > 0))
    raw = [raw_units(probe, units) for probe in probes]
    return GroundTruth(
        concepts=judged,
        weight_CD=np.array([weight_D for weight_D, _ in raw]).reshape(len(raw), -1),
        bias_C=np.array([bias for _, bias in raw]),
        f1_C=np.array(scores),
        steps_C=np.array([probe.steps for probe in probes], dtype=np.int64),
        converged_C=np.array([probe.converged for probe in probes], dtype=np.bool_),
        refused={concept.name: why for concept, why in reasons.items() if why is not None},
    )


def resampled(task: TaskData, split: int) -> Counts:
    """How often each labelled item of a split is drawn, inside its class (and group), (R, I).

    Kept in the cache of the task: the same for all SAEs, metrics and concepts.
    """
    key = f"resampled/{split}"
    if key not in task.cache:
        chosen = Split.of(task, split)
        group_I = task.group_I[chosen.item_I].astype(np.int64)
        task.cache[key] = draw_items(
            task.document_I[chosen.item_I],
            chosen.label_I.astype(np.int64) * (int(group_I.max(initial=0)) + 2) + group_I + 1,
            seed=task.seed,
            purpose=f"{task.name}/{split}",
        )
    found: Counts = task.cache[key]
    return found
