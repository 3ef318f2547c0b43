"""The statistics of the shuffle against their definitions, and against simulated stores."""

# C contexts

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sae_pipe.storage.shuffle_statistics import (
    Ints,
    RangeTable,
    SeenPositions,
    pair_probability,
    rows_met,
    spearman,
)


@given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_rows_met_counts_the_other_rows_of_the_group(groups: list[int]) -> None:
    met = [sum(a == b for j, b in enumerate(groups) if j != i) for i, a in enumerate(groups)]
    found = rows_met(np.array([groups, groups]))
    np.testing.assert_allclose(found, [np.mean(met)] * 2)


@given(groups=st.lists(st.integers(0, 5), min_size=2, max_size=30))
def test_pair_probability_is_the_share_of_all_pairs(groups: list[int]) -> None:
    pairs = list(combinations(groups, 2))
    share = sum(a == b for a, b in pairs) / len(pairs)
    np.testing.assert_allclose(pair_probability(np.bincount(groups)), share)


def test_a_uniform_permutation_meets_what_is_expected_of_it() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 80, 50)
    groups = np.repeat(np.arange(50), counts)
    met = rows_met(np.array([rng.permutation(groups)[:100] for _ in range(2000)]))
    error = met.std() / 2000**0.5
    assert error < 0.02
    assert abs(met.mean() - pair_probability(counts) * 99) < 4 * error


def mean_ranks(values: Ints) -> NDArray[np.float64]:
    """Ranks from 0; ties have the mean of theirs."""
    ranks = [(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]
    return np.array(ranks, np.float64)


def correlation(of_row: Ints, order: Ints) -> tuple[float, float]:
    counts = np.bincount(of_row, minlength=len(order))
    sums = np.bincount(of_row, np.arange(len(of_row), dtype=np.float64), minlength=len(order))
    return spearman(counts, np.asarray(sums, np.float64), order)


@given(
    of_row=st.lists(st.integers(0, 7), min_size=3, max_size=40).filter(lambda x: len(set(x)) > 1),
    order=st.permutations(range(8)),
)
def test_spearman_is_the_correlation_of_ranks(of_row: list[int], order: list[int]) -> None:
    place_in_text = np.argsort(order)[of_row]
    definition = np.corrcoef(mean_ranks(place_in_text), np.arange(len(of_row)))[0, 1]
    np.testing.assert_allclose(
        correlation(np.array(of_row), np.array(order))[0], definition, atol=1e-12
    )


@pytest.mark.parametrize("block", [400, 2000, 10_000])
def test_the_standard_error_of_spearman_is_that_of_permuted_contexts(block: int) -> None:
    rng = np.random.default_rng(1)
    of_row = clustered(rng, block)
    found = [correlation(of_row, rng.permutation(200)) for _ in range(1000)]
    rho, error = np.array(found).T
    assert abs(rho.mean()) < 5 * rho.std() / 1000**0.5
    np.testing.assert_allclose(rho.std(), error.mean(), rtol=0.1)


def clustered(rng: np.random.Generator, block: int) -> Ints:
    """The contexts of 10,000 rows of 200 contexts of 1 to 99 rows, permuted inside blocks."""
    lengths = rng.integers(1, 100, 200)
    of_row = np.resize(np.repeat(np.arange(200), lengths), 10_000)
    of_row.sort()
    return np.concatenate(
        [rng.permutation(of_row[start : start + block]) for start in range(0, 10_000, block)]
    )


@pytest.mark.parametrize("block", [400, 2000, 10_000])
def test_chi_square_of_permuted_contexts_is_what_is_expected_of_it(block: int) -> None:
    rng = np.random.default_rng(2)
    of_row, bounds = clustered(rng, block), np.linspace(0, 10_000, 21).astype(np.int64)
    counts, found = np.bincount(of_row, minlength=200), []
    for _ in range(300):
        range_C = rng.permutation(200) * 20 // 200
        table = RangeTable(bounds, range_C, 20)
        for part in np.array_split(of_row, 7):  # not the parts of the table
            table.add(part)
        found.append(table.per_dof)
    expected = table.expected_per_dof(counts)
    if block == 10_000:
        assert abs(expected - 1) < 0.1
    else:
        assert expected > 2
    assert abs(np.mean(found) - expected) < 0.03 * expected
    uniform, at_most = (2 / table.dof) ** 0.5, expected * table.relative_error
    assert 0.8 * uniform < np.std(found) < 1.1 * at_most


def test_chi_square_is_its_definition() -> None:
    rng = np.random.default_rng(3)
    of_row, range_C = rng.integers(0, 40, 3000), np.arange(40) // 10
    table = RangeTable(np.array([0, 500, 1700, 3000]), range_C, 4)
    table.add(of_row)
    chi_square = 0.0
    for start, stop in pairwise([0, 500, 1700, 3000]):
        for text_range in range(4):
            count = (range_C[of_row[start:stop]] == text_range).sum()
            expected = (stop - start) * (range_C[of_row] == text_range).sum() / 3000
            chi_square += (count - expected) ** 2 / expected
    assert table.dof == 6
    np.testing.assert_allclose(table.per_dof, chi_square / 6)


@given(parts=st.lists(st.lists(st.integers(-3, 45), max_size=30), max_size=4))
def test_positions_that_come_again_are_counted(parts: list[list[int]]) -> None:
    seen = SeenPositions(41)
    for part in parts:
        seen.add(np.array(part, np.int64))
    counts = Counter(position for part in parts for position in part)
    inside = {position for position in counts if 0 <= position < 41}
    assert seen.outside == sum(counts[p] for p in counts if p not in inside)
    assert seen.repeated == sum(counts[p] - 1 for p in inside)
    for start, stop in ((0, 41), (3, 22), (8, 16), (40, 41)):
        assert (np.flatnonzero(seen.between(start, stop)) + start).tolist() == sorted(
            inside & set(range(start, stop))
        )
