"""Absorption: how often a latent that should stand for a concept is silent, and others carry it.

# I items of a task, W judged words of a concept, D d_in, S d_sae, R replicates

Chanin et al. 2024, "A is for Absorption" (arXiv 2409.14507), at the thresholds of the published
evaluation; the formulas stand in `evaluation/absorbing.py` (a word), `evaluation/splitting.py` (the
main latents) and `evaluation/concepts.py` (the ground-truth probes). Judged words of a concept are
the test items that have it and that its ground-truth probe finds (score > 0).

    full_absorption            mean over concepts of the share of judged words fully absorbed, 0 to 1
    absorption_fraction        mean over concepts of the mean absorption fraction, 0 to 1
    full_absorption_score      100 (1 - full_absorption), as papers print it: up is better
    absorption_fraction_score  100 (1 - absorption_fraction)
    probe_f1                   F1 of the ground-truth probes, mean over judged concepts
    k1_f1                      F1 of one latent, mean over judged concepts: an SAE that knows no
                               letters has nothing to absorb, and scores well for it
    main_latents               latents a concept is split over, mean over judged concepts
    l1_steps                   most steps that an L1 probe took

A concept whose probe has F1 <= 0.6 is refused. With fewer than 20 judged concepts (of 26; of a task
with fewer than 20 concepts, the same share) there is no score, and `details.refused` says why.

Intervals: words drawn again inside each concept (probes and main latents stay).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..evaluation.absorbing import Absorbed, absorbed
from ..evaluation.bootstrap import described, valued
from ..evaluation.concepts import TEST, TRAIN, Concept, Split, concepts, ground_truth, units_of
from ..evaluation.directions import Direction, decoder_of
from ..evaluation.item_bootstrap import draw_items, weighted_mean
from ..evaluation.probes import one_thread
from ..evaluation.splitting import MainLatents, main_latents
from .base import Direction as Better
from .base import MetricResult, TaskData, Value

if TYPE_CHECKING:
    from ..evaluation.judged import Judged

LEAST_F1 = 0.6
LEAST_CONCEPTS, OF_CONCEPTS = 20, 26
MOST_EXAMPLES = 10


@dataclass(frozen=True)
class _Judged:
    """What was found of one concept; replicates of its two means, (R,)."""

    details: dict[str, Any]
    full: float
    fraction: float
    full_R: NDArray[np.float64]
    fraction_R: NDArray[np.float64]


@dataclass
class Absorption:
    definition: ClassVar[str] = (
        "share of words in which the main latents of a concept are silent and another carries it, "
        "mean over concepts (Chanin et al. 2024)"
    )
    direction: ClassVar[Better] = "down"
    version: ClassVar[int] = 1
    suites: ClassVar[tuple[str, ...]] = ("letters", "csv")

    _judged: list[_Judged] = field(default_factory=list)
    _refused: dict[str, str] = field(default_factory=dict)
    _n_concepts: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @one_thread()
    def observe(self, task: TaskData, judged: Judged, latents_IS: csr_array) -> None:
        truth, train, test = ground_truth(task), Split.of(task, TRAIN), Split.of(task, TEST)
        self._n_concepts += len(concepts(task))
        self._refused |= truth.refused
        scaled_IS = units_of(task).latents(latents_IS) if truth.concepts else latents_IS
        train_IS, test_IS = scaled_IS[train.item_I], scaled_IS[test.item_I]
        x_ID = task.x_ID[test.item_I]
        score_IC, W_dec_SD = truth.scores(x_ID), decoder_of(judged)
        for place, concept in enumerate(truth.concepts):
            probe_f1 = float(truth.f1_C[place])
            if probe_f1 <= LEAST_F1:
                self._refused[concept.name] = (
                    f"its ground-truth probe has F1 {probe_f1:.2f}, and more than {LEAST_F1} is "
                    "needed"
                )
                continue
            main = main_latents(
                train_IS, train.positive(concept), test_IS, test.positive(concept), seed=task.seed
            )
            word_W = np.flatnonzero(test.positive(concept) & (score_IC[:, place] > 0))
            direction = Direction.of(truth.weight_CD[place], W_dec_SD)
            item_W = test.item_I[word_W]
            found = absorbed(latents_IS[item_W], x_ID[word_W], direction, main.latents)
            details = {
                "concept": concept.name,
                "words": len(word_W),
                "probe_f1": probe_f1,
                **_described(main),
                **_examples(found, [task.texts[item] for item in item_W], direction),
            }
            self._judged.append(_counted(task, concept, item_W, found, details))

    @one_thread()
    def result(self, *, seed: int) -> MetricResult:
        needed = least_concepts(self._n_concepts)
        found = self._judged
        details: dict[str, Any] = {"concepts": [each.details for each in found]}
        n_words = sum(each.details["words"] for each in found)
        sample = {"words": n_words, "concepts": len(found), "concepts_refused": len(self._refused)}
        details |= {"refused_concepts": self._refused, "concepts_needed": needed}
        if not found or len(found) < needed:
            details["refused"] = (
                f"{len(found)} of {self._n_concepts} concepts can be judged, and {needed} are "
                "needed: see refused_concepts for what is wrong with the others."
            )
            return MetricResult(
                values={name: Value(value=None) for name in _SCORES},
                sample=sample,
                interval="none: no score",
                details=details,
            )
        return MetricResult(
            values=_values(found),
            sample=sample,
            interval=described("words, inside each concept", n_words),
            details=details,
        )


def least_concepts(n_concepts: int) -> int:
    """How many concepts must be judged for a score: 20, or 20 / 26 of fewer than 20."""
    if n_concepts >= LEAST_CONCEPTS:
        return LEAST_CONCEPTS
    return ceil(n_concepts * LEAST_CONCEPTS / OF_CONCEPTS)


_SCORES = (
    "full_absorption",
    "absorption_fraction",
    "full_absorption_score",
    "absorption_fraction_score",
)


def _values(found: list[_Judged]) -> dict[str, Value]:
    full = float(np.mean([each.full for each in found]))
    fraction = float(np.mean([each.fraction for each in found]))
    full_R = np.mean([each.full_R for each in found], axis=0)
    fraction_R = np.mean([each.fraction_R for each in found], axis=0)
    details = [each.details for each in found]
    return {
        "full_absorption": valued(full, full_R),
        "absorption_fraction": valued(fraction, fraction_R),
        "full_absorption_score": valued(100 * (1 - full), 100 * (1 - full_R)),
        "absorption_fraction_score": valued(100 * (1 - fraction), 100 * (1 - fraction_R)),
        "probe_f1": Value(value=float(np.mean([each["probe_f1"] for each in details]))),
        "k1_f1": Value(value=float(np.mean([each["k1_f1"] for each in details]))),
        "main_latents": Value(value=float(np.mean([len(each["main"]) for each in details]))),
        "l1_steps": Value(value=float(max(each["l1_steps"] for each in details))),
    }


def _counted(
    task: TaskData,
    concept: Concept,
    item_W: NDArray[np.int64],
    found: Absorbed,
    details: dict[str, Any],
) -> _Judged:
    counts_RW = draw_items(
        task.document_I[item_W],
        np.zeros(len(item_W), np.int64),
        seed=task.seed,
        purpose=f"absorption/{task.name}/{concept.name}",
    )
    full_W = found.full_W.astype(np.float64)
    full, fraction = float(full_W.mean()), float(found.fraction_W.mean())
    return _Judged(
        details=details | {"full_absorption": full, "absorption_fraction": fraction},
        full=full,
        fraction=fraction,
        full_R=weighted_mean(full_W, counts_RW),
        fraction_R=weighted_mean(found.fraction_W, counts_RW),
    )


def _described(main: MainLatents) -> dict[str, Any]:
    return {
        "main": main.latents.tolist(),
        "k1_f1": main.f1,
        "f1_by_k": list(main.f1_by_k),
        "l1_steps": main.steps,
        "l1_converged": main.converged,
    }


def _examples(found: Absorbed, texts: list[str], direction: Direction) -> dict[str, Any]:
    """Up to ten fully absorbed words, those first in which the absorbing latent carries most."""
    order_W = np.argsort(-found.share_W, kind="stable")
    chosen_W = order_W[found.full_W[order_W]][:MOST_EXAMPLES]
    return {
        "absorbed": [
            {
                "word": texts[word],
                "latent": int(found.absorber_W[word]),
                "share": float(found.share_W[word]),
                "cosine": float(direction.cosine_S[found.absorber_W[word]]),
            }
            for word in chosen_W.tolist()
        ]
    }
