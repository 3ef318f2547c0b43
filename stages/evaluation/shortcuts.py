"""What a probe can tell without looking at activations: the shortcuts that a data set leaves open.

# I items, C columns
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics.base import TaskData
from .concepts import TRAIN, Concept, Split
from .probes import balanced, fit_l2


def lengths(task: TaskData) -> NDArray[np.float64]:
    """log(1 + characters) and log(1 + words) of each text, (I, 2)."""
    if "lengths" not in task.cache:
        counted = [(len(text), len(text.split())) for text in task.texts]
        task.cache["lengths"] = np.log1p(np.array(counted, dtype=np.float64).reshape(-1, 2))
    found: NDArray[np.float64] = task.cache["lengths"]
    return found


def length_scores(task: TaskData, concept: Concept) -> NDArray[np.float64]:
    """Scores of a logistic regression on lengths alone, for all items, (I,)."""
    return _scores(task, concept, "length", lengths(task))


def group_scores(task: TaskData, concept: Concept) -> NDArray[np.float64] | None:
    """Scores of one on the second label alone; None where the task has none."""
    if task.groups is None or (task.group_I < 0).all():
        return None
    columns_IC = task.group_I[:, None] == np.arange(len(task.groups))
    return _scores(task, concept, "group", columns_IC.astype(np.float64))


def _scores(
    task: TaskData, concept: Concept, name: str, columns_IC: NDArray[Any]
) -> NDArray[np.float64]:
    """Of a probe on columns in units of their standard deviation over the training items."""
    key = f"shortcut/{name}/{concept.name}"
    if key not in task.cache:
        train = Split.of(task, TRAIN)
        train_IC = columns_IC[train.item_I]
        deviation_C = train_IC.std(axis=0)
        scaled_IC = (columns_IC - train_IC.mean(axis=0)) / np.where(deviation_C > 0, deviation_C, 1)
        positive_I = train.positive(concept)
        probe = fit_l2(scaled_IC[train.item_I], positive_I, c=1.0, weight_I=balanced(positive_I))
        task.cache[key] = probe.scores(scaled_IC)
    found: NDArray[np.float64] = task.cache[key]
    return found
