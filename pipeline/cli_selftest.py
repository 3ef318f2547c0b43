"""sae-pipe selftest"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import told_to_the_user
from .say import say

if TYPE_CHECKING:
    from ..stages.selftest import CaseResult, Check

FAILED = 1


@told_to_the_user
def selftest(
    case: Annotated[
        list[str] | None,
        typer.Option(help="A case to try; several times for several. Default: all."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the checks as JSON instead.")
    ] = False,
) -> None:
    """Judge planted cases whose answers are known, and show what every metric makes of them.

    Needs no network, no store and no SAE, and takes less than a minute. The exit code is 1 where a number
    is not what it must be.
    """
    from ..stages.selftest import run_cases

    results = []
    for result in run_cases(case or ()):
        results.append(result)
        if not as_json:
            say(_shown(result))
    checks = [check for result in results for check in result.checks]
    n_failed = sum(result.n_failed for result in results)
    if as_json:
        typer.echo(json.dumps({"failed": n_failed, "cases": [_plain(each) for each in results]}))
    else:
        ended = f"{n_failed} wrong" if n_failed else "all are right"
        seconds = sum(result.seconds for result in results)
        say(f"\n{len(checks)} numbers, {ended} ({seconds:.0f} s).")
    if n_failed:
        raise typer.Exit(FAILED)


def _shown(result: "CaseResult") -> str:
    lines = [f"{result.case} ({result.seconds:.1f} s)"]
    for check in result.checks:
        verdict = "pass" if check.passed else "FAIL"
        lines.append(
            f"  {verdict}  {check.name:<42} expected {check.expected:>10.6g}   found "
            f"{_number(check):>10}   within {check.tolerance:g}"
        )
    if result.error is not None:
        lines += ["  FAIL  it ended with an error:", result.error.rstrip()]
    return "\n".join(lines)


def _number(check: "Check") -> str:
    return "nothing" if check.found is None else f"{check.found:.6g}"


def _plain(result: "CaseResult") -> dict[str, object]:
    checks = [asdict(check) | {"passed": check.passed} for check in result.checks]
    return {
        "case": result.case,
        "seconds": result.seconds,
        "checks": checks,
        "error": result.error,
    }
