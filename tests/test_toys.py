"""Toys are what their definitions say, the measures are theirs, and short fits show the known answers.

# N rows, D d_in, F features, S latents, n contexts, T positions
"""

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_pipe.stages.masking import mask_tokens
from sae_pipe.stages.toys import TOYS, get_toy
from sae_pipe.stages.toys.base import Family
from sae_pipe.stages.toys.fitting import best_of, fit_toy
from sae_pipe.stages.toys.hier4 import Hier4
from sae_pipe.stages.toys.masked_tokens import (
    CONTEXT,
    FIRST_CHILD,
    FIRST_NEUTRAL,
    FIRST_TRIGGER,
    MASK_ID,
    N_CHILDREN,
    N_PARENTS,
    MaskedTokens,
    features_of,
)
from sae_pipe.stages.toys.tree20 import Tree20
from sae_pipe.stages.toys.truth import (
    correlations,
    cosines,
    f1_scores,
    judge,
    own_latents,
    parent_recall,
)
from sae_pipe.storage import InputError

N = 40_000


# --- every toy ---


@pytest.mark.parametrize("name", TOYS)
def test_rows_are_sums_of_the_features_that_fire(name: str) -> None:
    toy = get_toy(name, seed=3)
    rows = toy.draw(50)
    for x_D, fires_F in zip(rows.x_ND, rows.fires_NF, strict=True):
        torch.testing.assert_close(x_D, toy.features_FD[fires_F].sum(dim=0))
    gram_FF = toy.features_FD @ toy.features_FD.T
    torch.testing.assert_close(gram_FF, gram_FF.diag().diag(), atol=1e-5, rtol=0)
    assert (rows.x_ND.shape, rows.fires_NF.shape) == ((50, toy.d_in), (50, toy.n_features))


@pytest.mark.parametrize("name", TOYS)
def test_a_seed_gives_the_same_rows_and_held_out_ones_are_others_of_the_same_features(
    name: str,
) -> None:
    one, same, other = (get_toy(name, seed=seed) for seed in (5, 5, 6))
    held_out = one.held_out()
    assert torch.equal(one.features_FD, held_out.features_FD)
    assert not torch.equal(one.features_FD, other.features_FD)
    x_ND = one.draw(100).x_ND
    assert torch.equal(x_ND, same.draw(100).x_ND)
    assert not torch.equal(x_ND, held_out.draw(100).x_ND)
    assert not torch.equal(x_ND, one.draw(100).x_ND)


@pytest.mark.parametrize("name", TOYS)
def test_where_a_child_fires_its_parent_fires(name: str) -> None:
    toy = get_toy(name)
    fires_NF = toy.fires(N)
    for family in toy.families:
        for child in family.children:
            assert fires_NF[:, child].any()
            assert fires_NF[fires_NF[:, child], family.parent].all()


@pytest.mark.parametrize("name", TOYS)
def test_every_setting_can_be_fitted(name: str) -> None:
    toy = get_toy(name)
    for arch, setting in toy.settings.items():
        config = toy.config(arch)
        assert config.schedule().steps == setting.steps
        assert toy.config(arch, steps=7, seed=2).schedule().steps == 7
        fitted = fit_toy(toy, toy.config(arch, steps=4))
        assert fitted.sae.encode(toy.draw(3).x_ND).shape == (3, toy.n_features)


def test_an_unknown_toy_lists_the_known_ones() -> None:
    message = "Unknown toy 'forest': choose one of hier4, masked_tokens, tree20."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        get_toy("forest")


# --- frequencies by definition ---


def test_hier4_fires_as_often_as_it_is_defined_to() -> None:
    fires_NF = Hier4().fires(N).double()
    assert fires_NF[:, 0].mean() == pytest.approx(0.25, abs=0.01)
    children_MC = fires_NF[fires_NF[:, 0] == 1, 1:]
    assert children_MC.mean(dim=0).numpy() == pytest.approx(0.15, abs=0.015)
    for one, other in itertools.combinations(range(3), 2):  # independent
        both = (children_MC[:, one] * children_MC[:, other]).mean()
        assert both == pytest.approx(0.15**2, abs=0.007)
    assert Hier4().features_FD.shape == (4, 50)


