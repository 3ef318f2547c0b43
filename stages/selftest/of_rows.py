"""Planted cases of metrics over rows.

# B rows, D d_in, S d_sae

Eight rows in four dimensions, x = (4 a, 4 b, m, 0): a is 1 in rows 0 to 3, b in rows 0 and 4. The
SAE has b_dec = (0, 0, m, 0) and three latents: one that reads 4 as 3 and writes (3, 0, 0, 0), one
for the last dimension, where nothing is, and one that is always below 0. So b is missed.

    sum ||x - mean||^2 = 8 (4^2 / 4 + 4^2 * 3 / 16) = 56
    sum ||x - x_hat||^2 = 4 * 1 + 2 * 4^2 = 36
    sum ||x_hat||^2 = 4 * 3^2 + 8 m^2, sum x . x_hat = 4 * 12 + 8 m^2

Documents are copies of these eight rows, so that every resample of documents has the same values
and every interval no width.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..sae.base import Sae
from .base import Check, checks_of
from .by_hand import judge_rows, relu_sae

DOCUMENTS = 25
FAR = 100.0


def eight_rows(mean: float, copies: int = DOCUMENTS) -> Tensor:
    """The rows above, `copies` times (8 copies, 4)."""
    x_BD = torch.zeros(8, 4)
    x_BD[[0, 1, 2, 3], 0] = 4.0
    x_BD[[0, 4], 1] = 4.0
    x_BD[:, 2] = mean
    return x_BD.repeat(copies, 1)


def shrinking_sae(mean: float) -> Sae:
    """The SAE above."""
    W_enc_DS, W_dec_SD = torch.zeros(4, 3), torch.zeros(3, 4)
    W_enc_DS[0, 0], W_dec_SD[0, 0] = 3 / 4, 1.0
    W_enc_DS[3, 1], W_dec_SD[1, 3] = 1.0, 1.0
    W_dec_SD[2, 1] = 1.0
    b_dec_D, b_enc_S = torch.tensor([0.0, 0.0, mean, 0.0]), torch.tensor([0.0, 0.0, -1.0])
    return relu_sae(W_enc_DS, W_dec_SD, b_dec_D, b_enc_S)


def reconstruction() -> Iterator[Check]:
    """A mean far from 0: what squares before it takes the mean would say 0.99."""
    m2 = FAR**2
    cosine_sum = (
        (12 + m2) / sqrt((32 + m2) * (9 + m2))  # a and b
        + 3 * (12 + m2) / sqrt((16 + m2) * (9 + m2))  # a alone, in three rows
        + m2 / sqrt((16 + m2) * m2)  # b alone
        + 3  # neither
    )
    expected = {
        "explained_variance": {"explained_variance": 1 - 36 / 56},
        "fvu": {"fvu": 36 / 56},
        "mse": {"mse": 36 / (8 * 4)},
        "mse_per_token": {"mse_per_token": 36 / 8},
        "l0": {"l0": 4 / 8},
        "l1": {"l1": 4 * 3 / 8},
        "dead_fraction": {"dead_fraction": 2 / 3},
        "density": {"density_max": 4 / 8, "density_p50": 0.0},
        "cosine": {"cosine": cosine_sum / 8},
    }
    options: dict[str, dict[str, Any]] = {name: {} for name in expected}
    found = judge_rows(shrinking_sae(FAR), eight_rows(FAR), options, rows_a_document=8)
    for metric, values in expected.items():
        yield from checks_of(metric, found[metric], values)


def shrinkage() -> Iterator[Check]:
    """Without a mean, which gamma would hide behind: 36 / 48."""
    expected = {"gamma": 36 / 48, "explained_variance": 1 - 36 / 56}
    options: dict[str, dict[str, Any]] = {name: {} for name in expected}
    found = judge_rows(shrinking_sae(0.0), eight_rows(0.0), options, rows_a_document=8)
    for metric, value in expected.items():
        yield from checks_of(metric, found[metric], {metric: value})


def other_definitions() -> Iterator[Check]:
    """The same rows by the definitions of SAEBench 0.6.0, whose explained variance is above 1.

    E[x^2] - E[x]^2 with squares for means: (8 + 4) - (8^2 + 4^2) = -68, and 1 + (36 / 8) / 68. The
    legacy variant: of a row 1 - ||x - x_hat||^2 / ||x - mean||^2, and its mean. The error: divided
    by the rows twice. All in one batch.
    """
    options: dict[str, dict[str, Any]] = {"compat_saebench": {}}
    found = judge_rows(shrinking_sae(0.0), eight_rows(0.0, copies=1), options, rows_a_document=8)
    legacy = ((1 - 17 / 13) + 3 * (1 - 1 / 5) + (1 - 16 / 13) + 3 * 1) / 8
    expected = {
        "compat_saebench_explained_variance": 1 + (36 / 8) / 68,
        "compat_saebench_explained_variance_legacy": legacy,
        "compat_saebench_mse": 36 / 8 / 8,
    }
    yield from checks_of("compat_saebench", found["compat_saebench"], expected)


def pursuit() -> Iterator[Check]:
    """Eight orthonormal directions d in a circle; row i is 3 d_i + 2 d_(i+1) + d_(i+2).

    sum over a row of ||x - mean||^2 = 14 - 8 (6 / 8)^2 = 9.5. The best k = 1 leaves 4 + 1, the
    best k = 2 leaves 1. The encoder is wrong by one place: for d_i it takes d_(i+1), so that its
    largest are 3 d_(i-1) and 2 d_i, which leaves 9 + 1 + 4 + 1 of k = 2 and 23 of k = 1.
    """
    directions_SD, _ = torch.linalg.qr(
        torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    )
    sae = relu_sae(directions_SD.roll(-1, 0).T, directions_SD)
    row_SD = 3 * directions_SD + 2 * directions_SD.roll(-1, 0) + directions_SD.roll(-2, 0)
    found = judge_rows(sae, row_SD.repeat(8, 1), {"ito": {"ks": (1, 2)}}, rows_a_document=8)
    expected = {
        "ito_explained_variance_k1": 1 - 5 / 9.5,
        "ito_explained_variance_k2": 1 - 1 / 9.5,
        "encoder_explained_variance_k1": 1 - 23 / 9.5,
        "encoder_explained_variance_k2": 1 - 15 / 9.5,
        "ito_gain_k2": 14 / 9.5,
    }
    yield from checks_of("ito", found["ito"], expected, tolerance=1e-4)


def intervals() -> Iterator[Check]:
    """Where all documents are the same an interval has no width; where they are 400 of one row, half
    of them with L0 2 and half with L0 0, the standard error of the mean is 1 / 20."""
    found = judge_rows(
        shrinking_sae(FAR), eight_rows(FAR), {"explained_variance": {}}, rows_a_document=8
    )
    ev = found["explained_variance"].values["explained_variance"]
    for name, end in (("lower end", ev.low), ("upper end", ev.high)):
        yield Check(metric="explained_variance", name=name, expected=1 - 36 / 56, found=end)
    sae = relu_sae(torch.eye(2), torch.eye(2))
    x_BD = torch.ones(400, 2)
    x_BD[::2] = -1.0
    l0 = judge_rows(sae, x_BD, {"l0": {}}, rows_a_document=1)["l0"].values["l0"]
    yield Check(metric="l0", name="l0", expected=1.0, found=l0.value)
    assert l0.low is not None
    assert l0.high is not None
    width = 2 * 1.96 / 20
    yield Check(
        metric="l0",
        name="width of the interval",
        expected=width,
        found=l0.high - l0.low,
        tolerance=0.15 * width,
    )
