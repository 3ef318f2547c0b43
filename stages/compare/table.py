"""Results as tables: metrics down, what is compared across, with differences and baselines.

The first key of --by is compared: each of its values has a column, and all but the first also one
with the difference from the first. The last key makes the lines of a metric, and the keys between
tables of their own. So `mask_p,arch,l0` is the layout of arXiv 2604.06495: for each architecture
metric x L0, without and with masking side by side.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...storage.errors import InputError
from ..evaluation.results import Result
from .choose import ORACLE, Judgement, Series, baselines_of, judgements_of, oracle_names, series_of
from .facts import WHAT_IT_IS, checked_keys, fact, label, sort_key
from .headlines import DIRECTIONS
from .intervals import Difference, Estimate, Sample, difference, mean_of

BASELINES = ("untrained", "random latents", "mean", ORACLE)
_BETTER = {"up": 1, "down": -1, "none": 0}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One group of runs on one series. is_bold: better than what it is compared with, for sure."""

    estimate: Estimate
    is_bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of the runs that share a value of the last key.

    cells, differences: by value of the compared key; baselines: by their name.
    """

    series: Series
    direction: str
    key_value: Any
    cells: dict[Any, Cell]
    differences: dict[Any, Difference]
    baselines: dict[str, Estimate]

    @property
    def decimals(self) -> int:
        """Digits behind the point that all numbers of the line are shown with: four that count."""
        values = [cell.estimate.value for cell in self.cells.values()]
        largest = max((abs(value) for value in values), default=0.0)
        steps = ((1, 100.0), (2, 10.0), (3, 1.0), (4, 0.05), (5, 0.01))
        return next((d for d, above in steps if largest >= above), 6 if largest >= 1e-4 else 4)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Lines of the runs that share the values of all keys between the first and the last."""

    heading: dict[str, Any]
    lines: list[Line]

    @property
    def title(self) -> str:
        return ", ".join(label(key, value) for key, value in self.heading.items())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    compared: the first key; columns: its values, the first of them what the others are compared
    with; line_key: the last key, None where there is just one; apart: keys that were not asked for,
    by which tables are apart all the same.
    """

    compared: str
    columns: list[Any]
    line_key: str | None
    apart: list[str]
    tables: list[Table]
    judgements: list[Judgement] = field(repr=False)
    series: list[Series] = field(repr=False)

    def of_metrics(self, metrics: Container[str]) -> "Comparison":
        """The same with the lines of these metrics alone."""
        tables = [
            replace(table, lines=[line for line in table.lines if line.series.metric in metrics])
            for table in self.tables
        ]
        return replace(
            self,
            tables=[table for table in tables if table.lines],
            series=[series for series in self.series if series.metric in metrics],
        )

    @property
    def runs(self) -> list[Judgement]:
        return [judgement for judgement in self.judgements if judgement.baseline is None]

    @property
    def lines(self) -> list[Line]:
        return [line for table in self.tables for line in table.lines]

    @property
    def all_differences(self) -> list[Difference]:
        return [each for line in self.lines for each in line.differences.values()]


def compare(
    results: Sequence[Result],
    by: Sequence[str] = ("mask_p", "arch", "l0"),
    *,
    metrics: Sequence[str] | None = None,
) -> Comparison:
    """Tables of results. metrics: see `series_of`; None is the headline of each metric.

    Raises InputError: no runs, an unknown key, nothing measured, a metric that is not there.
    """
    judgements = judgements_of(results)
    runs = [judgement for judgement in judgements if judgement.baseline is None]
    keys = checked_keys(by, [run.facts for run in runs])
    series = series_of(runs, metrics)
    if not series:
        raise InputError(
            "These results hold no numbers yet. Run `sae-pipe eval` to the end, then compare."
        )
    compared, line_key = keys[0], keys[-1] if len(keys) > 1 else None
    apart = _mixed(runs, keys)
    columns = _values(runs, compared)
    tables = []
    for heading in _headings(runs, [*keys[1:-1], *apart]):
        of_table = [run for run in runs if _is_of(run, heading)]
        groups = _groups(of_table, judgements, line_key)
        found = (_line(each, group, compared, columns) for each in series for group in groups)
        lines = [line for line in found if line.cells]
        if lines:
            tables.append(Table(heading=heading, lines=lines))
    return Comparison(
        compared=compared,
        columns=columns,
        line_key=line_key,
        apart=apart,
        tables=tables,
        judgements=judgements,
        series=series,
    )


def _mixed(runs: Sequence[Judgement], keys: Sequence[str]) -> list[str]:
    """What a run is, not named in keys, in which runs that would share a cell differ."""
    cells: dict[tuple[Any, ...], list[Judgement]] = {}
    for run in runs:
        cells.setdefault(tuple(fact(run.facts, key) for key in keys), []).append(run)
    return [
        key
        for key in WHAT_IT_IS
        if key not in keys and any(len(_values(cell, key)) > 1 for cell in cells.values())
    ]


def _values(runs: Sequence[Judgement], key: str) -> list[Any]:
    return sorted({fact(run.facts, key) for run in runs}, key=sort_key)


def _headings(runs: Sequence[Judgement], keys: Sequence[str]) -> list[dict[str, Any]]:
    found = {tuple(fact(run.facts, key) for key in keys) for run in runs}
    ordered = sorted(found, key=lambda values: [sort_key(value) for value in values])
    return [dict(zip(keys, values, strict=True)) for values in ordered]


def _is_of(judgement: Judgement, heading: dict[str, Any]) -> bool:
    return all(fact(judgement.facts, key) == value for key, value in heading.items())


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The runs that share a line, with their baselines by kind."""

    key_value: Any
    runs: list[Judgement]
    baselines: dict[str, list[Judgement]]


