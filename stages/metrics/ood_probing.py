"""Out-of-distribution probing: does a probe on latents still tell, where the data has shifted?

# I items, D d_in, S d_sae, K latents of a probe

Kantamneni et al. 2025, "Are Sparse Autoencoders Useful?" (arXiv 2502.16681), as sae-probes
implements it. On the training items: for the SAE, the k latents with the largest |difference of
class means| and an L1 logistic regression on them; as oracle, an L2 logistic regression on the raw
activations; each with the C of logspace(5, -5, 10) that has the best AUC on the last 100 training
items, then fitted on all. L1 fits end after 50 steps, converged or not. Scored by AUC on the test
items and on those out of distribution.

The published protocol exists in variants: k = 128 with 512 items a class, and k in {16, 128}. Here
k = 128 is the score, on the training items that the evaluation set has; k = 16 stands beside it.

    ood_auc, id_auc              mean over sets, out of and in distribution, k = 128; 0.5 is chance
    ood_auc_k16                  with k = 16
    oracle_ood_auc, oracle_id_auc
    gap_to_oracle                oracle_ood_auc - ood_auc
    drop, oracle_drop            id_auc - ood_auc, of the latents and of the oracle
    length_ood_auc               what text length alone tells out of distribution
    ..._without_malformed        without 90_glue_qnli, whose prompts out of distribution lack the
                                 separator that all training prompts have

C counts in the units of `evaluation/probes.py`. Intervals: items drawn again inside each class, and
sets drawn again too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

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
from ..evaluation.probes import Probe, choose_c, fit_l1, fit_l2, most_different, one_thread
from ..evaluation.probing import Found, TaskMeans, auc_of
from ..evaluation.shortcuts import length_scores
from .base import Direction, MetricResult, TaskData

if TYPE_CHECKING:
    from ..evaluation.judged import Judged

K, OTHER_K = 128, 16
# Where training items can be told apart without error, weights of a large C grow for thousands of
# steps, 50 ms each at L0 = 40. Between 40 and 1000 steps the AUC on held-back items moved by 0.004
# in the slowest set measured (73_control-group, C = 1e5); `steps` and `converged` stand in details.
MOST_STEPS = 50
MALFORMED = "qnli"
_WITH_AND_WITHOUT = ("ood_auc", "oracle_ood_auc", "gap_to_oracle")


@dataclass
class OodProbing:
    definition: ClassVar[str] = (
        "AUC out of distribution of an L1 logistic regression on the 128 latents whose class means "
        "differ most, mean over sets (Kantamneni et al. 2025)"
    )
    direction: ClassVar[Direction] = "up"
    version: ClassVar[int] = 1
    suites: ClassVar[tuple[str, ...]] = ("ood", "csv")

    _means: TaskMeans = field(default_factory=TaskMeans)
    _details: list[dict[str, Any]] = field(default_factory=list)
    _refused: dict[str, str] = field(default_factory=dict)
    _n_items: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"k": K}

    @one_thread()
    def observe(self, task: TaskData, judged: Judged, latents_IS: csr_array) -> None:
        found: list[dict[str, Found]] = []
        for concept in concepts(task):
            why = shortage(task, concept, tested_on=OOD) or shortage(task, concept)
            if why is not None:
                self._refused[concept.name] = why
                continue
            each, details = _judged(task, concept, latents_IS)
            found.append(each)
            self._details.append({"task": task.name, "concept": concept.name} | details)
        if found:
            self._n_items += len(Split.of(task, OOD))
            together = {name: Found.mean([each[name] for each in found]) for name in found[0]}
            self._means.add(task.name, together)

    @one_thread()
    def result(self, *, seed: int) -> MetricResult:
        tasks = self._means.tasks
        malformed = [task for task in tasks if MALFORMED in task]
        details: dict[str, Any] = {"tasks": self._details, "refused_concepts": self._refused}
        details["malformed"] = malformed
        if not tasks:
            details["refused"] = "No task has items enough out of distribution for a probe."
        values = {name: self._means.value(name, seed=seed) for name in _NAMES}
        for name in _WITH_AND_WITHOUT:
            values[f"{name}_without_malformed"] = self._means.value(
                name, seed=seed, without=malformed
            )
        units = "items, inside each class" + (", and over sets" if len(tasks) > 1 else "")
        return MetricResult(
            values=values,
            sample={"sets": len(tasks), "items": self._n_items, "refused": len(self._refused)},
            interval=described(units, self._n_items),
            details=details,
        )


_NAMES = (
    "ood_auc", "id_auc", "ood_auc_k16", "oracle_ood_auc", "oracle_id_auc", "gap_to_oracle", "drop",
    "oracle_drop", "length_ood_auc",
)  # fmt: skip


def _judged(
    task: TaskData, concept: Concept, latents_IS: csr_array
) -> tuple[dict[str, Found], dict[str, Any]]:
    """Numbers with replicates, and what stands in details."""
    train = Split.of(task, TRAIN)
    positive_I, scale = train.positive(concept), units_of(task).scale
    train_IS = csr_array(latents_IS[train.item_I])
    chosen_K = most_different(train_IS, positive_I, K)
    all_IK = np.asarray(latents_IS[:, chosen_K].toarray() / scale, dtype=np.float64)

    def fit(x_IK: NDArray[Any], positive_I: NDArray[np.bool_], c: float) -> Probe:
        return fit_l1(x_IK, positive_I, c=c, seed=task.seed, most_steps=MOST_STEPS)

    details: dict[str, Any] = {"latents": chosen_K[:OTHER_K].tolist()}
    found: dict[str, Found] = {}
    for k, suffix in ((K, ""), (OTHER_K, "_k16")):
        c, _ = choose_c(fit, all_IK[train.item_I, :k], positive_I)
        probe = fit(all_IK[train.item_I, :k], positive_I, c)
        score_I = probe.scores(all_IK[:, :k])
        for split, name in ((TEST, "id_auc"), (OOD, "ood_auc")):
            found[name + suffix] = _auc(task, concept, split, score_I)
        details |= {f"c{suffix}": c, f"steps{suffix}": probe.steps}
        details[f"converged{suffix}"] = probe.converged
    oracle, c = _oracle(task, concept)
    found |= oracle
    found["gap_to_oracle"] = oracle["oracle_ood_auc"] - found["ood_auc"]
    found["drop"] = found["id_auc"] - found["ood_auc"]
    found["length_ood_auc"] = _auc(task, concept, OOD, length_scores(task, concept))
    details |= {"oracle_c": c} | {name: each.value for name, each in found.items()}
    return found, details


def _oracle(task: TaskData, concept: Concept) -> tuple[dict[str, Found], float]:
    """The probe on raw activations and its C, once for all SAEs."""
    key = f"ood_probing/{concept.name}"
    if key not in task.cache:
        units, train = units_of(task), Split.of(task, TRAIN)
        positive_I = train.positive(concept)

        def fit(x_ID: NDArray[Any], positive_I: NDArray[np.bool_], c: float) -> Probe:
            return fit_l2(x_ID, positive_I, c=c)

        train_ID = units.activations(task.x_ID[train.item_I])
        c, _ = choose_c(fit, train_ID, positive_I)
        score_I = fit(train_ID, positive_I, c).scores(units.activations(task.x_ID))
        inside, outside = (_auc(task, concept, split, score_I) for split in (TEST, OOD))
        found = {"oracle_id_auc": inside, "oracle_ood_auc": outside}
        task.cache[key] = (found | {"oracle_drop": inside - outside}, c)
    oracle, c = task.cache[key]
    return dict(oracle), float(c)


def _auc(task: TaskData, concept: Concept, split: int, score_I: NDArray[np.float64]) -> Found:
    chosen = Split.of(task, split)
    return auc_of(chosen.positive(concept), score_I[chosen.item_I], resampled(task, split))
