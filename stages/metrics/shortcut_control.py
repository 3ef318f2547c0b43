"""Shortcut control: what a latent probe tells beyond what can be told without the latents.

# I items, S d_sae, K = 5 latents of a probe

A latent probe is credited only above what a shortcut reaches. The latent probe is that of
`sparse_probing` with k = 5; scored by AUC on the test items and, where there are any, on those out
of distribution (keys that begin with ood_).

    latent_auc     the latent probe
    length_auc     a logistic regression on text length alone: log(1 + characters), log(1 + words)
    group_auc      one on the second label alone (a planted or known spurious feature), where the
                   task has one
    credited_auc   latent_auc - max(0.5, length_auc, group_auc), mean over tasks; below 0 a shortcut
                   beats the latents. The larger shortcut is chosen again in each replicate
    within_group_auc   of the latent probe, inside each group, mean over groups: what is left where
                   the second label tells nothing
    shuffled_auc   the latent probe with its training labels permuted, its latents chosen by the
                   permuted labels too; mean of 5 permutations. Of one task it lies anywhere (one
                   strong latent, of either sign); far from 0.5 over many tasks, something leaks

Intervals: items drawn again inside each class (and group), and, of more than one task, tasks too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ...storage.counter import permutation, stream_key
from ..evaluation.bootstrap import described
from ..evaluation.concepts import (
    OOD,
    TEST,
    TRAIN,
    Concept,
    Split,
    concepts,
    resampled,
    shortage,
    units_of,
)
from ..evaluation.probes import balanced, fit_l2, most_different, one_thread
from ..evaluation.probing import Found, TaskMeans, auc_of
from ..evaluation.shortcuts import group_scores, length_scores
from .base import Direction, MetricResult, TaskData

if TYPE_CHECKING:
    from ..evaluation.judged import Judged

K = 5
PERMUTATIONS = 5
_KINDS = ("credited", "latent", "length", "group", "within_group", "shuffled")

Flags = NDArray[np.bool_]
Scores = NDArray[np.float64]


@dataclass
class ShortcutControl:
    definition: ClassVar[str] = (
        "AUC of a probe on 5 latents above the better shortcut (text length or second label), "
        "mean over tasks"
    )
    direction: ClassVar[Direction] = "up"
    version: ClassVar[int] = 1
    suites: ClassVar[tuple[str, ...]] = ("ood", "probes", "csv")

    _means: TaskMeans = field(default_factory=TaskMeans)
    _details: list[dict[str, Any]] = field(default_factory=list)
    _refused: dict[str, str] = field(default_factory=dict)
    _n_items: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"k": K, "permutations": PERMUTATIONS}

    @one_thread()
    def observe(self, task: TaskData, judged: Judged, latents_IS: csr_array) -> None:
        found: list[dict[str, Found]] = []
        for concept in concepts(task):
            why = shortage(task, concept)
            if why is not None:
                self._refused[concept.name] = why
                continue
            score = _all_scores(task, concept, latents_IS)
            each = _judged(task, concept, score, TEST)
            if shortage(task, concept, tested_on=OOD) is None:
                outside = _judged(task, concept, score, OOD)
                each |= {f"ood_{name}": number for name, number in outside.items()}
            numbers = {name: number.value for name, number in each.items()}
            self._details.append({"task": task.name, "concept": concept.name} | numbers)
            found.append(each)
        if found:
            self._n_items += len(Split.of(task, TEST))
            shared = [name for name in found[0] if all(name in each for each in found)]
            together = {name: Found.mean([each[name] for each in found]) for name in shared}
            self._means.add(task.name, together)

    @one_thread()
    def result(self, *, seed: int) -> MetricResult:
        n_tasks = len(self._means.tasks)
        details: dict[str, Any] = {"tasks": self._details, "refused_concepts": self._refused}
        if not n_tasks:
            details["refused"] = "No task has items enough for a probe; see refused_concepts."
        names = [f"{kind}_auc" for kind in _KINDS]
        names += [f"ood_{name}" for name in names]
        measured = [
            name for name in names if any(name in each for each in self._means.tasks.values())
        ]
        units = "items, inside each class" + (", and over tasks" if n_tasks > 1 else "")
        return MetricResult(
            values={
                name: self._means.value(name, seed=seed)
                for name in (measured or names[: len(_KINDS)])
            },
            sample={"tasks": n_tasks, "items": self._n_items, "refused": len(self._refused)},
            interval=described(units, self._n_items),
            details=details,
        )


def _all_scores(task: TaskData, concept: Concept, latents_IS: csr_array) -> dict[str, list[Scores]]:
    """Scores for all items of each kind of probe; several of the shuffled one."""
    train = Split.of(task, TRAIN)
    positive_I = train.positive(concept)
    shuffled = []
    for each in range(PERMUTATIONS):
        key = stream_key(task.seed, "shuffled labels", task.name, concept.name, each)
        order_I = permutation(key, len(positive_I))
        shuffled.append(_latent_scores(task, latents_IS, train.item_I, positive_I[order_I]))
    scores = {
        "latent": [_latent_scores(task, latents_IS, train.item_I, positive_I)],
        "shuffled": shuffled,
        "length": [length_scores(task, concept)],
    }
    group_I = group_scores(task, concept)
    return scores if group_I is None else scores | {"group": [group_I]}


def _latent_scores(
    task: TaskData, latents_IS: csr_array, train_I: NDArray[np.int64], positive_I: Flags
) -> Scores:
    chosen_K = most_different(csr_array(latents_IS[train_I]), positive_I, K)
    x_IK = latents_IS[:, chosen_K].toarray() / units_of(task).scale
    probe = fit_l2(x_IK[train_I], positive_I, c=1.0, weight_I=balanced(positive_I))
    return probe.scores(x_IK)


def _judged(
    task: TaskData, concept: Concept, scores: dict[str, list[Scores]], split: int
) -> dict[str, Found]:
    """AUCs on the items of a split, and the credit."""
    chosen, counts_RI = Split.of(task, split), resampled(task, split)
    positive_I = chosen.positive(concept)
    found = {
        f"{kind}_auc": Found.mean(
            [auc_of(positive_I, score_I[chosen.item_I], counts_RI) for score_I in each]
        )
        for kind, each in scores.items()
    }
    best = found["length_auc"].at_least(0.5)
    if "group_auc" in found:
        best = best.or_more(found["group_auc"])
    found["credited_auc"] = found["latent_auc"] - best
    if "group_auc" in found:
        group_I, score_I = task.group_I[chosen.item_I], scores["latent"][0][chosen.item_I]
        inside = [
            auc_of(positive_I[is_in_I], score_I[is_in_I], counts_RI[:, is_in_I])
            for is_in_I in (group_I == group for group in np.unique(group_I[group_I >= 0]))
            if 0 < positive_I[is_in_I].sum() < is_in_I.sum()
        ]
        if inside:
            found["within_group_auc"] = Found.mean(inside)
    return found
