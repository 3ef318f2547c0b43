"""One SAE or baseline of an evaluation: its result file, what is done, what is still to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...storage.errors import InputError, SaePipeError, StoreError
from ..hub_address import is_hub, parse_hub
from ..metrics import METRICS, get_metric
from ..metrics.base import MetricResult
from ..sae.hub import pinned_run
from ..sae.weights import is_run_config, load_config
from .baselines import MEAN, baseline_facts, make_baseline
from .judged import Judged, JudgedSae, load_judged, read_facts
from .results import (
    Measured,
    Result,
    Source,
    as_json,
    identity_of,
    read_result,
    result_path,
    write_result,
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A metric to compute, and with what options of its constructor. sample: what beside them
    decides which part of a source is looked at (rows, contexts)."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sample: Mapping[str, int] = field(default_factory=dict)

    def make(self) -> Any:
        """A fresh instance."""
        return get_metric(self.name, **self.arguments)

    @property
    def is_of_latents(self) -> bool:
        """Whether there is nothing to judge without latents."""
        entry = METRICS[self.name]
        return entry.of_latents or entry.needs == "items"


class Case:
    """What is judged, and its result file. error: what ended it; the others go on."""

    def __init__(self, facts: Mapping[str, Any], path: Path, seed: int) -> None:
        self.facts, self.path, self.seed = facts, path, seed
        self.error: Exception | None = None
        self.judged: Judged | None = None
        self.n_computed = self.n_kept = 0
        self._result: Result | None = None

    has_latents = True  # not of the mean predictor

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def result(self) -> Result:
        """As the file has it, or empty. Raises StoreError for a damaged file."""
        if self._result is None:
            there = self.path.is_file()
            entries = read_result(self.path).metrics if there else ()
            self._result = Result(path=self.path, run=as_json(self.facts), metrics=entries)
        return self._result

    def todo(self, source: Source, asked: Sequence[Asked]) -> list[Asked]:
        """The metrics that the file does not have yet; counts those that it has."""
        if self.error is not None:
            return []
        asked = [each for each in asked if self.has_latents or not each.is_of_latents]
        try:
            open_ones = [
                each for each in asked if not self.result.has(self._identity(each, source))
            ]
        except SaePipeError as error:
            self.error = error
            return []
        self.n_kept += len(asked) - len(open_ones)
        return open_ones

    def _identity(self, asked: Asked, source: Source) -> bytes:
        metric = asked.make()
        options = as_json({**metric.options, **asked.sample})
        return identity_of(
            asked.name, source.digest, options, seed=self.seed, version=metric.version
        )

    def keep(
        self, asked: Asked, metric: Any, source: Source, found: MetricResult, seconds: float
    ) -> None:
        """Add what a metric found; `write` puts it on disk."""
        entry = Measured(
            metric=asked.name,
            definition=metric.definition,
            direction=metric.direction,
            source=source,
            options=as_json({**metric.options, **asked.sample}),
            seed=self.seed,
            sample=dict(found.sample),
            interval=found.interval,
            values=dict(found.values),
            details=as_json(found.details),
            seconds=round(seconds, 3),
            version=metric.version,
        )
        self._result = self.result.with_entries([entry])
        self.n_computed += 1

    def write(self) -> None:
        """Write the file whole. Raises DiskError."""
        write_result(self.result)


class RunCase(Case):
    """A fitted SAE. run: its folder, of one of the Hub that in the Hub's cache."""

    def __init__(self, run: Path, facts: Mapping[str, Any], out: Path, seed: int) -> None:
        self.run = run
        path = result_path(out, str(facts["name"]), str(facts["sae_sha256"]))
        super().__init__(facts, path, seed)

    def load(self, device: torch.device) -> None:
        """Load the SAE; what is wrong with it becomes the case's error."""
        if self.judged is None and self.error is None:
            try:
                self.judged = load_judged(self.run, device)
            except SaePipeError as error:
                self.error = error


class BaselineCase(Case):
    """A baseline; parent: the run that it is made from."""

    def __init__(self, kind: str, parent: RunCase, out: Path) -> None:
        self.kind, self.parent = kind, parent
        facts = baseline_facts(parent.facts, kind)
        name, digest = str(parent.facts["name"]), str(parent.facts["sae_sha256"])
        super().__init__(facts, result_path(out, name, digest, kind), parent.seed)
        self.has_latents = kind != MEAN

    def make(self, sample_BD: Tensor) -> None:
        """Calibrate it on a sample of rows; the parent is loaded, or has an error."""
        if self.judged is not None or self.error is not None:
            return
        if isinstance(self.parent.judged, JudgedSae):
            self.judged = make_baseline(self.kind, self.parent.judged, sample_BD)
        else:
            self.error = self.parent.error


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """Where a fitted SAE lies. address: with its commit, of one on the Hub."""

    folder: Path
    address: str | None = None

    @property
    def name(self) -> str:
        """The folder's, or the repository's with the folder in it."""
        if self.address is None:
            return self.folder.resolve().name
        place = parse_hub(self.address)
        return "-".join([place.repo.rpartition("/")[2], *place.folder.split("/")]).rstrip("-")


def find_runs(places: Sequence[str | Path]) -> list[FoundRun]:
    """The runs that are given, and those in given folders of a sweep, in order of names.

    Of hf://USER/REPO the SAE is fetched. Raises InputError for a place that is not there or holds
    no run, NetworkError.
    """
    found: dict[Path, FoundRun] = {}
    for given in places:
        if is_hub(given):
            folder, address = pinned_run(str(given))
            found.setdefault(folder.resolve(), FoundRun(folder=folder, address=address))
            continue
        place = Path(given)
        inside = [place] if _is_run(place) else []
        if not inside and place.is_dir():
            inside = [each for each in sorted(place.iterdir()) if _is_run(each)]
        if not inside:
            what = "holds no run" if place.is_dir() else "does not exist"
            raise InputError(
                f"{place} {what}. Pass the folder that `sae-pipe fit --out` wrote, or a folder of "
                "such folders."
            )
        for run in inside:
            found.setdefault(run.resolve(), FoundRun(folder=run))
    return list(found.values())


def _is_run(place: Path) -> bool:
    if not (place / "config.json").is_file():
        return False
    try:
        return is_run_config(load_config(place))
    except StoreError:  # damaged: its own error says so when it is read
        return True


def run_facts(run: FoundRun) -> dict[str, Any]:
    """The facts of a finished run. Raises StoreError."""
    facts = read_facts(run.folder) | {"name": run.name}
    if run.address is not None:
        facts["path"] = run.address
        if not is_hub(facts["store"]):  # what a stranger's SAE names is no path of this machine
            facts["store"] = None
    if facts["sae_sha256"] is None:
        raise StoreError(
            f"Run {run.folder} has no weights: the fit is not finished. "
            "Run the same `sae-pipe fit` command again to finish it."
        )
    return facts
