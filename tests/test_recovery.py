"""Every architecture finds a dictionary that is known; and data and measure are what they say."""

import pytest
import torch
from recovery import Task, recover
from superposition import Superposition

from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.stages.toys.truth import matched_cosine

SMALL = Task(n_features=40, d_in=24, active=2, d_sae=40, steps=1000, batch_size=256, lr=5e-3)
# Matryoshka's first prefixes must reconstruct alone, and mix features that have nothing in common.
LEAST = {"matryoshka": 0.6}


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_known_directions_are_found(arch: str) -> None:
    found = recover(arch, SMALL)
    assert found["untrained"] < 0.5
    assert found["cosine"] > LEAST.get(arch, 0.8)
    assert found["explained_variance"] > 0.7
    assert found["l0"] == pytest.approx(SMALL.active, rel=0.5)


def test_rows_have_the_mean_and_the_norm_that_were_asked_for() -> None:
    data = Superposition(n_features=100, d_in=20, active=4, mean_share=0.3, noise_share=0.1, seed=3)
    rows_ND = data.rows(20_000)
    assert float(rows_ND.square().sum(dim=1).mean()) == pytest.approx(1, rel=0.05)
    assert float(data.mean_D.square().sum()) == pytest.approx(0.3, rel=0.1)
    assert float(data.frequency_F.sum()) == pytest.approx(4)
    assert data.noise > 0
    assert torch.equal(
        Superposition(n_features=9, d_in=3, active=2).rows(5),
        Superposition(n_features=9, d_in=3, active=2).rows(5),
    )


def test_the_cosine_gives_each_direction_a_latent_of_its_own() -> None:
    directions = torch.eye(3)
    shuffled = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.5], [3.0, 0.0, 0.0]])
    assert matched_cosine(shuffled, directions) == pytest.approx(1)
    # One latent that is near all of them counts once; a mean of maxima would say 1 / sqrt(3).
    one = torch.cat([torch.ones(1, 3), torch.zeros(2, 3)])
    assert matched_cosine(one, directions) == pytest.approx(3**-0.5 / 3)
    assert matched_cosine(-directions, directions) <= 0