def _groups(
    runs: Sequence[Judgement], judgements: Sequence[Judgement], line_key: str | None
) -> list[_Group]:
    values = [None] if line_key is None else _values(runs, line_key)
    groups = []
    for value in values:
        chosen = [r for r in runs if line_key is None or fact(r.facts, line_key) == value]
        baselines = baselines_of(chosen, judgements)
        groups.append(_Group(key_value=value, runs=chosen, baselines=baselines))
    return groups


def _line(series: Series, group: _Group, compared: str, columns: Sequence[Any]) -> Line:
    samples: dict[Any, list[Sample]] = {}
    for run in group.runs:
        sample = run.sample(series)
        if sample is not None:
            samples.setdefault(fact(run.facts, compared), []).append(sample)
    reference = samples.get(columns[0])
    differences = {
        column: difference(samples[column], reference)
        for column in columns[1:]
        if column in samples and reference is not None
    }
    direction = _direction(series, group.runs)
    return Line(
        series=series,
        direction=direction,
        key_value=group.key_value,
        cells=_cells(samples, columns, differences, direction),
        differences=differences,
        baselines=_baselines(series, group),
    )


def _direction(series: Series, runs: Sequence[Judgement]) -> str:
    entries = (run.entry(series) for run in runs)
    stated = next((entry.direction for entry in entries if entry is not None), "none")
    return DIRECTIONS.get((series.metric, series.value), stated)


def _cells(
    samples: dict[Any, list[Sample]],
    columns: Sequence[Any],
    differences: dict[Any, Difference],
    direction: str,
) -> dict[Any, Cell]:
    """Bold: a cell that is better than the first column's, or the first where it is better than all
    others; only by a difference whose interval excludes 0, and where one way is better."""
    gains = {c: _BETTER[direction] * d.value for c, d in differences.items() if d.excludes_zero}
    bold = {column: gain > 0 for column, gain in gains.items()}
    bold[columns[0]] = bool(gains) and all(gains.get(c, 0) < 0 for c in differences)
    return {
        column: Cell(estimate=mean_of(samples[column]), is_bold=bold.get(column, False))
        for column in columns
        if column in samples
    }


def _baselines(series: Series, group: _Group) -> dict[str, Estimate]:
    """Means over the baselines of the line's runs, and over the runs' oracle values."""
    found = {
        kind: [sample for each in judged if (sample := each.sample(series)) is not None]
        for kind, judged in group.baselines.items()
    }
    found[ORACLE] = [sample for run in group.runs if (sample := _oracle(run, series)) is not None]
    return {name: mean_of(samples) for name, samples in found.items() if samples}


def _oracle(run: Judgement, series: Series) -> Sample | None:
    found = (run.sample(series, value=name) for name in oracle_names(series.value))
    return next((sample for sample in found if sample is not None), None)
