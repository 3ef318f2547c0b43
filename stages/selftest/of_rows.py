"""Planted reconstructions, whose errors are known to the last digit.

# N rows, D d_in, F features
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..evaluation.judged import JudgedSae
from ..metrics import evaluate, get_metric
from ..metrics.rows import Moments, RowBatch, Rows
from ..sae import get_architecture
from ..sae.base import Sae
from . import Check
from .planted import orthonormal

_F, _D, _N = 8, 24, 960
_MEAN, _LENGTH, _SHRINKAGE = 5.0, 2.0, 0.75
_BIAS = (_SHRINKAGE - 1) * _LENGTH  # what shrinks, and keeps rounding errors from firing


def reconstruction() -> Iterator[Check]:
    """Rows far from zero, of one feature each; the SAE shrinks it, and knows all but the last.

    x = 5 c + 2 e_j, where c and the e_j are orthonormal and j takes all F values equally often;
    x_hat = 5 c + 1.5 e_j, or 5 c for the last. Per row then, with a = 2, u = 1 / F: ||x - mean||^2
    = a^2 (1 - u), ||x - x_hat||^2 = a^2 (0.0625 (1 - u) + u), ||x_hat||^2 = 25 + (1 - u) 0.5625 a^2,
    x . x_hat = 25 + (1 - u) 0.75 a^2.
    """
    sae, x_ND = _planted()
    names = ("explained_variance", "fvu", "mse", "gamma", "l0", "l1", "dead_fraction")
    found = evaluate(sae, torch.split(x_ND, 100), names)
    last, square = 1 / _F, _LENGTH**2
    known = 1 - last
    error = square * ((1 - _SHRINKAGE) ** 2 * known + last)
    fvu = error / (square * known)
    power = _MEAN**2 + known * _SHRINKAGE**2 * square
    overlap = _MEAN**2 + known * _SHRINKAGE * square
    expected = {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": error / _D,
        "gamma": power / overlap,
        "l0": known,
        "l1": known * _SHRINKAGE * _LENGTH,
        "dead_fraction": last,
    }
    for name, value in expected.items():
        yield Check(name=name, expected=value, found=found[name], tolerance=1e-5)


def pursuit() -> Iterator[Check]:
    """Sums of two orthonormal features of unequal length.

    The encoder takes the two halves of the dictionary for one another; pursuit looks at the
    dictionary alone, and finds everything with two latents. With one it finds the longer feature
    and misses 1 of the variance, which is 5 - 9 / F a row: the mean of all pairs is 3 / F times
    the sum of the features.
    """
    sae, _ = _planted()
    pairs = torch.tensor([(i, j) for i in range(_F) for j in range(_F) if i != j])
    x_ND = 2 * sae.W_dec[pairs[:, 0]] + sae.W_dec[pairs[:, 1]]
    sae.W_enc.copy_(sae.W_dec.roll(_F // 2, dims=0).T)
    sae.b_dec.zero_()
    variance = 5 - 9 / _F
    for k, unexplained in ((1, 1.0), (2, 0.0)):
        metric, data = get_metric("ito", ks=(k,)), Moments()
        rows = Rows(x_ND, np.zeros(len(x_ND), np.int64))
        judged = JudgedSae(sae, {"name": "planted"})
        latents = judged.encode(rows.x_BD)
        data.observe(rows)
        metric.observe(RowBatch(rows, latents, judged.decode(latents), judged))
        values = metric.values(data)
        yield Check(
            name=f"ito_explained_variance_k{k}",
            expected=1 - unexplained / variance,
            found=values[f"ito_explained_variance_k{k}"],
            tolerance=1e-4,
        )


def _planted() -> tuple[Sae, Tensor]:
    """An SAE written down by hand, and the rows of `reconstruction`."""
    rng = np.random.default_rng(0)
    basis = torch.from_numpy(orthonormal(_F + 1, _D, rng)).float()
    features_FD, centre_D = basis[:_F], _MEAN * basis[_F]
    sae = get_architecture("relu")(d_in=_D, d_sae=_F, k=None)
    with torch.no_grad():
        sae.W_enc.copy_(features_FD.T)
        sae.W_enc[:, -1] = 0
        sae.W_dec.copy_(features_FD)
        sae.get_parameter("b_enc").fill_(_BIAS)
        sae.b_dec.copy_(centre_D)
    x_ND = centre_D + _LENGTH * features_FD[torch.arange(_N) % _F]
    return sae.requires_grad_(False), x_ND
