"""Linear probes: logistic regression on activations and on sparse latents, and what they score.

# I items, D d_in, S d_sae, K columns a probe sees, C concepts

One convention for every probe of the evaluation, so that none depends on the units of a model:
activations are centred on the mean of the training items and divided by ONE number, so that their
total variance over the training items is d_in; latents are divided by the same number and are not
centred (0 stays "did not fire"). No dimension is rescaled by itself: that would turn the geometry
that SAEs are fitted in. The intercept is never penalised, so centring changes no optimum.

L2 fits use L-BFGS down to a gradient of 1e-8, L1 fits coordinate descent (liblinear), both by
scikit-learn in float64 with one BLAS thread: what comes out does not depend on the number of
threads. A fit that stops early is no error: `converged` says so, `steps` how far it came.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import ThreadpoolController

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]
Matrix = Any  # float64 (I, K), full or CSR

MAX_STEPS = 2000
# liblinear penalises |intercept| / scaling along with the weights: at 100 the objective of a
# 26-letter task is within 2e-4 of its optimum with a free intercept.
INTERCEPT_SCALING = 100.0
GRID_C = np.logspace(5, -5, 10)
LAST_ITEMS = 100


@dataclass(frozen=True)
class Units:
    """What activations are centred on and divided by before a probe sees them."""

    mean_D: NDArray[np.float64]
    scale: float

    @classmethod
    def of(cls, train_ID: Floats) -> Self:
        """Of the training items; scale is 1 where they do not differ at all."""
        x_ID = np.asarray(train_ID, dtype=np.float64)
        mean_D = x_ID.mean(axis=0)
        scale = float(np.sqrt(np.square(x_ID - mean_D).sum() / x_ID.size))
        return cls(mean_D, scale if scale > 0 else 1.0)

    def activations(self, x_ID: Floats) -> NDArray[np.float64]:
        return (np.asarray(x_ID, dtype=np.float64) - self.mean_D) / self.scale

    def latents(self, latents_IS: csr_array) -> csr_array:
        return csr_array(latents_IS, dtype=np.float64) / self.scale


@dataclass(frozen=True)
class Probe:
    """score = x . weight_K + bias; a positive answer is a score above 0."""

    weight_K: NDArray[np.float64]
    bias: float
    steps: int
    converged: bool

    def scores(self, x_IK: Matrix) -> NDArray[np.float64]:
        return np.asarray(x_IK @ self.weight_K + self.bias, dtype=np.float64)


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS on one thread inside: the order of its sums no longer depends on the machine.

    Works as a decorator too.
    """
    with _blas().limit(limits=1, user_api="blas"):
        yield


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of this process: to look for them takes 3 ms, longer than a small fit."""
    return ThreadpoolController()


def balanced(positive_I: Flags) -> NDArray[np.float64]:
    """Weights that give both classes half of the number of items."""
    n, n_positive = len(positive_I), int(positive_I.sum())
    return np.where(positive_I, n / (2 * n_positive), n / (2 * (n - n_positive)))


def positives_weighted(positive_I: Flags) -> NDArray[np.float64]:
    """Weight (negatives / positives) for positives and 1 for negatives: SAEBench's loss."""
    n_positive = int(positive_I.sum())
    return np.where(positive_I, (len(positive_I) - n_positive) / n_positive, 1.0)


def fit_l2(x_IK: Floats, positive_I: Flags, *, c: float, weight_I: Floats | None = None) -> Probe:
    """Minimise |w|^2 / 2 + c * sum_i weight_i * log(1 + exp(-y_i (x_i . w + b))), y = +-1."""
    if x_IK.shape[1] == 0:
        return Probe(np.zeros(0), _bias_alone(positive_I, weight_I), steps=0, converged=True)
    model = LogisticRegression(C=c, solver="lbfgs", tol=1e-8, max_iter=MAX_STEPS)
    return _fitted(model, np.asarray(x_IK, dtype=np.float64), positive_I, weight_I)


def fit_l1(
    x_IK: Matrix,
    positive_I: Flags,
    *,
    c: float,
    weight_I: Floats | None = None,
    seed: int,
    most_steps: int = MAX_STEPS,
) -> Probe:
    """The same with |w|_1 in place of |w|^2 / 2; columns that are 0 on all items keep weight 0.

    most_steps: of coordinate descent, each over all columns several times.
    """
    model = LogisticRegression(
        C=c,
        l1_ratio=1,
        solver="liblinear",
        tol=1e-4,
        max_iter=most_steps,
        intercept_scaling=INTERCEPT_SCALING,
        random_state=seed,
    )
    n_columns = x_IK.shape[1]
    x_csr = csr_array(x_IK, dtype=np.float64)
    used_K = np.flatnonzero(np.bincount(x_csr.indices, minlength=n_columns))
    if len(used_K) == 0:
        bias = _bias_alone(positive_I, weight_I)
        return Probe(np.zeros(n_columns), bias, steps=0, converged=True)
    inner = _fitted(model, _with_small_indices(x_csr[:, used_K]), positive_I, weight_I)
    weight_K = np.zeros(n_columns)
    weight_K[used_K] = inner.weight_K
    return Probe(weight_K, inner.bias, inner.steps, inner.converged)


