"""Sparse latents, the bootstrap, result files: what every metric stands on.

# B rows, D d_in, S d_sae, U units
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_pipe.stages.evaluation.bootstrap import (
    Resamples,
    bootstrapped,
    described,
    percentile_interval,
    units_of,
    valued,
)
from sae_pipe.stages.evaluation.latents import SparseLatents
from sae_pipe.stages.evaluation.results import (
    Measured,
    Result,
    Source,
    as_json,
    read_result,
    read_results,
    result_path,
    write_result,
)
from sae_pipe.stages.metrics.base import Value
from sae_pipe.storage import InputError
from sae_pipe.storage.errors import StoreError


def whole(message: str) -> str:
    return f"^{re.escape(message)}$"


# --- latents ---


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), n_rows=st.integers(0, 9), share=st.sampled_from([0.0, 0.2, 1.0]))
def test_sparse_latents_are_the_matrix_that_they_were_made_of(
    seed: int, n_rows: int, share: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    latents_BS = torch.randn(n_rows, 7, generator=random)
    latents_BS *= torch.rand(n_rows, 7, generator=random) < share
    sparse = SparseLatents.of(latents_BS)
    assert sparse.n_rows == n_rows
    assert torch.equal(sparse.dense(), latents_BS)
    assert torch.equal(sparse.counts_B, (latents_BS != 0).sum(dim=1))
    assert torch.equal(sparse.fired_S(), (latents_BS != 0).sum(dim=0))
    torch.testing.assert_close(sparse.row_sums(sparse.values_N), latents_BS.double().sum(dim=1))
    joined = SparseLatents.joined([sparse.rows(0, n_rows // 2), sparse.rows(n_rows // 2, n_rows)])
    assert torch.equal(joined.dense(), latents_BS)
    assert torch.equal(joined.starts, sparse.starts)


# --- bootstrap ---


def test_resamples_depend_on_seed_and_units_alone() -> None:
    first, again = (np.concatenate(list(Resamples(50, 1, 20).units())) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (20, 50)
    assert not np.array_equal(first, np.concatenate(list(Resamples(50, 2, 20).units())))
    other_stream = Resamples(50, 1, 20, stream="letters")
    assert not np.array_equal(first, np.concatenate(list(other_stream.units())))


def test_totals_of_resamples_are_sums_over_the_drawn_units() -> None:
    rng = np.random.default_rng(0)
    sums_UK, resamples = rng.normal(size=(30, 2)), Resamples(30, 7, 40)
    drawn_RU = np.concatenate(list(resamples.units()))
    assert resamples.totals(sums_UK) == pytest.approx(sums_UK[drawn_RU].sum(axis=1))
    found = bootstrapped({"a": sums_UK[:, 0], "b": sums_UK[:, 1]}, resamples)
    assert found["b"] == pytest.approx(sums_UK[drawn_RU, 1].sum(axis=1))


def test_every_unit_is_drawn_equally_often() -> None:
    counts_U = np.concatenate(list(Resamples(20, 3, 2000).weights())).sum(axis=0)
    assert counts_U.sum() == 2000 * 20
    assert np.abs(counts_U - 2000).max() < 4.5 * np.sqrt(2000)


def test_a_95_percent_interval_of_a_ratio_covers_the_truth_about_95_times_in_100() -> None:
    """Documents of different lengths, rows of one document alike: a ratio of sums."""
    rng, covered, n_tries = np.random.default_rng(0), 0, 300
    for attempt in range(n_tries):
        rows_U = rng.integers(5, 50, 80).astype(float)
        sums_U = rows_U * (3 + rng.normal(size=80))  # the truth is 3
        totals = bootstrapped({"x": sums_U, "n": rows_U}, Resamples(80, attempt, 200))
        low, high = percentile_interval(totals["x"] / totals["n"])
        covered += low <= 3 <= high
    assert 0.90 <= covered / n_tries <= 0.98


def test_a_value_keeps_replicates_to_seven_digits_and_says_what_is_not_defined() -> None:
    replicates = np.array([1.23456789, 2.0, 3.0, 4.0] * 5)
    value = valued(2.5, replicates)
    assert value.replicates is not None
    assert value.replicates[0] == 1.234568
    assert (value.low, value.high) == pytest.approx(np.quantile(replicates, [0.025, 0.975]))
    assert valued(float("nan"), replicates) == Value(value=None)
    assert valued(float("inf")) == Value(value=None)
    many_undefined = np.where(np.arange(20) < 5, np.nan, 1.0)
    assert valued(1.0, many_undefined) == Value(value=1.0)
    few_undefined = np.where(np.arange(20) < 1, np.nan, 1.0)
    assert valued(1.0, few_undefined).replicates == (None, *[1.0] * 19)


def test_labels_become_dense_units() -> None:
    unit_B, n_units = units_of([7, 7, 3, 900])
    assert unit_B.tolist() == [1, 1, 0, 2]
    assert n_units == 3
    assert described("documents", 12) == "95 %, bootstrap over documents, 1000 resamples"
    assert described("documents", 1) == "none: fewer than two documents"


# --- results ---

SOURCE = Source(kind="store", name="acts", digest="d" * 64)


def measured(metric: str = "l0", **changes: Any) -> Measured:
    entry = Measured(
        metric=metric,
        definition="a number",
        direction="none",
        source=SOURCE,
        options={"k": 3},
        seed=0,
        sample={"rows": 10},
        interval="95 %, bootstrap over documents, 2 resamples",
        values={
            "l0": Value(value=2.0, low=1.0, high=3.0, replicates=(1.0, None)),
            "none": Value(value=None),
        },
        details={"edges": [0.0, 1.0]},
        seconds=0.5,
        version=1,
    )
    return replace(entry, **changes)


def result(out: Path, *entries: Measured) -> Result:
    run = {"name": "run-a", "arch": "topk", "baseline": None, "k": 3}
    return Result(path=result_path(out, "run-a", "0123456789abcdef"), run=run, metrics=entries)


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = result(tmp_path, measured(), measured("fvu"))
    write_result(written)
    assert written.path.name == "run-a-01234567.json"
    read = read_result(written.path)
    assert (read.run, read.metrics) == (written.run, written.metrics)
    assert read.provenance["versions"]
    assert (read.name, read.baseline) == ("run-a", None)
    baseline = result_path(tmp_path, "run-a", "0123456789abcdef", "random latents")
    assert baseline.name == "run-a-01234567-random-latents.json"


def test_an_entry_is_done_only_with_the_same_source_options_seed_and_version(
    tmp_path: Path,
) -> None:
    there = result(tmp_path, measured())
    assert there.has(measured(seconds=9.0).identity)
    for change in (
        {"metric": "fvu"},
        {"options": {"k": 4}},
        {"seed": 1},
        {"version": 2},
        {"source": replace(SOURCE, digest="e" * 64)},
    ):
        assert not there.has(measured(**change).identity)


def test_a_new_version_takes_the_place_of_the_old_and_other_sources_stay(tmp_path: Path) -> None:
    other = measured(source=replace(SOURCE, digest="e" * 64))
    there = result(tmp_path, measured(), other).with_entries([measured(version=2)])
    assert [(entry.version, entry.source.digest[0]) for entry in there.metrics] == [
        (2, "d"),
        (1, "e"),
    ]


def test_results_are_found_in_folders_and_other_files_are_left_out(tmp_path: Path) -> None:
    write_result(result(tmp_path, measured()))
    (tmp_path / "sweep.json").write_text('{"format": "sae-pipe-sweep"}')
    [found] = read_results([tmp_path, tmp_path / "run-a-01234567.json"])
    assert found.name == "run-a"


def test_places_without_results_are_named(tmp_path: Path) -> None:
    message = (
        f"Folder {tmp_path} holds no results. Pass the folder that `sae-pipe eval --out` wrote."
    )
    with pytest.raises(InputError, match=whole(message)):
        read_results([tmp_path])
    message = f"There is no result at {tmp_path / 'x'}. Pass files or folders that exist."
    with pytest.raises(InputError, match=whole(message)):
        read_results([tmp_path / "x"])


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["metrics"][0].pop(name)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no source": (_without("source"), "'source' is missing"),
    "text for a number": (
        lambda c: c["metrics"][0]["values"]["l0"].update(value="2"),
        "'2' is not a number",
    ),
    "no name": (lambda c: c["run"].pop("name"), "'name' is missing"),
    "unknown direction": (
        lambda c: c["metrics"][0].update(direction="left"),
        "direction 'left'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_named_with_what_is_wrong(damage: str, tmp_path: Path) -> None:
    change, reason = DAMAGES[damage]
    path = result(tmp_path, measured()).path
    write_result(result(tmp_path, measured()))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    message = f"Result {path} is damaged: {reason}. Remove it and run `sae-pipe eval` again."
    with pytest.raises(StoreError, match=whole(message)):
        read_result(path)


def test_what_is_not_a_result_or_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"format": "something"}')
    message = (
        f"{path} is not a result: it does not name the format 'sae-pipe evaluation'. "
        "Pass what `sae-pipe eval --out` wrote."
    )
    with pytest.raises(StoreError, match=whole(message)):
        read_result(path)
    path.write_text('{"format": "sae-pipe evaluation", "format_version": 2}')
    message = (
        f"Result {path} has format version 2, and this sae-pipe reads up to 1. "
        "Upgrade it: pip install --upgrade sae-pipe."
    )
    with pytest.raises(StoreError, match=whole(message)):
        read_result(path)
    path.write_text("[1")
    with pytest.raises(StoreError, match=f"^Result {re.escape(str(path))} is damaged: it is not"):
        read_result(path)


def test_json_has_no_nan() -> None:
    found = as_json({"a": np.array([1.0, np.nan]), 2: (np.float32(0.5), float("inf"), True)})
    assert found == {"a": [1.0, None], "2": [0.5, None, True]}
