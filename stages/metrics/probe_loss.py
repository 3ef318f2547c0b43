"""Probe loss: how well the best single latent predicts a label.

# I items, S d_sae, N active entries of the latents, U units (documents)

Definition of Gao et al. 2024 (arXiv 2406.04093, "Downstream probe"), written down from memory of
the paper and not checked against it: for a binary label y, min over latents i, weights w and biases
b of the mean of -[y log sigma(w f_i + b) + (1 - y) log(1 - sigma(w f_i + b))], in nats; then the mean over
labels. Smaller is better.

Here one-dimensional logistic probes of all latents are fitted at once on the training items, by
Newton's method with halved steps; the latent with the least training loss is chosen, and its loss
on the test items is what counts. w is held by a ridge of `RIDGE` w^2 / 2 with latents divided by
their largest activation, so that a latent that separates the classes has a finite loss. A task of
more than two classes gives a label for each class against the rest; a label with fewer than
`LEAST` items of either side in training or test is left out, and counted.

    probe_loss            mean over labels
    probe_loss_constant   the same with no latent at all: what the base rate of training gives
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..evaluation.bootstrap import Resamples, bootstrapped, described, units_of, valued
from ..evaluation.judged import Judged
from .base import Direction, MetricResult, TaskData
from .rows import Floats, ratio

RIDGE = 1e-4
LEAST = 10
_STEPS, _HALVINGS, _ENOUGH = 50, 12, 1e-9
_TRAIN, _TEST = 0, 1


@dataclass(frozen=True)
class _Label:
    """What one label gave: losses of its test items by unit."""

    name: str
    latent: int
    train_loss: float
    sums: dict[str, Floats]


class ProbeLoss:
    """A probe of each latent for each label."""

    definition: ClassVar[str] = (
        "mean over labels of the test cross-entropy, in nats, of the one latent whose logistic "
        "probe has the least training loss"
    )
    direction: ClassVar[Direction] = "down"
    version: ClassVar[int] = 1
    suites: ClassVar[tuple[str, ...]] = ("probes", "ood", "letters", "csv")

    def __init__(self) -> None:
        self._labels: list[_Label] = []
        self._too_few: list[str] = []
        self._n_items = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"ridge": RIDGE}

    def observe(self, task: TaskData, judged: Judged, latents_IS: csr_array) -> None:
        train_I = (task.split_I == _TRAIN) & (task.label_I >= 0)
        test_I = (task.split_I == _TEST) & (task.label_I >= 0)
        train = _Columns(latents_IS[train_I])
        test_IS = latents_IS[test_I].tocsc()
        for name, wanted in _labels_of(task):
            y_train, y_test = task.label_I[train_I] == wanted, task.label_I[test_I] == wanted
            fewest = min(y_train.sum(), (~y_train).sum(), y_test.sum(), (~y_test).sum())
            if fewest < LEAST:
                self._too_few.append(name)
                continue
            w_S, b_S, loss_S = fit_probes(train, y_train)
            best = int(loss_S.argmin())
            f_I = test_IS[:, [best]].toarray()[:, 0].astype(np.float64)
            score_I = w_S[best] * f_I + b_S[best]
            rate = float(y_train.mean())
            unit_I, n_units = units_of(task.document_I[test_I])
            each = {
                "loss": _cross_entropy(score_I, y_test),
                "constant": -np.log(np.where(y_test, rate, 1 - rate)),
                "items": np.ones(len(y_test)),
            }
            sums = {key: _summed(unit_I, values, n_units) for key, values in each.items()}
            self._labels.append(_Label(name, best, float(loss_S[best]), sums))
        self._n_items += int(test_I.sum())

    def result(self, *, seed: int) -> MetricResult:
        points: dict[str, list[float]] = {"loss": [], "constant": []}
        replicates: dict[str, list[Floats]] = {"loss": [], "constant": []}
        for number, label in enumerate(self._labels):
            # Labels are resampled each for itself: their documents are not the same ones.
            resamples = Resamples(len(label.sums["items"]), seed, stream=str(number))
            totals_R = bootstrapped(label.sums, resamples) if resamples.is_possible else None
            for key, found in points.items():
                found.append(float(label.sums[key].sum() / label.sums["items"].sum()))
                if totals_R is not None:
                    replicates[key].append(ratio(totals_R[key], totals_R["items"]))
        n_units = [len(label.sums["items"]) for label in self._labels]
        values = {}
        for name, key in (("probe_loss", "loss"), ("probe_loss_constant", "constant")):
            point = float(np.mean(points[key])) if points[key] else float("nan")
            complete = len(replicates[key]) == len(points[key]) > 0
            values[name] = valued(point, np.mean(replicates[key], axis=0) if complete else None)
        return MetricResult(
            values=values,
            sample={"labels": len(self._labels), "test_items": self._n_items},
            interval=described("documents", min(n_units, default=0)),
            details={
                "labels": [
                    {
                        "label": label.name,
                        "latent": label.latent,
                        "train_loss": label.train_loss,
                        "test_loss": loss,
                    }
                    for label, loss in zip(self._labels, points["loss"], strict=True)
                ],
                "too_few_items": self._too_few,
            },
        )


def _labels_of(task: TaskData) -> Iterator[tuple[str, int]]:
    """Binary labels of a task: its second class, or each of more than two."""
    if len(task.classes) == 2:
        yield task.name, 1
    elif len(task.classes) > 2:
        for place, name in enumerate(task.classes):
            yield f"{task.name}: {name}", place


class _Columns:
    """Latents by latent, those of no item left out of the sums; activations scaled to at most 1."""

    def __init__(self, latents_IS: csr_array) -> None:
        by_latent = latents_IS.tocsc()
        by_latent.sum_duplicates()
        self.n_items, self.n_latents = by_latent.shape
        self.item_N: NDArray[np.int64] = by_latent.indices.astype(np.int64)
        self.latent_N = np.repeat(np.arange(self.n_latents), np.diff(by_latent.indptr))
        value_N = by_latent.data.astype(np.float64)
        largest_S = np.zeros(self.n_latents)
        np.maximum.at(largest_S, self.latent_N, np.abs(value_N))
        self.scale_S = np.where(largest_S > 0, largest_S, 1.0)
        self.value_N = value_N / self.scale_S[self.latent_N]

    def sums(self, each_N: Floats) -> Floats:
        """Of a number for each entry: the sum of each latent (S,)."""
        return _summed(self.latent_N, each_N, self.n_latents)


def fit_probes(x: _Columns, y_I: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """Weights and biases of the logistic probe of every latent (S,), and their mean training losses
    without the ridge.

    An item on which a latent is 0 has the score b whatever the item: all of them are two terms, and
    a step costs what the active entries cost.
    """
    y_N = y_I[x.item_N].astype(np.float64)
    n_positive, n = float(y_I.sum()), float(len(y_I))
    zeros_positive_S = n_positive - x.sums(y_N)
    zeros_S = n - x.sums(np.ones(len(y_N)))
    w_S = np.zeros(x.n_latents)
    b_S = np.full(x.n_latents, np.log(n_positive / (n - n_positive)))

    def objective(w_S: Floats, b_S: Floats) -> Floats:
        score_N = w_S[x.latent_N] * x.value_N + b_S[x.latent_N]
        active_S = x.sums(_cross_entropy(score_N, y_N > 0))
        zeros = zeros_S * np.logaddexp(0, b_S) - zeros_positive_S * b_S
        return np.asarray((active_S + zeros) / n + RIDGE * np.square(w_S) / 2)

    loss_S = objective(w_S, b_S)
    for _ in range(_STEPS):
        p_N = _sigmoid(w_S[x.latent_N] * x.value_N + b_S[x.latent_N])
        p_S = _sigmoid(b_S)
        slope_N, curve_N = p_N - y_N, p_N * (1 - p_N)
        g_w = x.sums(slope_N * x.value_N) / n + RIDGE * w_S
        g_b = (x.sums(slope_N) + zeros_S * p_S - zeros_positive_S) / n
        h_ww = x.sums(curve_N * np.square(x.value_N)) / n + RIDGE
        h_wb = x.sums(curve_N * x.value_N) / n
        h_bb = (x.sums(curve_N) + zeros_S * p_S * (1 - p_S)) / n + 1e-12
        determinant = np.maximum(h_ww * h_bb - np.square(h_wb), 1e-18)
        step_w = (h_bb * g_w - h_wb * g_b) / determinant
        step_b = (h_ww * g_b - h_wb * g_w) / determinant
        length_S = np.ones(x.n_latents)
        for _ in range(_HALVINGS):
            tried_S = objective(w_S - length_S * step_w, b_S - length_S * step_b)
            worse_S = ~(tried_S <= loss_S)
            if not worse_S.any():
                break
            length_S = np.where(worse_S, length_S / 2, length_S)
        better_S = tried_S <= loss_S
        w_S = np.where(better_S, w_S - length_S * step_w, w_S)
        b_S = np.where(better_S, b_S - length_S * step_b, b_S)
        gain = float((loss_S - np.where(better_S, tried_S, loss_S)).max())
        loss_S = np.where(better_S, tried_S, loss_S)
        if gain < _ENOUGH:
            break
    return w_S / x.scale_S, b_S, loss_S - RIDGE * np.square(w_S) / 2


def _summed(place_N: NDArray[np.int64], each_N: Floats, n_places: int) -> Floats:
    return np.bincount(place_N, each_N, n_places).astype(np.float64)


def _cross_entropy(score: Floats, y: NDArray[np.bool_]) -> Floats:
    """-log of the probability of the label, from scores."""
    return np.asarray(np.logaddexp(0, np.where(y, -score, score)))


def _sigmoid(score: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -score)))