def test_tree20_fires_as_often_as_it_is_defined_to() -> None:
    toy = Tree20()
    fires_NF = toy.fires(N)
    assert fires_NF.double().sum(dim=1).mean() == pytest.approx(3 * 0.15 * 1.6 + 8 * 0.05, abs=0.02)
    assert fires_NF[:, 12:].double().mean(dim=0).numpy() == pytest.approx(0.05, abs=0.006)
    for family in toy.families:
        parent_N = fires_NF[:, family.parent]
        assert parent_N.double().mean() == pytest.approx(0.15, abs=0.01)
        children_MC = fires_NF[parent_N][:, list(family.children)]
        assert children_MC.sum(dim=1).max() == 1  # never two
        assert children_MC.double().mean(dim=0).numpy() == pytest.approx(0.2, abs=0.025)
    norms_F = torch.cat([Tree20(seed=seed).features_FD.norm(dim=1) for seed in range(30)])
    assert norms_F.mean() == pytest.approx(1, abs=0.01)
    assert norms_F.std() == pytest.approx(0.05, rel=0.15)


# --- masked_tokens ---


def test_a_child_stands_behind_its_trigger_and_nowhere_else() -> None:
    tokens_nT = MaskedTokens().text(200)
    assert tokens_nT.shape == (200, CONTEXT)
    assert (tokens_nT != MASK_ID).all()
    before, here = tokens_nT[:, :-1].ravel().astype(int), tokens_nT[:, 1:].ravel().astype(int)
    is_child = (here >= FIRST_CHILD) & (here < FIRST_NEUTRAL)
    assert (before[is_child] == FIRST_TRIGGER + (here[is_child] - FIRST_CHILD) // N_CHILDREN).all()
    is_trigger = (before >= FIRST_TRIGGER) & (before < FIRST_CHILD)
    assert is_child[is_trigger].mean() == pytest.approx(0.6, abs=0.03)
    assert not is_child[~is_trigger].any()
    next_is_trigger = (here >= FIRST_TRIGGER) & (here < FIRST_CHILD)
    assert next_is_trigger[~is_trigger].mean() == pytest.approx(0.6, abs=0.03)


def test_the_model_reads_the_token_and_the_one_before_it() -> None:
    trigger, child, neutral = FIRST_TRIGGER + 1, FIRST_CHILD + N_CHILDREN + 2, FIRST_NEUTRAL
    tokens_nT = np.array([[trigger, child, trigger, MASK_ID, child]], dtype=np.uint32)
    fires = [set(fires_F.nonzero().ravel().tolist()) for fires_F in features_of(tokens_nT)]
    token = N_PARENTS  # the first of the features of tokens
    assert fires == [
        {1, token + child}, {token + trigger}, {1, token + MASK_ID}, {token + child},
    ]  # fmt: skip
    assert not features_of(np.array([[neutral, neutral]], dtype=np.uint32))[0, :N_PARENTS].any()


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_masking_takes_the_parent_from_the_share_p_of_the_childs_rows(p: float) -> None:
    toy = MaskedTokens(p=p)
    fires_NF = toy.fires(N)
    for family in toy.families:
        has_child_N = fires_NF[:, list(family.children)].any(dim=1)
        share = fires_NF[has_child_N, family.parent].double().mean()
        assert share == pytest.approx(1 - p, abs=0.035)
    assert fires_NF[:, N_PARENTS + MASK_ID].double().mean() == pytest.approx(p, abs=0.01)


def test_the_masks_are_those_of_a_harvest_and_the_text_is_the_same_for_every_p() -> None:
    plain, masked = MaskedTokens(seed=2), MaskedTokens(seed=2, p=0.3)
    tokens_nT = plain.text(1024)
    np.testing.assert_array_equal(tokens_nT, masked.text(1024))
    config = masked.masking
    by_hand_nT, _ = mask_tokens(tokens_nT, first_context=0, context_size=CONTEXT, config=config)
    rows_NF = features_of(by_hand_nT)
    drawn_NF = MaskedTokens(seed=2, p=0.3).fires(len(rows_NF))  # permuted
    assert torch.equal(rows_NF.sum(dim=0), drawn_NF.sum(dim=0))
    assert not torch.equal(rows_NF, drawn_NF)


def test_held_out_rows_are_not_masked() -> None:
    held_out = MaskedTokens(p=0.5).held_out()
    assert not held_out.fires(5000)[:, N_PARENTS + MASK_ID].any()


# --- measures ---


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_measures_are_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fires = rng.random((60, 4)) < 0.4
    latents = np.maximum(rng.normal(size=(60, 6)), 0)
    latents[:, 5] = 0
    guess = latents[:, :4] > 0.5
    found = f1_scores(torch.from_numpy(guess), torch.from_numpy(fires))
    for feature in range(4):
        hits = (guess[:, feature] & fires[:, feature]).sum()
        precision, recall = hits / guess[:, feature].sum(), hits / fires[:, feature].sum()
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        assert found[feature] == pytest.approx(f1)
    correlation_FS = correlations(torch.from_numpy(latents), torch.from_numpy(fires))
    for feature, latent in itertools.product(range(4), range(5)):
        expected = np.corrcoef(fires[:, feature], latents[:, latent])[0, 1]
        assert correlation_FS[feature, latent] == pytest.approx(expected)
    assert (correlation_FS[:, 5] == 0).all()
    alone, with_child = parent_recall(
        Family(parent=0, children=(1, 3)), torch.from_numpy(guess[:, 0]), torch.from_numpy(fires)
    )
    rows: dict[bool, list[bool]] = {True: [], False: []}
    for row in range(60):
        if fires[row, 0]:
            rows[bool(fires[row, 1] or fires[row, 3])].append(bool(guess[row, 0]))
    assert (alone, with_child) == pytest.approx((np.mean(rows[False]), np.mean(rows[True])))


def test_each_feature_is_given_a_latent_of_its_own_by_the_best_sum() -> None:
    similarity_FS = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    latent_F = own_latents(similarity_FS)
    best = max(
        itertools.permutations(range(6), 4),
        key=lambda chosen: float(similarity_FS[range(4), chosen].sum()),
    )
    assert tuple(latent_F.tolist()) == best


def test_cosines_do_not_depend_on_lengths_and_a_row_of_zeros_has_none() -> None:
    decoder_SD = torch.tensor([[2.0, 0.0], [0.0, 0.0], [3.0, 3.0]])
    found = cosines(decoder_SD, torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
    assert found.numpy() == pytest.approx(np.array([[1, 0, 0.5**0.5], [0, 0, 0.5**0.5]]), abs=1e-7)


# --- fits (the settings' own take longer: tests/benchmarks/toys.py) ---

SHORT: dict[str, Any] = {"steps": 1000, "batch_size": 128, "lr": 5e-3, "seed": 1}


def test_an_l1_sae_absorbs_on_tree20_and_matryoshka_does_not() -> None:
    toy = Tree20(seed=1)
    l1_config = toy.config("relu", sparsity=0.15, resample_steps=None, **SHORT)
    l1 = judge(fit_toy(toy, l1_config).sae, toy)
    matryoshka = judge(
        fit_toy(toy, toy.config("matryoshka", dead_after_tokens=6400, **SHORT)).sae, toy
    )
    assert l1.recall_alone == matryoshka.recall_alone == 1
    assert l1.recall_gap > 0.4
    assert matryoshka.recall_gap < 0.2
    # What absorbs does not look worse by the cosine, and explains more.
    assert l1.explained_variance > matryoshka.explained_variance


def test_of_several_starts_the_one_with_the_smallest_loss_is_taken() -> None:
    toy = Hier4()
    config = toy.config("matryoshka", steps=40)
    losses = [fit_toy(toy, replace(config, seed=seed)).loss for seed in range(3)]
    assert best_of(Hier4(), config, range(3)).loss == min(losses)
