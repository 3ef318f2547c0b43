"""Metrics are their definitions, whatever the mean, the scale and the batch size.

# N rows, D d_in, S d_sae
"""

import json
import math
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_pipe.stages.evaluation.latents import SparseLatents
from sae_pipe.stages.metrics import METRICS, evaluate, get_metric, names_of
from sae_pipe.stages.metrics.base import RowMetric
from sae_pipe.stages.metrics.density import Density
from sae_pipe.stages.metrics.rows import Moments, RowBatch, Rows
from sae_pipe.stages.sae import get_architecture
from sae_pipe.stages.sae.base import Sae
from sae_pipe.storage import InputError

N, D, S = 60, 5, 12
OVER_ROWS = names_of("rows")
BY_SUMS = [name for name in OVER_ROWS if name != "ito"]  # which has a decoder: test_ito.py


def triple(seed: int, mean: float = 100.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows far from zero, sparse latents of which two never fire, and an imperfect x_hat."""
    random = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, D, generator=random, dtype=torch.float64) + mean
    latents_NS = torch.relu(torch.randn(N, S, generator=random, dtype=torch.float64) - 1)
    latents_NS[:, :2] = 0
    x_hat_ND = 0.9 * (x_ND - mean) + mean + 0.3 * torch.randn(N, D, generator=random).double()
    return x_ND, latents_NS, x_hat_ND


def definitions(x_ND: Tensor, latents_NS: Tensor, x_hat_ND: Tensor) -> dict[str, float]:
    """Each value by its formula, on all rows at once."""
    x, f, x_hat = x_ND.numpy(), latents_NS.numpy(), x_hat_ND.numpy()
    fvu = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    density = (f != 0).mean(0)
    return {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": ((x - x_hat) ** 2).mean(),
        "mse_per_token": ((x - x_hat) ** 2).sum(1).mean(),
        "cosine": np.mean(
            [
                row @ other / np.sqrt((row @ row) * (other @ other))
                for row, other in zip(x, x_hat, strict=True)
            ]
        ),
        "l1": np.abs(f).sum(1).mean(),
        "l0": (f != 0).sum(1).mean(),
        "dead_fraction": (density == 0).mean(),
        "dead_fraction_rows": len(x),
        "gamma": (x_hat**2).sum() / (x * x_hat).sum(),
        "density_p10": np.quantile(density, 0.1),
        "density_p50": np.quantile(density, 0.5),
        "density_p90": np.quantile(density, 0.9),
        "density_max": density.max(),
        # All rows are one batch of it; squares are meant as they stand.
        "compat_saebench_explained_variance": 1
        - ((x - x_hat) ** 2).sum(1).mean() / ((x**2).sum(1).mean() - ((x**2).mean(0) ** 2).sum()),
        "compat_saebench_explained_variance_legacy": np.mean(
            1 - ((x - x_hat) ** 2).sum(1) / ((x - x.mean(0)) ** 2).sum(1)
        ),
        "compat_saebench_mse": np.mean(((x - x_hat) ** 2).sum(1) / len(x)),
    }


def measured(parts: tuple[Tensor, ...], batch_rows: int) -> dict[str, float]:
    judges, data = [get_metric(name) for name in BY_SUMS], Moments()
    first_row = 0
    for batch in zip(*(torch.split(part, batch_rows) for part in parts), strict=True):
        observe(judges, data, *batch, first_row=first_row)
        first_row += len(batch[0])
    return {name: value for judge in judges for name, value in judge.values(data).items()}


def observe(
    judges: Sequence[RowMetric],
    data: Moments,
    x_BD: Tensor,
    latents_BS: Tensor,
    x_hat_BD: Tensor,
    *,
    first_row: int = 0,
) -> None:
    """One batch; ten rows are a document."""
    rows = Rows(x_BD, np.arange(first_row, first_row + len(x_BD)) // 10, first_row)
    data.observe(rows)
    for judge in judges:
        judge.observe(RowBatch(rows, SparseLatents.of(latents_BS), x_hat_BD))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    batch_rows=st.integers(1, N),
    mean=st.sampled_from([0.0, 3.0, -1e3, 1e6]),
)
def test_every_metric_is_its_definition_in_batches_of_any_size(
    seed: int, batch_rows: int, mean: float
) -> None:
    parts = triple(seed, mean)
    # At a mean of 1e6 the data themselves have 10 digits left, and so have their definitions.
    assert measured(parts, batch_rows) == pytest.approx(definitions(*parts), rel=1e-7)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_scaling_activations_changes_what_has_their_unit_only(seed: int, scale: float) -> None:
    before, after = measured(triple(seed), N), measured(tuple(p * scale for p in triple(seed)), N)
    for found in (before, after):  # its explained variance depends on the scale
        found.pop("compat_saebench_explained_variance")
    for name, power in {"mse": 2, "mse_per_token": 2, "compat_saebench_mse": 2, "l1": 1}.items():
        assert after.pop(name) == pytest.approx(before.pop(name) * scale**power)
    assert after == pytest.approx(before)


def test_explained_variance_has_the_centred_truth_where_a_known_tool_has_not() -> None:
    """Squaring before the mean gives 0.99 for these rows; the truth is that nothing is explained."""
    x_ND, latents_NS, _ = triple(0)
    x_hat_ND = x_ND.mean(dim=0).expand_as(x_ND)
    assert measured((x_ND, latents_NS, x_hat_ND), 7)["explained_variance"] == pytest.approx(0)


def test_sums_are_in_float64() -> None:
    metric, data = get_metric("mse"), Moments()
    x_BD = torch.full((1, 1), 1.0)
    observe([metric], data, x_BD * 1e4, x_BD, x_BD * 0)
    for _ in range(100):
        observe([metric], data, x_BD, x_BD, x_BD * 0)  # float32 would lose each 1 beside 1e8
    assert metric.values(data)["mse"] == (1e8 + 100) / 101


@pytest.mark.parametrize("name", OVER_ROWS)
def test_no_rows_give_no_number_and_no_error(name: str) -> None:
    values = get_metric(name).values(Moments())
    values.pop("dead_fraction_rows", None)
    assert values
    assert all(math.isnan(value) for value in values.values())


def test_an_unknown_metric_lists_the_known_ones() -> None:
    message = f"Unknown metric 'recall': choose one of {', '.join(sorted(METRICS))}."
    with pytest.raises(InputError, match=re.escape(message)):
        get_metric("recall")


def test_density_keeps_the_vector() -> None:
    x_ND, latents_NS, x_hat_ND = triple(3)
    density = Density()
    observe([density], Moments(), x_ND, latents_NS, x_hat_ND)
    assert density.per_latent.tolist() == (latents_NS != 0).double().mean(0).tolist()


def test_evaluate_encodes_once_for_all_metrics_and_takes_arrays() -> None:
    options: dict[str, Any] = {"d_in": D, "d_sae": S, "k": 3}
    sae = get_architecture("topk")(**options)
    sae.initialise_(0)
    x_ND = triple(4, mean=2.0)[0].float()
    calls = count_encodes(sae)
    found = evaluate(sae, (part.numpy() for part in torch.split(x_ND, 16)), BY_SUMS)
    assert len(calls) == 4
    latents_NS = sae.encode(x_ND).detach()
    expected = definitions(
        *(part.double() for part in (x_ND, latents_NS, sae.decode(latents_NS).detach()))
    )
    assert found == pytest.approx(expected, rel=1e-5)
    pursued = evaluate(sae, [x_ND], ["ito"])
    assert pursued["encoder_explained_variance"] == pytest.approx(
        found["explained_variance"], rel=1e-5
    )


def test_evaluate_refuses_what_needs_more_than_rows() -> None:
    message = "Metric downstream needs text and not rows alone. Use `sae-pipe eval` for it."
    sae = get_architecture("topk")(d_in=D, d_sae=S, k=3)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        evaluate(sae, [], ["l0", "downstream"])


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is_in_a_line(name: str) -> None:
    metric = get_metric(name)
    assert metric.definition
    assert "\n" not in metric.definition
    assert metric.direction in ("up", "down", "none")
    assert metric.version >= 1
    assert json.loads(json.dumps(metric.options)) == metric.options
    module = import_module(type(metric).__module__)
    assert module.__doc__, "its file begins with the definition"


def count_encodes(sae: Sae) -> list[int]:
    calls: list[int] = []
    encode = sae.encode

    def counted(x_BD: Tensor) -> Tensor:
        calls.append(len(x_BD))
        return encode(x_BD)

    sae.encode = counted  # type: ignore[method-assign]
    return calls
