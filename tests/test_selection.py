"""The largest entries of rows and batches: the shortcuts give what a plain sort gives."""

# B rows, S d_sae

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_pipe.stages.sae.selection import largest_of_batch, largest_of_rows


def _matrix(seed: int, n_rows: int, n_latents: int, kind: str) -> Tensor:
    """Pre-activations of rows that differ in scale; a few values only where ties are wanted."""
    random = torch.Generator().manual_seed(seed)
    scale_B1 = 3 * torch.rand(n_rows, 1, generator=random)
    pre_BS = torch.randn(n_rows, n_latents, generator=random) * scale_B1 + 0.5
    if kind == "ties":
        pre_BS = (2 * pre_BS).round()
    elif kind == "relu":
        pre_BS = torch.relu(pre_BS - 3)
    elif kind == "half dead":
        pre_BS[:, : n_latents // 2] -= 20
    return pre_BS


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_rows=st.integers(1, 40),
    n_latents=st.integers(30, 1200),
    k=st.integers(1, 45),
    kind=st.sampled_from(["plain", "ties", "relu", "half dead"]),
)
def test_the_largest_of_each_row_have_the_values_of_a_sort(
    seed: int, n_rows: int, n_latents: int, k: int, kind: str
) -> None:
    k = min(k, n_latents)
    pre_BS = _matrix(seed, n_rows, n_latents, kind)
    flat_BK = largest_of_rows(pre_BS, k).view(n_rows, k)
    assert torch.equal(flat_BK // n_latents, torch.arange(n_rows)[:, None].expand(n_rows, k))
    assert bool((flat_BK.diff(dim=1) > 0).all()), "ascending, and none twice"
    found_BK = pre_BS.view(-1)[flat_BK].sort(dim=1).values
    assert torch.equal(found_BK, pre_BS.sort(dim=1).values[:, n_latents - k :])


def test_a_row_of_nan_costs_the_other_rows_nothing() -> None:
    pre_BS = _matrix(0, 5, 1024, "plain")
    pre_BS[2] = torch.nan
    flat_BK = largest_of_rows(pre_BS, 8).view(5, 8)
    others = [0, 1, 3, 4]
    found_BK = pre_BS.view(-1)[flat_BK[others]].sort(dim=1).values
    assert torch.equal(found_BK, pre_BS[others].sort(dim=1).values[:, -8:])


@pytest.mark.parametrize("kind", ["plain", "ties", "half dead"])
def test_the_largest_of_a_batch_have_the_values_of_a_sort(kind: str) -> None:
    pre_BS = _matrix(1, 64, 512, kind)
    found = pre_BS.view(-1)[largest_of_batch(pre_BS, 6)].sort().values
    wanted = np.sort(pre_BS.numpy().reshape(-1))[-6 * 64 :]
    assert np.array_equal(found.numpy(), wanted[wanted > 0])
