"""Targeted probe perturbation (TPP): does ablating a concept's latents hurt that concept alone?

# I items, S d_sae, C concepts, N sizes, R replicates

Karvonen et al. 2024, "Evaluating Sparse Autoencoders on Targeted Concept Erasure" (arXiv
2411.18895), as SAEBench scores it. Latents are ranked for concept c by their effect on its
ground-truth probe (`evaluation/ablation.py`), largest first; only those can be ablated that are
more active on positives and point along the probe. (Without that, which SAEBench has in its code
alone, the latents of other classes count: their absence speaks for c.) For the first n = 2, 5, 10, 20, 50, 100, 500 of them, the SAE's error kept,

    tpp_n         mean over c of [drop of c - mean over the others c' of the drop of c']
    intended_n    mean over c of the drop of c
    unintended_n  mean over c of the mean drop of the others

where a drop is the accuracy of a probe on its test items before minus after, balanced over the two
classes (published: plain accuracy on as many items of both). 0 is no effect, 0.5 the most.

Concepts: the classes of a task with more than two, among one another; tasks of two classes are
concepts among one another, each judged on its own items. Published probes are chosen by their
accuracy on the test items; not so here.

A 2026 study (arXiv 2605.18229, known to us in summary) finds TPP unreliable at the usual settings.
Intervals: test items drawn again inside each class; latents and probes stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..evaluation.ablation import SIZES, effects, largest, removed
from ..evaluation.bootstrap import described, valued
from ..evaluation.concepts import TEST, TRAIN, Split, ground_truth, resampled
from ..evaluation.directions import decoder_of
from ..evaluation.item_bootstrap import Counts, weighted_accuracy
from ..evaluation.probes import one_thread
from .base import Direction, MetricResult, TaskData, Value

if TYPE_CHECKING:
    from ..evaluation.judged import Judged


@dataclass(frozen=True)
class _Probed:
    """A concept with its probe's test items: scores, latents, and which latents are ablated."""

    name: str
    along_S: NDArray[np.float64]
    order_S: NDArray[np.int64]
    latents_IS: csr_array
    score_I: NDArray[np.float64]
    positive_I: NDArray[np.bool_]
    counts_RI: Counts


@dataclass(frozen=True)
class _Drops:
    """Of each ablated concept and size: its own drop and the mean drop of the others, (C, N); the
    same in each replicate, (R, C, N)."""

    intended_CN: NDArray[np.float64]
    others_CN: NDArray[np.float64]
    intended_RCN: NDArray[np.float64]
    others_RCN: NDArray[np.float64]


@dataclass
class Tpp:
    definition: ClassVar[str] = (
        "drop of a concept's probe accuracy when its n latents with the largest effect are "
        "ablated, above the mean drop of other concepts' probes"
    )
    direction: ClassVar[Direction] = "up"
    version: ClassVar[int] = 1
    suites: ClassVar[tuple[str, ...]] = ("letters", "probes", "csv")

    _families: dict[str, list[_Probed]] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _n_items: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"n": list(SIZES)}

    @one_thread()
    def observe(self, task: TaskData, judged: Judged, latents_IS: csr_array) -> None:
        truth, train, test = ground_truth(task), Split.of(task, TRAIN), Split.of(task, TEST)
        self._refused |= truth.refused
        if not truth.concepts:
            return
        self._n_items += len(test)
        train_IS, test_IS = latents_IS[train.item_I], latents_IS[test.item_I]
        score_IC = truth.scores(task.x_ID[test.item_I])
        along_SC = decoder_of(judged) @ truth.weight_CD.T
        # Tasks of two classes are concepts among one another, those of more among their own.
        family = self._families.setdefault("" if len(task.classes) == 2 else task.name, [])
        for place, concept in enumerate(truth.concepts):
            along_S = along_SC[:, place]
            # Of two negative factors the effect would be positive, too.
            effect_S = np.where(
                along_S > 0, effects(train_IS, train.positive(concept), along_S), 0.0
            )
            family.append(
                _Probed(
                    name=concept.name,
                    along_S=along_S,
                    order_S=largest(effect_S),
                    latents_IS=test_IS,
                    score_I=score_IC[:, place],
                    positive_I=test.positive(concept),
                    counts_RI=resampled(task, TEST),
                )
            )

    @one_thread()
    def result(self, *, seed: int) -> MetricResult:
        families = [family for family in self._families.values() if len(family) > 1]
        alone = [family[0].name for family in self._families.values() if len(family) == 1]
        refused = self._refused | dict.fromkeys(alone, "there is no other concept to compare with")
        n_concepts = sum(map(len, families))
        sample = {"concepts": n_concepts, "items": self._n_items, "refused": len(refused)}
        details: dict[str, Any] = {"refused_concepts": refused, "concepts": []}
        if not families:
            details["refused"] = "There are no two concepts with items enough for a probe."
            values = {f"{kind}_{n}": Value(value=None) for n in SIZES for kind in _KINDS}
            return MetricResult(
                values=values, sample=sample, interval="none: no score", details=details
            )
        found = [_drops(family) for family in families]
        for family, drops in zip(families, found, strict=True):
            details["concepts"] += _described(family, drops)
        return MetricResult(
            values=_values(found),
            sample=sample,
            interval=described("test items, inside each class", self._n_items),
            details=details,
        )


