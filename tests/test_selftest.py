"""sae-pipe selftest: every metric is right on cases whose answers are known, and a wrong one shows."""

import json

import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages import selftest
from sae_pipe.stages.metrics import METRICS
from sae_pipe.stages.selftest import CASES, CaseResult, Check


@pytest.fixture(scope="module")
def results() -> list[CaseResult]:
    return list(selftest.run_cases())


def test_every_number_is_what_it_must_be(results: list[CaseResult]) -> None:
    assert [result.case for result in results] == list(CASES)
    assert [result.error for result in results if result.error] == []
    wrong = [check for result in results for check in result.checks if not check.passed]
    assert wrong == []
    assert all(result.checks for result in results)


@pytest.mark.parametrize("found", [None, float("nan"), 1.2])
def test_what_is_missing_or_too_far_off_does_not_pass(found: float | None) -> None:
    assert not l0(found).passed
    assert l0(1.05).passed


def test_the_command_says_all_numbers_and_exits_with_0(
    results: list[CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "run_cases", lambda names: iter(results))
    shown = CliRunner().invoke(app, ["selftest"])
    assert shown.exit_code == 0
    n_checks = sum(len(result.checks) for result in results)
    assert f"{n_checks} numbers, all are right" in shown.output
    as_json = json.loads(CliRunner().invoke(app, ["selftest", "--json"]).output)
    assert as_json["failed"] == 0
    assert [case["case"] for case in as_json["cases"]] == list(CASES)


def test_a_number_that_is_wrong_is_shown_and_the_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = CaseResult(case="planted", checks=(l0(2.0),), seconds=0.0)
    monkeypatch.setattr(selftest, "run_cases", lambda names: iter([result]))
    shown = CliRunner().invoke(app, ["selftest"])
    assert shown.exit_code == 1
    assert "FAIL  l0" in shown.output
    assert "1 of 1 numbers are wrong" in shown.output


def test_an_error_in_a_case_is_shown_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CASES, "broken", "of_rows:not_there")
    shown = CliRunner().invoke(app, ["selftest", "--case", "broken", "--case", "shrinkage"])
    assert shown.exit_code == 1
    assert "FAIL  it ended with an error:" in shown.output
    assert "has no attribute 'not_there'" in shown.output
    assert "pass  gamma" in shown.output
    assert "2 numbers, 1 of 2 numbers are wrong" in shown.output


def test_an_unknown_case_lists_the_known_ones() -> None:
    shown = CliRunner().invoke(app, ["selftest", "--case", "recall"])
    assert shown.exit_code == 2
    known = ", ".join(CASES)
    assert shown.stderr == f"Error: Unknown case 'recall': choose from {known}.\n"


def test_every_metric_has_a_planted_case(results: list[CaseResult]) -> None:
    tried = {check.metric for result in results for check in result.checks}
    assert set(METRICS) <= tried
    assert tried - set(METRICS) == {"ground truth", "masking"}


def l0(found: float | None) -> Check:
    return Check(metric="l0", name="l0", expected=1.0, found=found, tolerance=0.1)
