"""Planted words and labels: which latents stand for what is written down, and so the scores.

# I items, D d_in, S d_sae, C classes
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..metrics import get_metric
from ..metrics.base import MetricResult, TaskData
from . import Check
from .planted import ByHand, PlantedLetters, orthonormal, task_of

Matrix = NDArray[np.floating[Any]]

_TRAIN, _TEST, _OUTSIDE = 200, 80, 60


def absorption() -> Iterator[Check]:
    """26 letters with 8 test words each, of which 0 to 4 are absorbed: 50 of 208."""
    counts = [letter % 5 for letter in range(26)]
    letters = PlantedLetters(counts)
    metric = get_metric("absorption")
    metric.observe(letters.task(), letters.judged, letters.latents_IS)
    result = metric.result(seed=0)
    rate = sum(counts) / (8 * 26)
    for name in ("full_absorption", "absorption_fraction"):
        yield _check(result, name, rate, 1e-9)
        yield _check(result, f"{name}_score", 100 * (1 - rate), 1e-7)
    yield _check(result, "probe_f1", 1, 0)


def probing() -> Iterator[Check]:
    """One latent is the label, but on a tenth of the items of each class it is its opposite."""
    rng = np.random.default_rng(1)
    label_I = np.arange(_TRAIN + _TEST) % 2
    wrong_I = (np.arange(_TRAIN + _TEST) // 2) % 10 == 0
    latents_IS = np.maximum(rng.normal(size=(len(label_I), 30)) - 1, 0)
    latents_IS[:, 7] = 5 * np.where(wrong_I, 1 - label_I, label_I)
    x_ID = rng.normal(size=(len(label_I), 12)) + 4 + 20 * label_I[:, None]
    split_I = np.repeat([0, 1], [_TRAIN, _TEST])
    task = task_of(x_ID, label_I, split_I, name="planted")
    result = _judge("sparse_probing", np.eye(30, 12), (task, latents_IS))
    yield _check(result, "accuracy_k1", 0.9, 1e-9)
    yield _check(result, "oracle_accuracy", 1, 1e-9)


def out_of_distribution() -> Iterator[Check]:
    """One latent is the label in distribution and its opposite outside; so is the text's length."""
    rng = np.random.default_rng(2)
    split_I = np.repeat([0, 1, 2], [_TRAIN, _TEST, _OUTSIDE])
    label_I = np.arange(len(split_I)) % 2
    turned_I = np.where(split_I == 2, 1 - label_I, label_I)
    latents_IS = np.maximum(rng.normal(size=(len(split_I), 30)) - 2, 0)
    latents_IS[:, 7] = 5 * turned_I
    x_ID = rng.normal(size=(len(split_I), 12)) + 4 + 20 * label_I[:, None]
    texts = ["word " * (1 + int(turned)) for turned in turned_I]
    task = task_of(x_ID, label_I, split_I, name="planted", suite="ood", texts=texts)
    result = _judge("ood_probing", np.eye(30, 12), (task, latents_IS))
    yield _check(result, "id_auc", 1, 0.02)
    yield _check(result, "ood_auc_k16", 0, 0.02)
    yield _check(result, "oracle_ood_auc", 1, 1e-9)


def best_probe_loss() -> Iterator[Check]:
    """A latent that is the label on three quarters of the items and silent about which on none.

    The best that any function of a latent can do whose two values mean the label with probability
    3 / 4 is the entropy of that, 0.5623 nats; with one that is the label it is 0 (the probes here
    have a penalty, so a little more).
    """
    label_I = np.arange(_TRAIN + _TEST) % 2
    wrong_I = (np.arange(_TRAIN + _TEST) // 2) % 4 == 0
    split_I = np.repeat([0, 1], [_TRAIN, _TEST])
    x_ID = np.tile(label_I[:, None] + 3.0, (1, 4))
    task = task_of(x_ID, label_I, split_I, name="planted")
    latents_IS = np.zeros((len(label_I), 5))
    latents_IS[:, 3] = np.where(wrong_I, 1 - label_I, label_I)
    result = _judge("probe_loss", np.eye(5, 4), (task, latents_IS))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    yield _check(result, "probe_loss", float(entropy), 0.01)


def targeted_perturbation() -> Iterator[Check]:
    """A latent for each class that writes its direction alone: ablated, the class is not told from
    the rest any more (balanced accuracy 1 to 0.5), and the others are as before."""
    rng, n_classes = np.random.default_rng(3), 4
    label_I, split_I = np.tile(np.arange(n_classes), 60), np.repeat([0, 1], 30 * n_classes)
    rows_SD = orthonormal(n_classes + 1, 30, rng)
    noise_ID = 0.1 * rng.normal(size=(len(label_I), 30))
    x_ID = 4 * rows_SD[label_I] + 3 * rows_SD[n_classes] + noise_ID
    classes = [f"class {c}" for c in range(n_classes)]
    task = task_of(x_ID, label_I, split_I, classes=classes)
    latents_IS = 4 * np.eye(n_classes)[label_I]
    result = _judge("tpp", rows_SD[:n_classes], (task, latents_IS))
    yield _check(result, "intended_2", 0.5, 1e-9)
    yield _check(result, "unintended_2", 0, 0.01)
    yield _check(result, "tpp_2", 0.5, 0.01)


def spurious_correlation() -> Iterator[Check]:
    """Class and group lie along directions of their own, the group's twice as long: a probe fitted
    where both agree reads the group, and without the group's latents the class."""
    rng = np.random.default_rng(11)
    class_I, group_I = np.tile([0, 0, 1, 1], 60), np.tile([0, 1], 120)
    split_I = np.repeat([0, 1], [160, 80])
    class_D, group_D, mean_D = orthonormal(3, 20, rng)
    rows_SD = np.stack([class_D, -class_D, group_D, -group_D])
    latents_IS = np.stack([class_I, 1 - class_I, 2 * group_I, 2 - 2 * group_I], axis=1)
    x_ID = latents_IS @ rows_SD + 5 * mean_D + 0.2 * rng.normal(size=(len(class_I), 20))
    task = task_of(x_ID, class_I, split_I, group_I=group_I)
    result = _judge("scr", rows_SD, (task, latents_IS))
    yield _check(result, "scr_2", 1, 0.1)


def _judge(metric_name: str, W_dec_SD: Matrix, *tasks: tuple[TaskData, Matrix]) -> MetricResult:
    metric, judged = get_metric(metric_name), ByHand(W_dec_SD)
    for task, latents_IS in tasks:
        metric.observe(task, judged, csr_array(latents_IS, dtype=np.float32))
    result: MetricResult = metric.result(seed=0)
    return result


def _check(result: MetricResult, name: str, expected: float, tolerance: float) -> Check:
    found = result.values[name].value
    return Check(name=name, expected=expected, found=found, tolerance=tolerance)
