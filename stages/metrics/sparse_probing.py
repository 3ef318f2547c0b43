"""Sparse probing: what a logistic regression on the k latents that differ most can tell.

# I items, S d_sae, K latents of a probe

Gurnee et al. 2023 (arXiv 2305.01610), as SAEBench scores SAEs. Of a concept: the k latents with the
largest |mean over positives - mean over negatives| of the training items; logistic regression with
C = 1 on them, classes balanced by weights; accuracy on the test items, balanced over the two
classes (on a set with as many of both, the published case, both are no change). k = 1, 2, 5.

    accuracy_k1 _k2 _k5   mean over tasks, 0.5 (chance) to 1; of a task with more than two classes,
                          mean over its classes against the rest
    auc_k1 _k2 _k5        area under the ROC curve of the same probes
    oracle_accuracy, oracle_auc   the same regression on all dimensions of the raw activations
    gap_to_oracle         oracle_accuracy - accuracy_k5

Units, centring and solver: `evaluation/probes.py`. Intervals: items drawn again inside each class,
and, of more than one task, tasks drawn again too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from scipy.sparse import csr_array

from ..evaluation.bootstrap import described
from ..evaluation.concepts import (
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
from ..evaluation.probing import Found, Score, TaskMeans
from .base import Direction, MetricResult, TaskData

if TYPE_CHECKING:
    from ..evaluation.judged import Judged

KS = (1, 2, 5)
C = 1.0


@dataclass
class SparseProbing:
    definition: ClassVar[str] = (
        "test accuracy of a logistic regression on the k latents whose class means differ most, "
        "mean over tasks"
    )
    direction: ClassVar[Direction] = "up"
    version: ClassVar[int] = 1
    suites: ClassVar[tuple[str, ...]] = ("probes", "ood", "letters", "csv")

    _means: TaskMeans = field(default_factory=TaskMeans)
    _details: list[dict[str, Any]] = field(default_factory=list)
    _refused: dict[str, str] = field(default_factory=dict)
    _n_items: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"k": list(KS)}

    @one_thread()
    def observe(self, task: TaskData, judged: Judged, latents_IS: csr_array) -> None:
        found: list[dict[str, Found]] = []
        for concept in concepts(task):
            why = shortage(task, concept)
            if why is not None:
                self._refused[concept.name] = why
                continue
            scores, latents = _scores(task, concept, latents_IS)
            oracle = _oracle(task, concept)
            self._details.append(
                {"task": task.name, "concept": concept.name, "latents": latents}
                | {f"k{k}": score.described() for k, score in scores.items()}
                | {"oracle": oracle.described()}
            )
            each = {f"accuracy_k{k}": score.accuracy for k, score in scores.items()}
            each |= {f"auc_k{k}": score.auc for k, score in scores.items()}
            each |= {"oracle_accuracy": oracle.accuracy, "oracle_auc": oracle.auc}
            each["gap_to_oracle"] = oracle.accuracy - scores[KS[-1]].accuracy
            found.append(each)
        if found:
            self._n_items += len(Split.of(task, TEST))
            together = {name: Found.mean([each[name] for each in found]) for name in found[0]}
            self._means.add(task.name, together)

    @one_thread()
    def result(self, *, seed: int) -> MetricResult:
        n_tasks = len(self._means.tasks)
        details: dict[str, Any] = {"tasks": self._details, "refused_concepts": self._refused}
        if not n_tasks:
            details["refused"] = "No task has items enough for a probe; see refused_concepts."
        units = "items, inside each class" + (", and over tasks" if n_tasks > 1 else "")
        return MetricResult(
            values={name: self._means.value(name, seed=seed) for name in _names()},
            sample={"tasks": n_tasks, "items": self._n_items, "refused": len(self._refused)},
            interval=described(units, self._n_items),
            details=details,
        )


def _names() -> list[str]:
    of_k = [f"{name}_k{k}" for name in ("accuracy", "auc") for k in KS]
    return [*of_k, "oracle_accuracy", "oracle_auc", "gap_to_oracle"]


def _scores(
    task: TaskData, concept: Concept, latents_IS: csr_array
) -> tuple[dict[int, Score], list[int]]:
    """Scores by k, and the latents that the largest k takes."""
    train, test = Split.of(task, TRAIN), Split.of(task, TEST)
    scale, positive_I = units_of(task).scale, train.positive(concept)
    train_IS = csr_array(latents_IS[train.item_I])
    chosen_K = most_different(train_IS, positive_I, max(KS))
    train_IK = train_IS[:, chosen_K].toarray() / scale
    test_IK = latents_IS[test.item_I][:, chosen_K].toarray() / scale
    scores = {}
    for k in KS:
        probe = fit_l2(train_IK[:, :k], positive_I, c=C, weight_I=balanced(positive_I))
        score_I = probe.scores(test_IK[:, :k])
        scores[k] = Score.of(test.positive(concept), score_I, resampled(task, TEST))
    return scores, chosen_K.tolist()


def _oracle(task: TaskData, concept: Concept) -> Score:
    """The probe on raw activations, once for all SAEs."""
    key = f"sparse_probing/{concept.name}"
    if key not in task.cache:
        units, train, test = units_of(task), Split.of(task, TRAIN), Split.of(task, TEST)
        positive_I = train.positive(concept)
        probe = fit_l2(
            units.activations(task.x_ID[train.item_I]),
            positive_I,
            c=C,
            weight_I=balanced(positive_I),
        )
        score_I = probe.scores(units.activations(task.x_ID[test.item_I]))
        task.cache[key] = Score.of(test.positive(concept), score_I, resampled(task, TEST))
    found: Score = task.cache[key]
    return found
