"""What a report says first and last: of what it is, how comparisons ended, runs, definitions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compare import Comparison
from ..compare.choose import Judgement, Series
from ..compare.facts import fact, label, name_of, shown, sort_key
from ..compare.table import Line
from .names import FOREMOST, title_of

_SHOWN_FACTS = ("arch", "k", "mask_p", "d_sae", "seed", "steps", "tokens")
_FOLDED_FACTS = (
    "model",
    "model_revision",
    "layer",
    "hook",
    "d_in",
    "store",
    "store_digest",
    "path",
    "sae_sha256",
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the comparisons of one value ended: labels of lines by outcome."""

    series: Series
    title: str
    against: str
    better: list[str]
    worse: list[str]
    undecided: list[str]

    @property
    def is_foremost(self) -> bool:
        return (self.series.metric, self.series.value) in FOREMOST


def verdicts(comparison: Comparison) -> list[Verdict]:
    """For each value with a better direction and each column but the first."""
    found = []
    for series in comparison.series:
        for column in comparison.columns[1:]:
            lines = [
                (table.title, line)
                for table in comparison.tables
                for line in table.lines
                if line.series == series and column in line.differences and line.direction != "none"
            ]
            if lines:
                found.append(_verdict(comparison, column, lines))
    return found


def _verdict(comparison: Comparison, column: Any, lines: Sequence[tuple[str, Line]]) -> Verdict:
    outcomes: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for title, line in lines:
        parts = [label(comparison.line_key, line.key_value)] if comparison.line_key else []
        parts += [title] if len(comparison.tables) > 1 else []
        difference = line.differences[column]
        gain = difference.value * (1 if line.direction == "up" else -1)
        outcome = "undecided"
        if difference.excludes_zero:
            outcome = "better" if gain > 0 else "worse"
        outcomes[outcome].append(", ".join(parts) or "here")
    series = lines[0][1].series
    return Verdict(
        series=series,
        title=title_of(series.metric, series.value),
        against=f"{label(comparison.compared, column)} against "
        f"{label(comparison.compared, comparison.columns[0])}",
        **outcomes,
    )


def summary(runs: Sequence[Judgement]) -> str:
    """One sentence: how many SAEs of what."""
    parts = []
    for key in ("model", "layer", "hook"):
        values = _values(runs, key)
        if values != [None]:
            parts.append(
                f"{key} {', '.join(map(shown, values))}"
                if key != "model"
                else ", ".join(map(shown, values))
            )
    kinds = "; ".join(
        f"{name_of(key)} {', '.join(map(shown, _values(runs, key)))}"
        for key in ("arch", "mask_p", "k", "d_sae", "seed")
    )
    count = f"{len(runs)} SAE{'s' if len(runs) != 1 else ''}"
    return f"{count} of {', '.join(parts)}: {kinds}." if parts else f"{count}: {kinds}."


def _values(runs: Sequence[Judgement], key: str) -> list[Any]:
    return sorted({fact(run.facts, key) for run in runs}, key=sort_key)


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run of the table of runs. page: of its latents, or None and why not."""

    name: str
    cells: list[str]
    facts: list[tuple[str, str]]
    recipe: str
    page: str | None
    why_no_page: str


def run_header() -> list[str]:
    return ["run", *(name_of(key) for key in _SHOWN_FACTS)]


def run_row(run: Judgement, page: str | None, why_no_page: str) -> RunRow:
    recipe = run.facts.get("recipe")
    facts = [(key.replace("_", " "), shown(fact(run.facts, key))) for key in _FOLDED_FACTS]
    return RunRow(
        name=run.name,
        cells=[_cell(fact(run.facts, key)) for key in _SHOWN_FACTS],
        facts=facts,
        recipe=json.dumps(recipe, indent=1, ensure_ascii=False) if recipe else "not known",
        page=page,
        why_no_page=why_no_page,
    )


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(value)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """How a metric is defined, and of how much its numbers are."""

    title: str
    text: str
    rows: list[tuple[str, str]]


def definitions(judgements: Sequence[Judgement]) -> list[Definition]:
    """Of every metric of the results, on each set of data once."""
    found: dict[tuple[str, bytes], Definition] = {}
    for judgement in judgements:
        for (metric, data), entry in judgement.entries.items():
            if (metric, data) in found:
                continue
            source = entry.source
            rows = [
                ("judged on", f"{source.name} ({source.kind}, digest {source.digest[:16]})"),
                (
                    "sample",
                    ", ".join(
                        f"{n:,} {unit.replace('_', ' ')}" for unit, n in entry.sample.items()
                    ),
                ),
                ("interval", entry.interval),
                ("seed, version", f"{entry.seed}, {entry.version}"),
            ]
            if entry.options:
                rows.append(("options", ", ".join(f"{k} {v}" for k, v in entry.options.items())))
            title = f"{metric}, on {source.name}"
            found[metric, data] = Definition(title=title, text=entry.definition, rows=rows)
    return sorted(found.values(), key=lambda each: each.title)


def provenance(of_results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """By whom and with what the results were written, each value once."""
    found: dict[str, dict[str, None]] = {}
    for each in of_results:
        versions = each.get("versions")
        hardware = each.get("hardware")
        known = {
            "written": each.get("written"),
            "command": each.get("command"),
            "versions": _listed(versions),
            "hardware": _listed(hardware),
        }
        for name, value in known.items():
            if value:
                found.setdefault(name, {})[str(value)] = None
    rows = []
    for name, values in found.items():
        texts = sorted(values)
        if name == "written" and len(texts) > 1:
            texts = [f"{texts[0]} to {texts[-1]}"]
        rows += [(name, text) for text in texts[:5]]
    return rows


def _listed(section: Any) -> str | None:
    if not isinstance(section, Mapping):
        return None
    return ", ".join(f"{name} {value}" for name, value in section.items())
