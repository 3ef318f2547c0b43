"""Which numbers of result files stand in a table: values of metrics, each on its data.

A `Series` is one value of one metric, on one set of data, with the same options and version: what
may stand in one line. Numbers of two series are never mixed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...storage.errors import InputError
from ...storage.files import canonical_json
from ..evaluation.results import Measured, Result
from ..metrics.base import Value
from .headlines import HEADLINES
from .intervals import Sample

ORACLE = "oracle"  # values named oracle_X are the oracle's X, and stand beside it
ALL = "all"
# What a baseline and a run have in common that it is the baseline of; null stands for any.
_SHAPE = ("model", "model_revision", "layer", "hook", "d_in", "arch", "k", "d_sae")
_OF_K_LATENTS = re.compile(r"_k\d+")


@dataclass(frozen=True, kw_only=True)
class Series:
    """What is compared in one line. data: source digest, options and version, as one key."""

    metric: str
    value: str
    data: bytes

    @property
    def name(self) -> str:
        """metric, or metric.value where the value has a name of its own."""
        return self.metric if self.value == self.metric else f"{self.metric}.{self.value}"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """All that was found of one run or baseline. entries: by metric and data."""

    path: Path
    facts: Mapping[str, Any]
    entries: Mapping[tuple[str, bytes], Measured]

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def baseline(self) -> str | None:
        found = self.facts.get("baseline")
        return None if found is None else str(found)

    def entry(self, series: Series) -> Measured | None:
        return self.entries.get((series.metric, series.data))

    def sample(self, series: Series, *, value: str | None = None) -> Sample | None:
        """The number of a series (value: another one of the same entry); None where it has none."""
        entry = self.entry(series)
        found = None if entry is None else entry.values.get(value or series.value)
        if entry is None or found is None or found.value is None:
            return None
        return Sample(
            value=found.value,
            replicates_R=_replicates(found),
            seed=self.facts.get("seed"),
            judged_with=(series.data, entry.seed),
            low=found.low,
            high=found.high,
        )


def judgements_of(results: Sequence[Result]) -> list[Judgement]:
    """Results of runs and baselines, runs first.

    Two files of one SAE (judged into two folders) become one. InputError when there is no run.
    """
    merged: dict[object, Result] = {}
    for result in results:
        key = (result.name, result.run.get("sae_sha256"), result.baseline)
        if key in merged:
            result = merged[key].with_entries(result.metrics)
        merged[key] = result
    found = [
        Judgement(
            path=result.path,
            facts=result.run,
            entries={(entry.metric, data_key(entry)): entry for entry in result.metrics},
        )
        for result in merged.values()
    ]
    if all(judgement.baseline for judgement in found):
        raise InputError(
            "These results are of baselines alone. Pass the folder that `sae-pipe eval --out` "
            "wrote, with the results of the runs."
        )
    return sorted(found, key=lambda judgement: judgement.baseline is not None)


def baselines_of(
    runs: Sequence[Judgement], judgements: Sequence[Judgement]
) -> dict[str, list[Judgement]]:
    """By kind, the baselines of runs: a run's own, or else those of another run of its shape."""
    found: dict[str, dict[int, Judgement]] = {}
    for run in runs:
        fitting: dict[str, list[Judgement]] = {}
        for each in judgements:
            if each.baseline is not None and _is_baseline_of(each.facts, run.facts):
                fitting.setdefault(each.baseline, []).append(each)
        for kind, all_fitting in fitting.items():
            own = [each for each in all_fitting if each.facts.get("of") == run.name]
            found.setdefault(kind, {}).update({id(each): each for each in own or all_fitting})
    return {kind: list(each.values()) for kind, each in found.items()}


def _is_baseline_of(baseline: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    if baseline.get("of") == run["name"]:
        return True
    return all(baseline.get(key) in (None, run.get(key)) for key in _SHAPE)


def data_key(entry: Measured) -> bytes:
    """What two entries of a metric must have in common to be compared."""
    return canonical_json([entry.source.digest, dict(entry.options), entry.version])


def series_of(runs: Sequence[Judgement], wanted: Sequence[str] | None) -> list[Series]:
    """The series to show, in the order asked for.

    wanted: names of metrics (their headlines), metric.value, patterns with *, or `all`; None is the
    headlines of each metric, in the order of headlines.py. InputError for what matches nothing.
    """
    data: dict[tuple[str, str], dict[bytes, None]] = {}
    for run in runs:
        for (metric, key), entry in run.entries.items():
            for value in entry.values:
                if not is_oracle(value, entry.values):
                    data.setdefault((metric, value), {})[key] = None
    headlines = _headlines(list(data))
    if wanted is None:
        chosen = [(metric, value) for metric, values in headlines.items() for value in values]
    else:
        everything = [pair for metric in headlines for pair in data if pair[0] == metric]
        chosen = [pair for name in wanted for pair in _matching(name, everything, headlines)]
    return [
        Series(metric=metric, value=value, data=key)
        for metric, value in dict.fromkeys(chosen)
        for key in data[metric, value]
    ]


def _headlines(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """By metric, in the order of tables: the values that stand for it."""
    values: dict[str, list[str]] = {}
    for metric, value in pairs:
        values.setdefault(metric, []).append(value)
    ordered = [metric for metric in HEADLINES if metric in values]
    ordered += [metric for metric in values if metric not in HEADLINES]
    found = {}
    for metric in ordered:
        wanted = HEADLINES.get(metric, (metric,))
        found[metric] = [v for v in wanted if v in values[metric]] or values[metric][:1]
    return found


def _matching(
    wanted: str, everything: Sequence[tuple[str, str]], headlines: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    if wanted in headlines:
        return [(wanted, value) for value in headlines[wanted]]
    pattern = "*" if wanted == ALL else wanted
    found = [pair for pair in everything if fnmatchcase(".".join(pair), pattern)]
    if not found:
        raise InputError(
            f"--metrics {wanted!r} matches nothing. These results have {', '.join(headlines)}; a "
            "name with .* shows all values of one, and `all` everything."
        )
    return found


def oracle_names(value: str) -> list[str]:
    """What the oracle's number for a value may be called: it uses all dimensions, and no k."""
    return [f"{ORACLE}_{value}", f"{ORACLE}_{_OF_K_LATENTS.sub('', value)}"]


def is_oracle(name: str, values: Iterable[str]) -> bool:
    """Whether a value is that of the oracle probe for another one of the same entry."""
    return any(name in oracle_names(value) for value in values)


def _replicates(value: Value) -> NDArray[np.float64] | None:
    if value.replicates is None:
        return None
    return np.array([np.nan if each is None else each for each in value.replicates])