def _bias_alone(positive_I: Flags, weight_I: Floats | None) -> float:
    """The intercept of a probe that sees nothing: the log odds of the (weighted) classes."""
    if weight_I is None:
        weight_I = np.ones(len(positive_I))
    odds = float(weight_I[positive_I].sum()) / float(weight_I[~positive_I].sum())
    # Balanced weights sum to the same only up to rounding; an answer must not hang on that.
    return 0.0 if np.isclose(odds, 1.0) else float(np.log(odds))


def _with_small_indices(x_csr: csr_array) -> csr_array:
    """The same with 32-bit indices, the only ones that scikit-learn takes."""
    parts = (x_csr.data, x_csr.indices.astype(np.int32), x_csr.indptr.astype(np.int32))
    return csr_array(parts, shape=x_csr.shape)


def _fitted(model: Any, x_IK: Matrix, positive_I: Flags, weight_I: Floats | None) -> Probe:
    assert 0 < positive_I.sum() < len(positive_I), "a probe needs both classes"
    with one_thread(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x_IK, positive_I.astype(np.int64), sample_weight=weight_I)
    stopped_early = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return Probe(
        np.asarray(model.coef_[0], dtype=np.float64),
        float(model.intercept_[0]),
        steps=int(np.max(model.n_iter_)),
        converged=not stopped_early,
    )


def choose_c(
    fit: Callable[[Any, Flags, float], Probe], x_IK: Any, positive_I: Flags
) -> tuple[float, float]:
    """The C of logspace(5, -5, 10) with the best AUC on the last training items, and that AUC.

    The last 100 items, or the last fifth of fewer than 500, are held back; of equal AUCs the
    largest C is taken (Kantamneni et al. 2025, arXiv 2502.16681, as sae-probes implements it).
    Where the items held back, or the others, are of one class, C is 1 and the AUC NaN.
    """
    n_fit = len(positive_I) - min(len(positive_I) // 5, LAST_ITEMS)
    fit_I, held_I = positive_I[:n_fit], positive_I[n_fit:]
    if any(part.all() or not part.any() for part in (fit_I, held_I)):
        return 1.0, float("nan")
    found = [auc(held_I, fit(x_IK[:n_fit], fit_I, c).scores(x_IK[n_fit:])) for c in GRID_C.tolist()]
    best = int(np.argmax(found))
    return float(GRID_C[best]), found[best]


def mean_difference(latents_IS: csr_array, positive_I: Flags) -> NDArray[np.float64]:
    """Mean latents of the positives minus mean latents of the negatives, (S,)."""
    columns_SI, n_positive = latents_IS.T, int(positive_I.sum())
    # Two sums and not one of both signs: equal means then differ by 0 and not by a rounding error.
    of_positives_S = columns_SI @ positive_I.astype(np.float64) / n_positive
    of_negatives_S = columns_SI @ (~positive_I).astype(np.float64) / (len(positive_I) - n_positive)
    return np.asarray(of_positives_S - of_negatives_S, dtype=np.float64)


def most_different(latents_IS: csr_array, positive_I: Flags, k: int) -> NDArray[np.int64]:
    """The k latents with the largest |difference of class means|, first the largest.

    Equal ones in ascending order; latents that do not differ at all are left out, so fewer than k
    come back when fewer differ.
    """
    difference_S = np.abs(mean_difference(latents_IS, positive_I))
    order_S = np.argsort(-difference_S, kind="stable")[:k]
    return order_S[difference_S[order_S] > 0]


def auc(positive_I: Flags, score_I: Floats) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2; NaN with one class only."""
    n_positive = int(positive_I.sum())
    n_negative = len(positive_I) - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    _, rank_I, count = np.unique(score_I, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    middle = last - (count - 1) / 2  # the mean of the 1-based ranks of equal scores
    rank_sum = float(middle[rank_I][positive_I].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def f1(positive_I: Flags, answer_I: Flags) -> float:
    """2 TP / (2 TP + FP + FN); 0 when there is nothing to find and nothing was found."""
    below = int(positive_I.sum()) + int(answer_I.sum())
    return 2 * int((positive_I & answer_I).sum()) / below if below else 0.0


def balanced_accuracy(positive_I: Flags, answer_I: Flags) -> float:
    """(recall of the positives + recall of the negatives) / 2; NaN with one class only.

    On a set with as many positives as negatives it is the plain accuracy.
    """
    if positive_I.all() or not positive_I.any():
        return float("nan")
    return float((answer_I[positive_I].mean() + (~answer_I[~positive_I]).mean()) / 2)