_KINDS = ("tpp", "intended", "unintended")


def _drops(family: list[_Probed]) -> _Drops:
    orders = [each.order_S for each in family]
    n, replicates = len(family), len(family[0].counts_RI)
    drop_CCN = np.empty((n, n, len(SIZES)))  # of the second concept, when the first is ablated
    own_RCN = np.empty((replicates, n, len(SIZES)))
    sum_RCN = np.zeros_like(own_RCN)
    for place, read in enumerate(family):
        left_ICN = read.score_I[:, None, None] - removed(read.latents_IS, read.along_S, orders)
        before_I1 = read.score_I[:, None] > 0
        answer_IE = np.concatenate([before_I1, (left_ICN > 0).reshape(len(left_ICN), -1)], axis=1)
        right_IE = answer_IE == read.positive_I[:, None]
        once = np.ones((1, len(right_IE)), dtype=np.float32)
        drop_CCN[:, place] = _accuracy_drops(read.positive_I, right_IE, once)[0]
        drop_RCN = _accuracy_drops(read.positive_I, right_IE, read.counts_RI)
        own_RCN[:, place] = drop_RCN[:, place]
        sum_RCN += drop_RCN
    own_CN = drop_CCN[np.arange(n), np.arange(n)]
    return _Drops(
        intended_CN=own_CN,
        others_CN=(drop_CCN.sum(axis=1) - own_CN) / (n - 1),
        intended_RCN=own_RCN,
        others_RCN=(sum_RCN - own_RCN) / (n - 1),
    )


def _accuracy_drops(
    positive_I: NDArray[np.bool_], right_IE: NDArray[np.bool_], counts_RI: Counts
) -> NDArray[np.float64]:
    """Accuracy of the first column less that of each other one, (R, C, N)."""
    accuracy_RE = weighted_accuracy(positive_I, right_IE, counts_RI)
    drop_RE = accuracy_RE[:, :1] - accuracy_RE[:, 1:]
    return drop_RE.reshape(len(counts_RI), -1, len(SIZES))


def _values(found: list[_Drops]) -> dict[str, Value]:
    """Means over all concepts of all families."""
    own_CN = np.concatenate([drops.intended_CN for drops in found])
    others_CN = np.concatenate([drops.others_CN for drops in found])
    own_RCN = np.concatenate([drops.intended_RCN for drops in found], axis=1)
    others_RCN = np.concatenate([drops.others_RCN for drops in found], axis=1)
    numbers = (
        (own_CN - others_CN, own_RCN - others_RCN),
        (own_CN, own_RCN),
        (others_CN, others_RCN),
    )
    return {
        f"{kind}_{n}": valued(float(each_CN[:, size].mean()), each_RCN[:, :, size].mean(axis=1))
        for size, n in enumerate(SIZES)
        for kind, (each_CN, each_RCN) in zip(_KINDS, numbers, strict=True)
    }


def _described(family: list[_Probed], drops: _Drops) -> list[dict[str, Any]]:
    return [
        {
            "concept": probed.name,
            "latents": probed.order_S[:10].tolist(),
            "with_positive_effect": len(probed.order_S),
            "intended": dict(zip(map(str, SIZES), own_N.tolist(), strict=True)),
            "unintended": dict(zip(map(str, SIZES), others_N.tolist(), strict=True)),
        }
        for probed, own_N, others_N in zip(family, drops.intended_CN, drops.others_CN, strict=True)
    ]
