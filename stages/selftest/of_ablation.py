"""Planted cases of ablation: latents that carry a known share of what a probe reads.

# I items, D d_in, S d_sae
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_array

from ..metrics import get_metric
from .base import Check, checks_of
from .planted import ByHand, orthonormal, task_of

CARRIED = 0.6
N_TRAIN, N_TEST = 200, 100


def targeted_perturbation() -> Iterator[Check]:
    """Concepts of tasks of their own, and concepts that are the classes of one task."""
    yield from _two_tasks()
    yield from _four_classes()


def _two_tasks() -> Iterator[Check]:
    """Two concepts with orthogonal directions. Each has a latent that brings 3 of its direction in
    0.6 of the items that have it, and brings nothing in the others, of which the SAE misses it.
    Ablated, 0.6 of the positives are missed: the balanced accuracy falls by 0.3. The other
    concept's probe does not change."""
    metric = get_metric("tpp")
    d_in, n = 4, N_TRAIN + N_TEST
    judged = ByHand(np.eye(2, d_in))
    item_I, split_I = np.arange(n), np.repeat([0, 1], [N_TRAIN, N_TEST])
    # All four pairs of the two labels are equally frequent.
    labels = (item_I % 2, item_I // 2 % 2)
    is_carried_I = item_I // 4 % 5 < 5 * CARRIED
    x_ID = np.full((n, d_in), 10.0)
    for place, label_I in enumerate(labels):
        x_ID[:, place] += 3 * label_I
    latents_IS = np.zeros((n, 2), np.float32)
    for place, label_I in enumerate(labels):
        latents_IS[:, place] = 3.0 * label_I * is_carried_I
    for place, label_I in enumerate(labels):
        task = task_of(x_ID, label_I, split_I, name=f"concept {place}")
        metric.observe(task, judged, csr_array(latents_IS))
    expected = {
        "tpp_2": CARRIED / 2,
        "intended_2": CARRIED / 2,
        "unintended_2": 0.0,
        "tpp_500": CARRIED / 2,
    }
    yield from checks_of("tpp", metric.result(seed=0), expected)


def _four_classes() -> Iterator[Check]:
    """A latent for each class that writes its direction alone: ablated, the class is not told from
    the rest any more (balanced accuracy 1 to 0.5), and the others are as before."""
    rng, n_classes = np.random.default_rng(3), 4
    label_I, split_I = np.tile(np.arange(n_classes), 60), np.repeat([0, 1], 30 * n_classes)
    rows_SD = orthonormal(n_classes + 1, 30, rng)
    noise_ID = 0.1 * rng.normal(size=(len(label_I), 30))
    x_ID = 4 * rows_SD[label_I] + 3 * rows_SD[n_classes] + noise_ID
    classes = [f"class {c}" for c in range(n_classes)]
    metric = get_metric("tpp")
    latents_IS = csr_array(4 * np.eye(n_classes, dtype=np.float32)[label_I])
    metric.observe(
        task_of(x_ID, label_I, split_I, classes=classes), ByHand(rows_SD[:n_classes]), latents_IS
    )
    expected = {"tpp_2": 0.5, "intended_2": 0.5, "unintended_2": 0.0}
    yield from checks_of("tpp", metric.result(seed=0), expected, 0.01)


def spurious_correlation() -> Iterator[Check]:
    """Class and group are +-1.5 and +-2 of two orthogonal directions. Trained where they agree, a
    probe weighs them as 1.5 to 2, and where they do not it follows the group: accuracy 1/2. Two
    latents bring +2 and -2 of the group in 0.6 of the items; without them the class decides there,
    which cures 0.6 of what was wrong."""
    n, d_in = N_TRAIN + N_TEST, 4
    item_I, split_I = np.arange(n), np.repeat([0, 1], [N_TRAIN, N_TEST])
    label_I, group_I = item_I % 2, item_I // 2 % 2
    is_carried_I = item_I // 4 % 5 < 5 * CARRIED
    x_ID = np.full((n, d_in), 10.0)
    x_ID[:, 0] += 1.5 * (2 * label_I - 1)
    x_ID[:, 1] += 2.0 * (2 * group_I - 1)
    latents_IS = np.zeros((n, 2), np.float32)
    latents_IS[:, 0] = 2.0 * group_I * is_carried_I
    latents_IS[:, 1] = 2.0 * (1 - group_I) * is_carried_I
    W_dec_SD = np.zeros((2, d_in))
    W_dec_SD[:, 1] = [1.0, -1.0]
    metric = get_metric("scr")
    task = task_of(x_ID, label_I, split_I, group_I=group_I)
    metric.observe(task, ByHand(W_dec_SD), csr_array(latents_IS))
    found = metric.result(seed=0)
    yield from checks_of("scr", found, {"scr_2": CARRIED, "scr_500": CARRIED})
    for name, count in (("ties", 0), ("empty_denominators", 0), ("tasks", 1)):
        yield Check(metric="scr", name=name, expected=count, found=found.sample[name])
