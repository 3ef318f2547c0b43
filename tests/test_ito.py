"""Inference-time optimisation against plain orthogonal matching pursuit.

# N rows, D d_in, S d_sae
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from sae_pipe.stages.evaluation.judged import JudgedSae
from sae_pipe.stages.evaluation.latents import SparseLatents
from sae_pipe.stages.metrics.ito import Ito, RowSample, largest, pursue
from sae_pipe.stages.metrics.rows import Moments, RowBatch, Rows
from sae_pipe.stages.sae import get_architecture

D, S = 24, 96


def some_sae(*, coherent: bool) -> JudgedSae:
    """With a decoder whose rows have different norms and, if coherent, a direction in common."""
    sae = get_architecture("topk")(d_in=D, d_sae=S, k=6)
    sae.initialise_(0)
    random = torch.Generator().manual_seed(1)
    rows_SD = torch.randn(S, D, generator=random)
    if coherent:
        rows_SD += torch.randn(1, D, generator=random)
    with torch.no_grad():
        sae.W_dec.copy_(rows_SD / rows_SD.norm(dim=1, keepdim=True))
        sae.W_dec.mul_(0.5 + torch.rand(S, 1, generator=random))
        sae.b_dec.fill_(20.0)
    return JudgedSae(sae, {"name": "sae"})


def some_rows(judged: JudgedSae, n_rows: int = 60) -> Tensor:
    """Sparse sums of the decoder's rows, noise, far from zero."""
    random = torch.Generator().manual_seed(2)
    active = torch.rand(n_rows, S, generator=random) < 5 / S
    x_ND = (active * torch.rand(n_rows, S, generator=random)) @ judged.W_dec + 20
    return x_ND + 0.02 * torch.randn(n_rows, D, generator=random)


def plain_pursuit(
    x_ND: NDArray[np.float64], rows_SD: NDArray[np.float64], k: int
) -> NDArray[np.float64]:
    """Orthogonal matching pursuit, its least squares non-negative: row by row, atom by atom."""
    atoms_SD = rows_SD / np.linalg.norm(rows_SD, axis=1, keepdims=True)
    found_ND = np.zeros_like(x_ND)
    for row, x_D in enumerate(x_ND):
        chosen: list[int] = []
        for _ in range(k):
            products_S = atoms_SD @ (x_D - found_ND[row])
            products_S[chosen] = -np.inf
            if products_S.max() <= 0:
                break
            chosen.append(int(products_S.argmax()))
            coefficients, _ = nnls(atoms_SD[chosen].T, x_D)
            found_ND[row] = coefficients @ atoms_SD[chosen]
    return found_ND


def variance_explained(x_ND: NDArray[np.float64], x_hat_ND: NDArray[np.float64]) -> float:
    return float(1 - ((x_ND - x_hat_ND) ** 2).sum() / ((x_ND - x_ND.mean(0)) ** 2).sum())


@pytest.mark.parametrize("coherent", [False, True])
@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_pursuit_explains_what_plain_matching_pursuit_explains(k: int, coherent: bool) -> None:
    judged = some_sae(coherent=coherent)
    x_ND = some_rows(judged)
    x, found = x_ND.double().numpy(), pursue(x_ND, judged, k).double().numpy()
    plain = plain_pursuit(x - 20, judged.W_dec.double().numpy(), k) + 20
    assert variance_explained(x, found) == pytest.approx(variance_explained(x, plain), abs=0.004)


def test_no_more_latents_are_used_than_asked_for_and_none_is_negative() -> None:
    judged = some_sae(coherent=False)
    x_ND = some_rows(judged, 10)
    found = pursue(x_ND, judged, 1) - judged.b_dec
    # One atom, not negative: each row is a positive multiple of a decoder row.
    cosine = torch.nn.functional.normalize(found) @ torch.nn.functional.normalize(judged.W_dec).T
    torch.testing.assert_close(cosine.max(dim=1).values, torch.ones(10), rtol=0, atol=1e-5)


def test_the_largest_latents_of_a_row_are_kept_by_what_they_add() -> None:
    latents = torch.tensor([[3.0, 0, 1, 2], [0, 0, 0, 0], [1, 1, 1, 4]])
    rows_SD = torch.tensor([[0.1, 0], [1, 0], [5, 0], [1, 0]])
    kept = largest(SparseLatents.of(latents), rows_SD, 2).dense()
    assert kept.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 1, 4]]


@pytest.mark.parametrize("batch_rows", [7, 60])
def test_the_metric_has_both_explained_variances_at_the_l0_of_the_sae(batch_rows: int) -> None:
    judged = some_sae(coherent=False)
    x_ND = some_rows(judged)
    metric, data = Ito(rows=30), Moments()
    for first in range(0, len(x_ND), batch_rows):
        x_BD = x_ND[first : first + batch_rows]
        rows = Rows(x_BD, np.arange(first, first + len(x_BD)) // 5, first)
        data.observe(rows)
        latents = judged.encode(x_BD)
        metric.observe(RowBatch(rows, latents, judged.decode(latents), judged))
    found = metric.result(data, seed=0)
    sample = RowSample(30)
    sample.observe(Rows(x_ND, np.zeros(60, np.int64)))
    x = sample.rows.x_BD
    assert found.details == {"k": 6}
    assert found.sample["rows"] == 30
    values = {name: value.value for name, value in found.values.items()}
    exact = x.double().numpy()
    encoded = variance_explained(exact, judged.decode(judged.encode(x)).double().numpy())
    pursued = variance_explained(exact, pursue(x, judged, 6).double().numpy())
    assert values == pytest.approx(
        {
            "ito_explained_variance": pursued,
            "encoder_explained_variance": encoded,
            "ito_gain": pursued - encoded,
        },
        abs=1e-6,
    )
    assert found.values["ito_gain"].low is not None


def test_a_sample_is_the_same_whatever_the_batches_and_uniform() -> None:
    x_ND = torch.arange(500.0)[:, None]
    found = []
    for batch_rows in (500, 33):
        sample = RowSample(100)
        for first in range(0, 500, batch_rows):
            part = x_ND[first : first + batch_rows]
            sample.observe(Rows(part, np.zeros(len(part), np.int64), first))
        found.append(sample.rows.x_BD.flatten().tolist())
    assert found[0] == found[1]
    assert len(set(found[0])) == 100
    assert 200 < np.mean(found[0]) < 300
