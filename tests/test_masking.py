"""Input masking: a pure function of (seed, context, position), nested in p, never at specials."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sae_pipe.stages.masking import MaskConfig, mask_tokens
from sae_pipe.storage.errors import InputError

MASK_ID = 63
SIZE = 32  # positions of a context


def text(n_contexts: int, seed: int = 0) -> NDArray[np.uint32]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 50, (n_contexts, SIZE), dtype=np.uint32)


def config(p: float, seed: int = 0, special_ids: tuple[int, ...] = ()) -> MaskConfig:
    return MaskConfig(p=p, mask_id=MASK_ID, seed=seed, special_ids=special_ids)


def is_masked(p: float, n: int = 64, seed: int = 0, first_context: int = 0) -> NDArray[np.bool_]:
    return mask_tokens(
        text(n), first_context=first_context, context_size=SIZE, config=config(p, seed)
    )[1]


@given(p=st.floats(0, 1), q=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_what_is_masked_at_a_lower_p_is_masked_at_a_higher_p(p: float, q: float, seed: int) -> None:
    low, high = sorted((p, q))
    assert not (is_masked(low, seed=seed) & ~is_masked(high, seed=seed)).any()


@given(cuts=st.lists(st.integers(0, 64), max_size=6), first=st.integers(0, 2**30))
def test_any_division_into_batches_masks_the_same_tokens(cuts: list[int], first: int) -> None:
    tokens = text(64)
    whole = mask_tokens(tokens, first_context=first, context_size=SIZE, config=config(0.3))
    edges = [0, *sorted(cuts), 64]
    parts = [
        mask_tokens(tokens[a:b], first_context=first + a, context_size=SIZE, config=config(0.3))
        for a, b in pairwise(edges)
    ]
    for i in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])


@given(length=st.integers(1, SIZE))
def test_a_shorter_document_is_masked_like_the_start_of_a_full_context(length: int) -> None:
    tokens = text(8)
    whole = mask_tokens(tokens, first_context=3, context_size=SIZE, config=config(0.5))
    short = mask_tokens(tokens[:, :length], first_context=3, context_size=SIZE, config=config(0.5))
    np.testing.assert_array_equal(short[1], whole[1][:, :length])
    np.testing.assert_array_equal(short[0], whole[0][:, :length])


@given(p=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=50)
def test_special_tokens_are_never_masked_and_change_no_other_draw(p: float, seed: int) -> None:
    tokens = text(32, seed)
    specials = (0, 7)
    masked, drawn = mask_tokens(
        tokens, first_context=5, context_size=SIZE, config=config(p, seed, specials)
    )
    _, drawn_anywhere = mask_tokens(
        tokens, first_context=5, context_size=SIZE, config=config(p, seed)
    )
    is_special = np.isin(tokens, specials)
    np.testing.assert_array_equal(masked[is_special], tokens[is_special])
    np.testing.assert_array_equal(drawn, drawn_anywhere & ~is_special)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_masked_tokens_become_the_mask_token_and_others_stay(dtype: type) -> None:
    tokens: NDArray[np.integer] = text(64).astype(dtype)
    before = tokens.copy()
    masked, drawn = mask_tokens(tokens, first_context=0, context_size=SIZE, config=config(0.3))
    assert masked.dtype == dtype
    np.testing.assert_array_equal(masked, np.where(drawn, MASK_ID, before))
    np.testing.assert_array_equal(tokens, before)  # the caller's tokens are not written to


def test_a_mask_token_in_the_text_counts_as_masked_only_where_drawn() -> None:
    tokens = np.full((64, SIZE), MASK_ID, np.uint32)
    masked, drawn = mask_tokens(tokens, first_context=0, context_size=SIZE, config=config(0.3))
    np.testing.assert_array_equal(masked, tokens)
    np.testing.assert_array_equal(drawn, is_masked(0.3))
    assert 0 < drawn.mean() < 1


def test_p_0_masks_nothing_and_p_1_everything() -> None:
    assert not is_masked(0.0).any()
    assert is_masked(1.0).all()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.75])
def test_the_rate_is_p(p: float) -> None:
    drawn = is_masked(p, n=8192)
    deviation = np.sqrt(p * (1 - p) / drawn.size)
    assert abs(drawn.mean() - p) < 4 * deviation
    # Also for each position of a context: none is preferred.
    assert np.abs(drawn.mean(axis=0) - p).max() < 5 * deviation * np.sqrt(SIZE)


@pytest.mark.parametrize(("along", "name"), [(1, "positions"), (0, "contexts")])
def test_neighbouring_draws_are_independent(along: int, name: str) -> None:
    """Chi-square of the 2 x 2 table of neighbours; one degree of freedom, 15.1 is p = 1e-4."""
    drawn = is_masked(0.3, n=8192)
    a = np.delete(drawn, -1, axis=along).ravel()
    b = np.delete(drawn, 0, axis=along).ravel()
    observed = np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])
    expected = observed.sum(1)[:, None] * observed.sum(0)[None, :] / observed.sum()
    assert ((observed - expected) ** 2 / expected).sum() < 15.1, name


def test_seeds_and_contexts_draw_differently() -> None:
    assert (is_masked(0.5) != is_masked(0.5, seed=1)).mean() > 0.4
    assert (is_masked(0.5) != is_masked(0.5, first_context=64)).mean() > 0.4


def test_the_draws_are_those_of_version_1() -> None:
    """Pinned: a store's mask is made again from (seed, p), so the draws may never change."""
    assert np.flatnonzero(is_masked(0.3, n=1)).tolist() == [1, 5, 11, 15, 18, 23, 27, 28]


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_outside_0_to_1_is_refused(p: float) -> None:
    message = (
        rf"^Mask probability {p} is outside \[0, 1\]\. "
        r"Pass --mask-p a number from 0 to 1, for example 0\.3\.$"
    )
    with pytest.raises(InputError, match=message):
        config(p)
