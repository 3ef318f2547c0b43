"""Tables of results: numbers against plain numpy, what is bold, what is never mixed, escaping."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_pipe.stages.compare import compare
from sae_pipe.stages.compare.grid import grids
from sae_pipe.stages.compare.headlines import DIRECTIONS, HEADLINES
from sae_pipe.stages.compare.intervals import Sample, difference, mean_of
from sae_pipe.stages.compare.notes import notes
from sae_pipe.stages.evaluation.results import Result
from sae_pipe.stages.metrics import METRICS
from sae_pipe.stages.report.names import FOREMOST, FOREMOST_METRICS
from sae_pipe.storage.errors import InputError

from .judging import CORE, OTHER, entry, experiment, result, value_of, with_facts

OUT = Path("results")


def sample(
    value: float, replicates: object, *, seed: int = 0, judged_with: object = "same"
) -> Sample:
    found = None if replicates is None else np.asarray(replicates, dtype=np.float64)
    return Sample(value=value, replicates_R=found, seed=seed, judged_with=judged_with)


def shifts(seed: int, count: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count)


# --- intervals ---


def test_a_paired_difference_is_that_of_numpy_over_the_pooled_replicates() -> None:
    ones = [5.0 + shifts(0), 6.0 + shifts(1)]
    others = [4.5 + shifts(2), 5.0 + shifts(3)]
    found = difference(
        [sample(5, ones[0], seed=3), sample(6, ones[1], seed=4)],
        [sample(5, others[1], seed=4), sample(4.5, others[0], seed=3)],  # another order
    )
    pooled = np.concatenate([ones[0] - others[0], ones[1] - others[1]])
    assert found.how == "paired"
    assert found.value == pytest.approx(0.75)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(pooled, (2.5, 97.5))))


def test_what_resamples_share_drops_out_of_a_paired_difference() -> None:
    hard = 10 * shifts(0)
    paired = difference([sample(5, 5 + hard)], [sample(4, 4 + hard)])
    assert (paired.low, paired.high) == pytest.approx((1, 1))
    assert paired.excludes_zero
    unpaired = difference([sample(5, 5 + hard)], [sample(4, 4 + hard, judged_with="other")])
    assert unpaired.how == "unpaired"
    assert unpaired.value == paired.value
    assert not unpaired.excludes_zero
    wide = 10 * np.sqrt(2) * 1.96
    assert (unpaired.low, unpaired.high) == pytest.approx((1 - wide, 1 + wide), rel=0.15)


def test_another_number_of_replicates_is_unpaired_and_none_at_all_is_no_interval() -> None:
    found = difference([sample(1, shifts(0, 100))], [sample(1, shifts(0, 200))])
    assert found.how == "unpaired"
    found = difference([sample(2, shifts(0))], [sample(1, None)])
    assert (found.value, found.low, found.how) == (1, None, "no interval")
    assert not found.excludes_zero


def test_intervals_without_replicates_are_combined_as_of_independent_numbers() -> None:
    one = Sample(value=5, replicates_R=None, seed=0, judged_with=0, low=4, high=7)
    other = Sample(value=2, replicates_R=None, seed=0, judged_with=0, low=1.5, high=2.2)
    found = difference([one], [other])
    assert found.how == "unpaired"
    assert found.low == pytest.approx(3 - np.sqrt(1**2 + 0.2**2))
    assert found.high == pytest.approx(3 + np.sqrt(2**2 + 0.5**2))
    more = difference(
        [one, replace(one, value=6, low=5.9, high=6.1, seed=1)], [other, replace(other, seed=1)]
    )
    assert more.value == 3.5
    assert more.low == found.low
    assert more.high == found.high
    assert mean_of([one]).low == 4
    assert mean_of([one, one]).low is None


def test_runs_without_a_partner_of_their_seed_are_paired_with_all() -> None:
    ones, other = [2 + shifts(0), 3 + shifts(1)], 1 + shifts(2)
    found = difference([sample(2, ones[0]), sample(3, ones[1], seed=1)], [sample(1, other)])
    pooled = np.concatenate([ones[0] - other, ones[1] - other])
    assert found.how == "paired"
    assert found.value == pytest.approx(1.5)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(pooled, (2.5, 97.5))))


def test_resamples_that_do_not_define_the_value_are_left_out_in_pairs() -> None:
    one, other = 2 + shifts(0), 1 + shifts(1)
    gaps = one.copy()
    gaps[:50] = np.nan
    found = difference([sample(2, gaps)], [sample(1, other)])
    wanted = np.percentile((one - other)[50:], (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx(tuple(wanted))
    gaps[:190] = np.nan
    assert difference([sample(2, gaps)], [sample(1, other)]).how == "no interval"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.integers(20, 60))
def test_a_mean_over_runs_is_plain_and_its_interval_that_of_all_replicates(
    centres: list[float], count: int
) -> None:
    samples = [sample(c, c + shifts(i, count), seed=i) for i, c in enumerate(centres)]
    found = mean_of(samples)
    assert found.value == pytest.approx(np.mean(centres))
    pooled = np.concatenate([c + shifts(i, count) for i, c in enumerate(centres)])
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(pooled, (2.5, 97.5))))


def test_runs_with_more_replicates_weigh_no_more_than_others() -> None:
    few, many = shifts(0, 500), 10 + shifts(1, 5000)
    found = mean_of([sample(0, few), sample(10, many, seed=1)])
    low, high = np.percentile(few, 5), np.percentile(many, 95)  # half of the pool each
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


# --- tables ---


def test_the_table_has_the_papers_layout_with_means_over_seeds() -> None:
    comparison = compare(experiment(OUT), ["mask_p", "arch", "l0"])
    (grid,) = grids(comparison)
    assert grid.title == "architecture matryoshka"
    assert grid.header == [
        "metric", "L0", "without mask", "p = 0.3", "difference",
        "untrained", "random latents", "mean", "oracle",
    ]  # fmt: skip
    first = [cell.text for cell in grid.rows[0].cells]
    assert first[:4] == ["absorption.mean_full ↑", "10", "87.05", "90.05"]
    assert first[5:] == ["95.00", "-", "-", "-"]
    assert re.fullmatch(r"\+3\.00 \[\+2\.\d\d, \+3\.\d\d\]", first[4])
    assert [row.cells[1].text for row in grid.rows] == ["10", "20", "40"] * 3


def test_numbers_of_a_table_are_those_of_plain_numpy() -> None:
    results = experiment(OUT)
    line = compare(results, ["mask_p", "l0"], metrics=["absorption"]).lines[1]  # L0 20
    replicates = {
        (r.run["mask_p"], r.run["seed"]): np.array(r.metrics[1].values["mean_full"].replicates)
        for r in results
        if r.run["k"] == 20 and r.baseline is None
    }
    pooled = np.concatenate([replicates[0.3, s] - replicates[0.0, s] for s in (0, 1)])
    found = line.differences[0.3]
    assert found.value == pytest.approx(3)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(pooled, (2.5, 97.5))))
    assert line.cells[0.0].estimate.value == pytest.approx(88.05)
    assert line.cells[0.0].estimate.seeds == (0, 1)


def test_only_a_difference_whose_interval_excludes_zero_is_bold() -> None:
    comparison = compare(experiment(OUT), ["mask_p", "l0"])
    by_name = {line.series.name: line for line in comparison.lines}
    same, better, plain = (
        by_name["explained_variance"],
        by_name["absorption.mean_full"],
        by_name["l0"],
    )
    assert [cell.is_bold for cell in same.cells.values()] == [False, False]
    assert not same.differences[0.3].excludes_zero
    assert [cell.is_bold for cell in better.cells.values()] == [False, True]
    # No way is better for L0: the difference is marked, and neither number.
    assert [cell.is_bold for cell in plain.cells.values()] == [False, False]
    (grid,) = grids(comparison)
    bold = {
        (row.cells[0].text, i) for row in grid.rows for i, c in enumerate(row.cells) if c.is_bold
    }
    assert bold == {
        ("absorption.mean_full ↑", 3),
        ("absorption.mean_full ↑", 4),
        ("", 3),
        ("", 4),
        ("l0", 4),
    }


@pytest.mark.parametrize(("direction", "bold"), [("up", [True, False]), ("down", [False, True])])
def test_the_better_side_is_bold_whichever_way_is_better(direction: str, bold: list[bool]) -> None:
    results = [
        result(OUT, entry("m", {"m": value_of(v, shifts(0))}, direction=direction), mask_p=p)
        for p, v in ((0.0, 2.0), (0.3, 1.0))
    ]
    (line,) = compare(results, ["mask_p"]).lines
    assert [cell.is_bold for cell in line.cells.values()] == bold


def test_the_first_column_is_bold_only_where_it_is_better_than_all_others() -> None:
    def bold(*values: float) -> list[bool]:
        results = [
            result(OUT, entry("m", {"m": value_of(v, shifts(0))}), mask_p=p)
            for p, v in zip((0.0, 0.2, 0.3), values, strict=True)
        ]
        (line,) = compare(results, ["mask_p"]).lines
        return [cell.is_bold for cell in line.cells.values()]

    assert bold(2, 1, 1) == [True, False, False]
    assert bold(2, 1, 3) == [False, False, True]
    assert bold(2, 1, 2) == [False, False, False]


def test_a_missing_cell_is_a_dash_and_has_no_difference() -> None:
    results = [r for r in experiment(OUT, seeds=(0,)) if (r.run["mask_p"], r.run["k"]) != (0.3, 20)]
    (grid,) = grids(compare(results, ["mask_p", "l0"], metrics=["absorption"]))
    assert [cell.text for cell in grid.rows[1].cells[:5]] == ["", "20", "88.00", "-", "-"]


def test_a_value_that_is_not_defined_is_a_dash() -> None:
    results = experiment(OUT, seeds=(0,), ks=(20,))
    empty = replace(results[2].metrics[0], values={"explained_variance": value_of(0, None)})
    empty = replace(
        empty,
        values={"explained_variance": replace(empty.values["explained_variance"], value=None)},
    )
    results[2] = replace(results[2], metrics=(empty,))
    (grid,) = grids(compare(results, ["mask_p", "l0"], metrics=["explained_variance"]))
    assert [cell.text for cell in grid.rows[0].cells[2:5]] == ["0.7000", "-", "-"]


def test_a_metric_that_was_refused_everywhere_is_named_with_its_reason() -> None:
    refused = entry(
        "absorption", {"full": value_of(0, None)}, details={"refused": "Too few letters."}
    )
    refused = replace(refused, values={"full": replace(refused.values["full"], value=None)})
    other = entry("m", {"m": value_of(1, shifts(0))})
    comparison = compare([result(OUT, refused, other)])
    assert [line.series.name for line in comparison.lines] == ["m"]
    assert "No value of absorption.full. Too few letters." in notes(comparison)


def test_one_run_alone_is_a_table_without_differences() -> None:
    comparison = compare(experiment(OUT, seeds=(0,), ks=(20,))[:1])
    (grid,) = grids(comparison)
    assert grid.header[:4] == ["metric", "L0", "without mask", "untrained"]
    assert [row.cells[2].text for row in grid.rows] == ["88.00", "0.7000", "20.00"]
    assert notes(comparison)[0] == (
        "Each number is of one SAE: what another seed would give is not in any interval."
    )
    assert not any("Differences" in note for note in notes(comparison))


def test_runs_judged_on_different_data_are_listed_apart_with_a_sentence() -> None:
    results = experiment(OUT, seeds=(0,), ks=(20,))
    masked = results[2]
    results[2] = replace(masked, metrics=tuple(replace(e, source=OTHER) for e in masked.metrics))
    comparison = compare(results, ["mask_p", "l0"], metrics=["explained_variance"])
    assert [dict.fromkeys(line.cells) for line in comparison.lines] == [{0.0: None}, {0.3: None}]
    assert not comparison.all_differences
    assert (
        "explained_variance was judged on different data, which is not mixed but listed apart: core "
        "(c0c0c0c0): acts-p0.0-l0_20-seed0; acts (5e5e5e5e): acts-p0.3-l0_20-seed0."
    ) in notes(comparison)
    (grid,) = grids(comparison)
    names = [row.cells[0].text for row in grid.rows]
    assert names == [
        "explained_variance ↑ on core (c0c0c0c0)",
        "explained_variance ↑ on acts (5e5e5e5e)",
    ]


def test_one_metric_on_two_sets_of_data_is_two_lines_and_no_complaint() -> None:
    def judged(p: float) -> Result:
        on_both = [entry("m", {"m": value_of(1, shifts(0))}, source=s) for s in (CORE, OTHER)]
        return result(OUT, *on_both, mask_p=p)

    comparison = compare([judged(0.0), judged(0.3)], ["mask_p"])
    assert len(comparison.lines) == 2
    assert not any("different data" in note for note in notes(comparison))


@pytest.mark.parametrize("change", [{"options": {"k": 2}}, {"version": 2}])
def test_other_options_or_another_version_of_a_metric_are_not_mixed(
    change: dict[str, object],
) -> None:
    results = experiment(OUT, seeds=(0,), ks=(20,))
    changed = tuple(replace(e, **change) for e in results[2].metrics)  # type: ignore[arg-type]
    results[2] = replace(results[2], metrics=changed)
    assert not compare(results, ["mask_p", "l0"]).all_differences


def test_another_bootstrap_seed_is_compared_unpaired_and_marked() -> None:
    results = experiment(OUT, seeds=(0,), ks=(20,))
    results[2] = replace(results[2], metrics=tuple(replace(e, seed=7) for e in results[2].metrics))
    comparison = compare(results, ["mask_p", "l0"], metrics=["absorption"])
    (grid,) = grids(comparison)
    assert grid.rows[0].cells[4].text.endswith("]†")
    assert any(note.startswith("† unpaired: ") for note in notes(comparison))


def test_runs_that_are_no_repetitions_of_one_another_are_not_averaged() -> None:
    results = experiment(OUT, seeds=(0,), ks=(20,))
    wide = [with_facts(r, d_sae=4096, name=f"wide-{r.name}") for r in results]
    comparison = compare([*results, *wide], ["mask_p", "l0"])
    assert [table.heading for table in comparison.tables] == [{"d_sae": 1024}, {"d_sae": 4096}]
    assert (
        "SAEs differ in d_sae, which --by does not name: they are listed apart by it."
    ) in notes(comparison)


def test_recipes_that_differ_inside_a_cell_are_named() -> None:
    results = experiment(OUT, ks=(20,))
    changed = [
        with_facts(r, recipe=r.run["recipe"] | {"lr": 1e-3}) if r.run["seed"] else r
        for r in results
    ]
    assert (
        "SAEs of one cell differ in their recipes: lr (0.001, not known). "
        "Name it in --by as recipe.NAME."
    ) in notes(compare(changed))
    assert not any("recipes" in note for note in notes(compare(changed, ["mask_p", "recipe.lr"])))


def test_measured_l0_that_differ_are_pointed_out() -> None:
    assert (
        "Measured L0 differ by more than 20 % between columns, so that other metrics are not compared "
        "like for like there. Most where L0 10; without mask: 10.0, p = 0.3: 15.0."
    ) in notes(compare(experiment(OUT)))


def test_cells_of_fewer_seeds_are_named() -> None:
    results = [r for r in experiment(OUT, ks=(20,)) if (r.run["mask_p"], r.run["seed"]) != (0.3, 1)]
    assert notes(compare(results, metrics=["absorption"]))[0] == (
        "Means over 2 SAEs (seeds 0, 1); fewer in absorption.mean_full at L0 20, p = 0.3: 1."
    )


def test_sample_sizes_stand_under_the_table() -> None:
    assert notes(compare(experiment(OUT), metrics=["absorption", "l0"]))[-1] == (
        "absorption.mean_full, l0: 20,000 rows, 50 documents of core (evaluation set, suite core, "
        "c0c0c0c0); interval 95 %, bootstrap over documents, 200 resamples; seed 0."
    )


def test_the_oracle_stands_beside_what_it_is_the_oracle_of() -> None:
    values = {"auc": value_of(0.7, shifts(0)), "oracle_auc": value_of(0.83, shifts(1))}
    results = [result(OUT, entry("ood", values), mask_p=p) for p in (0.0, 0.3)]
    comparison = compare(results, ["mask_p"])
    assert [line.series.name for line in comparison.lines] == ["ood.auc"]
    assert comparison.lines[0].baselines["oracle"].value == pytest.approx(0.83)


def test_metrics_are_chosen_by_name_value_and_pattern_in_the_order_asked_for() -> None:
    def names(*wanted: str) -> list[str]:
        chosen = compare(experiment(OUT), ["mask_p"], metrics=wanted).series
        return [series.name for series in chosen]

    assert names("l0", "absorption") == ["l0", "absorption.mean_full"]
    assert names("absorption.raw") == ["absorption.raw"]
    assert names("absorption.*") == ["absorption.mean_full", "absorption.raw"]
    assert names("all") == ["absorption.mean_full", "absorption.raw", "explained_variance", "l0"]
    with pytest.raises(InputError, match=re.escape(
        "--metrics 'tpp' matches nothing. These results have absorption, explained_variance, l0; a "
        "name with .* shows all values of one, and `all` everything."
    )):  # fmt: skip
        names("tpp")


def test_runs_without_a_k_are_grouped_by_their_coefficient() -> None:
    results = [
        result(OUT, entry("m", {"m": value_of(1, shifts(0))}), mask_p=p, k=20) for p in (0.0, 0.3)
    ]
    results = [with_facts(r, k=None, recipe={"sparsity": 0.02}) for r in results]
    (grid,) = grids(compare(results, ["mask_p", "l0"]))
    assert [row.cells[1].text for row in grid.rows] == ["coefficient 0.02"]


def test_two_files_of_one_run_are_one_run() -> None:
    first = result(OUT, entry("a", {"a": value_of(1, shifts(0))}))
    second = result(Path("more"), entry("b", {"b": value_of(2, shifts(0))}))
    comparison = compare([first, second], ["mask_p"])
    assert len(comparison.runs) == 1
    assert [series.name for series in comparison.series] == ["a", "b"]


def test_headlines_and_directions_are_of_metrics_that_there_are() -> None:
    assert set(HEADLINES) <= set(METRICS)
    assert {metric for metric, _ in DIRECTIONS} <= set(METRICS)
    assert set(DIRECTIONS.values()) <= {"up", "down", "none"}
    assert set(FOREMOST_METRICS) <= set(HEADLINES)
    assert all(value == HEADLINES[metric][0] for metric, value in FOREMOST)


# --- what cannot work ---


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=re.escape(
        "--by 'width' is not known. These results have l0, name, path, sae_sha256, arch, k, d_in, "
        "d_sae, seed, steps, tokens, model, model_revision, layer, hook, mask_p, store, "
        "store_digest, and recipe.NAME for what is in a run's recipe."
    )):  # fmt: skip
        compare(experiment(OUT), ["mask_p", "width"])


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        ([], "--by names nothing. Pass for example --by mask_p,arch,l0."),
        (["l0", "k"], "--by l0,k names one key twice. Pass each once."),
    ],
)
def test_keys_that_make_no_table_are_refused(by: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        compare(experiment(OUT), by)


def test_baselines_alone_and_runs_without_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"These results are of baselines alone\. Pass the folder"):
        compare([r for r in experiment(OUT) if r.baseline])
    with pytest.raises(
        InputError, match=r"These results hold no numbers yet\. Run `sae-pipe eval`"
    ):
        compare([result(OUT)])
