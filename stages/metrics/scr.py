"""Spurious correlation removal (SCR): does ablating a spurious concept's latents cure a probe?

# I items, S d_sae, N sizes, R replicates, T tasks

Karvonen et al. 2024 (arXiv 2411.18895), after SHIFT (Marks et al. 2024, arXiv 2403.19647), as
SAEBench scores it. A probe is trained where class and group are the same, so that it may read
either. It is judged on the class, in all four quadrants alike: accuracy acc_0. Latents are ranked
by |effect| on a clean probe of the group (`evaluation/ablation.py`); with the first n = 2, 5, 10,
20, 50, 100, 500 ablated, the SAE's error kept, its accuracy is acc_n. acc_clean is that of a clean
probe of the class, nothing ablated:

    scr_n = (acc_n - acc_0) / (acc_clean - acc_0)

That is direction `class`; direction `group` has class and group swapped. A task scores in the
direction with the smaller acc_0, where the probe reads the other label more. scr_n is the mean over
tasks. It has no bounds: below 0 ablation made it worse, and a small denominator makes it large.
A task whose denominator is below 0.001 has no score in that direction (published: 0); equal acc_0
of both directions are a tie, and `class` is taken (published: the score is dropped). Both are
counted in `sample` and marked in `details`, which have both directions.

Probes: `evaluation/spurious.py`. A 2026 study (arXiv 2605.18229, known to us in summary) finds SCR
unreliable at the usual settings. Intervals: test items drawn again inside each quadrant, and, of
more than one task, tasks drawn again too; probes, latents and directions stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..evaluation.ablation import SIZES, effects, largest, removed
from ..evaluation.bootstrap import described
from ..evaluation.concepts import TEST, TRAIN
from ..evaluation.directions import decoder_of
from ..evaluation.item_bootstrap import draw_items, weighted_accuracy
from ..evaluation.probes import one_thread
from ..evaluation.probing import Found, TaskMeans
from ..evaluation.spurious import Quadrants, RawProbe, obstacle, spurious_probes
from .base import Direction, MetricResult, TaskData

if TYPE_CHECKING:
    from ..evaluation.judged import Judged

LEAST_GAIN = 0.001


@dataclass(frozen=True)
class _OneWay:
    """One direction: accuracies before, clean and after each size, and the same in replicates."""

    acc_0: float
    acc_clean: float
    scr_N: tuple[Found, ...]
    details: dict[str, Any]

    @property
    def is_defined(self) -> bool:
        return self.acc_clean - self.acc_0 >= LEAST_GAIN


@dataclass
class Scr:
    definition: ClassVar[str] = (
        "share of the accuracy that a biased probe lacks which it gains when the n latents with "
        "the largest effect on the spurious label are ablated, mean over tasks"
    )
    direction: ClassVar[Direction] = "up"
    version: ClassVar[int] = 1
    suites: ClassVar[tuple[str, ...]] = ("csv", "probes")

    _means: TaskMeans = field(default_factory=TaskMeans)
    _details: list[dict[str, Any]] = field(default_factory=list)
    _refused: dict[str, str] = field(default_factory=dict)
    _n_items: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"n": list(SIZES)}

    @one_thread()
    def observe(self, task: TaskData, judged: Judged, latents_IS: csr_array) -> None:
        why = obstacle(task)
        if why is not None:
            self._refused[task.name] = why
            return
        W_dec_SD, probes = decoder_of(judged), spurious_probes(task)
        of_class = _one_way(task, latents_IS, W_dec_SD, (probes.of_class, probes.of_group), "class")
        of_group = _one_way(task, latents_IS, W_dec_SD, (probes.of_group, probes.of_class), "group")
        is_class = of_class.acc_0 <= of_group.acc_0
        weaker = of_class if is_class else of_group
        self._n_items += len(Quadrants.of(task, TEST).item_I)
        self._details.append(
            {
                "task": task.name,
                "direction": "class" if is_class else "group",
                "tie": of_class.acc_0 == of_group.acc_0,
                "empty_denominator": not weaker.is_defined,
                "class": of_class.details,
                "group": of_group.details,
            }
        )
        if weaker.is_defined:
            numbers = {f"scr_{n}": each for n, each in zip(SIZES, weaker.scr_N, strict=True)}
            self._means.add(task.name, numbers)

    @one_thread()
    def result(self, *, seed: int) -> MetricResult:
        n_tasks = len(self._means.tasks)
        details: dict[str, Any] = {"tasks": self._details, "refused_tasks": self._refused}
        if not n_tasks:
            details["refused"] = (
                "No task has two classes, two groups, items enough of each of their four pairs, "
                "and a biased probe that is worse than the clean one."
            )
        units = "test items, inside each class and group"
        units += ", and over tasks" if n_tasks > 1 else ""
        return MetricResult(
            values={f"scr_{n}": self._means.value(f"scr_{n}", seed=seed) for n in SIZES},
            sample={
                "tasks": n_tasks,
                "items": self._n_items,
                "ties": sum(each["tie"] for each in self._details),
                "empty_denominators": sum(each["empty_denominator"] for each in self._details),
                "refused": len(self._refused),
            },
            interval=described(units, self._n_items),
            details=details,
        )


def _one_way(
    task: TaskData,
    latents_IS: csr_array,
    W_dec_SD: NDArray[np.float64],
    probes: tuple[RawProbe, RawProbe],
    target: str,
) -> _OneWay:
    """probes: clean, of the target and of the spurious label; target: class or group."""
    train, test, biased = (
        Quadrants.of(task, TRAIN),
        Quadrants.of(task, TEST),
        spurious_probes(task).biased,
    )
    spurious_I = train.group_I if target == "class" else train.class_I
    positive_I = test.class_I if target == "class" else test.group_I
    x_ID = task.x_ID[test.item_I]
    effect_S = effects(latents_IS[train.item_I], spurious_I, W_dec_SD @ probes[1].weight_D)
    order_S = largest(np.abs(effect_S))
    gone_IN = removed(latents_IS[test.item_I], W_dec_SD @ biased.weight_D, [order_S])[:, 0]
    score_I1 = biased.scores(x_ID)[:, None]
    scores_IE = np.concatenate([score_I1, probes[0].scores(x_ID)[:, None], score_I1 - gone_IN], 1)
    right_IE = (scores_IE > 0) == positive_I[:, None]
    counts_RI = draw_items(
        task.document_I[test.item_I], test.quadrant_I, seed=task.seed, purpose=f"scr/{task.name}"
    )
    once = np.ones((1, len(right_IE)), dtype=np.float32)
    accuracy_E = weighted_accuracy(test.quadrant_I, right_IE, once)[0]
    accuracy_RE = weighted_accuracy(test.quadrant_I, right_IE, counts_RI)
    scr_N, scr_RN = _scr(accuracy_E), _scr(accuracy_RE)
    acc_0, acc_clean = float(accuracy_E[0]), float(accuracy_E[1])
    return _OneWay(
        acc_0=acc_0,
        acc_clean=acc_clean,
        scr_N=tuple(
            Found(float(value), each_R) for value, each_R in zip(scr_N, scr_RN.T, strict=True)
        ),
        details={
            "acc_0": acc_0,
            "acc_clean": acc_clean,
            "acc_ablated": dict(zip(map(str, SIZES), accuracy_E[2:].tolist(), strict=True)),
            "scr": dict(zip(map(str, SIZES), scr_N.tolist(), strict=True)),
            "latents": order_S[:10].tolist(),
        },
    )


def _scr(accuracy_E: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores by size from accuracies (..., 2 + N): before, clean, after; NaN for no denominator."""
    before, gain = accuracy_E[..., :1], accuracy_E[..., 1:2] - accuracy_E[..., :1]
    gain = np.where(gain >= LEAST_GAIN, gain, np.nan)
    return np.asarray((accuracy_E[..., 2:] - before) / gain)
