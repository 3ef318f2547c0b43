"""Planted cases of probing: latents that are right about a label as often as is written down.

# I items, D d_in, S d_sae

Latent 0 is 1 or 0. It says the label of nine of ten items of either class, in training and test.
No other latent of the eight knows the label: latent j is 1 on the same share of both classes.
Activations have the label in one dimension, so that the oracle is always right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..metrics import get_metric
from ..metrics.base import MetricResult, TaskData
from .base import Check, checks_of
from .planted import ByHand, task_of

N_TRAIN, N_TEST, N_OOD = 400, 200, 200
RIGHT, RIGHT_SHIFTED = 0.9, 0.7
N_LATENTS = 8


def probing() -> Iterator[Check]:
    """Accuracy and AUC 0.9; the best cross-entropy is the entropy of 0.9, that of no latent log 2."""
    task, latents_IS = _labels((RIGHT, RIGHT))
    found = _judge("sparse_probing", task, latents_IS)
    expected = {"accuracy_k1": RIGHT, "auc_k1": RIGHT, "oracle_accuracy": 1.0}
    yield from checks_of("sparse_probing", found, expected)
    entropy = -RIGHT * math.log(RIGHT) - (1 - RIGHT) * math.log(1 - RIGHT)
    found = _judge("probe_loss", task, latents_IS)
    yield from checks_of("probe_loss", found, {"probe_loss": entropy}, 1e-3)
    yield from checks_of("probe_loss", found, {"probe_loss_constant": math.log(2)})


def out_of_distribution() -> Iterator[Check]:
    """Out of distribution the same latent is right about 0.7 only, and the oracle still about all.
    A latent that turns round there, and says the opposite, has AUC 0."""
    task, latents_IS = _labels((RIGHT, RIGHT, RIGHT_SHIFTED), only_first=True)
    expected = {
        "id_auc": RIGHT,
        "ood_auc": RIGHT_SHIFTED,
        "ood_auc_k16": RIGHT_SHIFTED,
        "oracle_id_auc": 1.0,
        "oracle_ood_auc": 1.0,
        "gap_to_oracle": 1 - RIGHT_SHIFTED,
        "drop": RIGHT - RIGHT_SHIFTED,
    }
    yield from checks_of("ood_probing", _judge("ood_probing", task, latents_IS), expected)
    task, latents_IS = _labels((1.0, 1.0, 0.0), only_first=True)
    expected = {"id_auc": 1.0, "ood_auc": 0.0, "oracle_ood_auc": 1.0}
    yield from checks_of("ood_probing", _judge("ood_probing", task, latents_IS), expected)


def shortcut() -> Iterator[Check]:
    """Texts with the label are long in 0.7 of the cases and those without in 0.3: what the latent
    knows beyond that is 0.2."""
    texts = np.array(["short", "a text that is longer than the other one"])
    task, latents_IS = _labels((RIGHT, RIGHT), only_first=True)
    is_long_I = _says(task.label_I, task.split_I, (RIGHT_SHIFTED, RIGHT_SHIFTED))
    task.texts = texts[is_long_I].tolist()
    expected = {
        "latent_auc": RIGHT,
        "length_auc": RIGHT_SHIFTED,
        "credited_auc": RIGHT - RIGHT_SHIFTED,
    }
    yield from checks_of("shortcut_control", _judge("shortcut_control", task, latents_IS), expected)


def _labels(right: tuple[float, ...], *, only_first: bool = False) -> tuple[TaskData, csr_array]:
    """A task with a share of right answers of latent 0 for each split, and the latents.

    only_first: the other latents never fire.
    """
    sizes = (N_TRAIN, N_TEST, N_OOD)[: len(right)]
    split_I = np.repeat(np.arange(len(sizes)), sizes)
    label_I = np.arange(len(split_I)) % 2
    latents_IS = np.zeros((len(split_I), N_LATENTS), np.float32)
    latents_IS[:, 0] = _says(label_I, split_I, right)
    if not only_first:
        pair_I = np.arange(len(split_I)) // 2  # of one item of each class
        for latent in range(1, N_LATENTS):
            latents_IS[:, latent] = pair_I % (latent + 1) == 0
    x_ID = np.full((len(split_I), 4), 20.0)
    x_ID[:, 0] += 3 * label_I
    return task_of(x_ID, label_I, split_I), csr_array(latents_IS)


def _says(
    label_I: NDArray[np.integer[Any]], split_I: NDArray[np.integer[Any]], right: tuple[float, ...]
) -> NDArray[np.int64]:
    """Answers 0 or 1, right about a share of the items of every split."""
    says_I = label_I.astype(np.int64)
    for split, share in enumerate(right):
        for label in (0, 1):
            here = np.flatnonzero((split_I == split) & (label_I == label))
            # The same ones of every ten, so that any twenty items in a row have the same share.
            wrong = here[np.arange(len(here)) % 10 >= round(10 * share)]
            says_I[wrong] = 1 - label
    return says_I


def _judge(name: str, task: TaskData, latents_IS: csr_array) -> MetricResult:
    metric = get_metric(name)
    metric.observe(task, ByHand(np.eye(N_LATENTS, 4)), latents_IS)
    found: MetricResult = metric.result(seed=0)
    return found
