"""Evaluate SAEs: every one on one reading of each source, with baselines, into result files.

The main path: `evaluate_runs` looks at runs and sources and refuses what does not fit; each pass
(`passes.py`) reads a source once for all SAEs that still need a metric on it; `cases.py` keeps what
was found and writes the files. A result that is there already is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...storage.address import Place
from ...storage.disk import human_bytes
from ...storage.errors import InputError, SaePipeError
from ...storage.evalset import EvalSet, open_evalset
from ...storage.lock import sole_writer
from ...storage.provenance import memory_bytes
from ..devices import pick_device
from ..models import ModelInfo
from .baselines import BASELINES, shape_of
from .cases import Asked, BaselineCase, Case, RunCase, find_runs, run_facts
from .chosen import Chosen, choose_metrics
from .language_model import find_model, load_patched
from .passes import Seat, judge_items, judge_rows, judge_text, seats_of
from .results import Result, Source
from .sources import (
    EvalSetRows,
    EvalSetText,
    StoreRows,
    StoreText,
    check_match,
    evalset_origin,
    evalset_source,
)
from .stores import group_by_store

SAMPLE_ROWS = 4096  # that baselines are calibrated on
TEXT_TOKENS = 1 << 15  # of a store's held-out text, unless asked otherwise
_SAMPLE_PIECES = 8
_MEMORY_SHARE = 0.6

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to judge on, by what.

    metrics: names, or kinds (rows, items, text, all); None: all that need no language model. rows,
    contexts: at most so many of a source (None: all rows, and contexts of about 32,768 tokens).
    model: where the language model lies, if not where the store says. ito_k: numbers of latents of
    inference-time optimisation; none is each SAE's own L0.
    """

    out: Path = Path("results")
    store: Place | None = None
    evalsets: tuple[Path, ...] = ()
    metrics: tuple[str, ...] | None = None
    compat: tuple[str, ...] = ()
    baselines: bool = True
    rows: int | None = None
    contexts: int | None = None
    ito_k: tuple[int, ...] = ()
    model: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the evaluation of one SAE or baseline ended. computed, kept: numbers of metrics, new and
    there already."""

    name: str
    result: Result | None
    error: Exception | None
    computed: int = 0
    kept: int = 0


def evaluate_runs(
    runs: Sequence[str | Path],
    config: EvalConfig,
    *,
    say: Say = print,
    show_progress: bool = True,
) -> list[Outcome]:
    """Judge run folders (all runs in a sweep's folder, hf://USER/REPO); results are written to `config.out`.

    A run that fails does not stop the others: its outcome has the error, which is not a SaePipeError
    where it is a mistake of ours. Raises InputError, before
    anything is computed, where what is asked for cannot be or an SAE and a source do not fit.
    """
    _check_sizes(config)
    evaluation = _Evaluation(config, say, show=show_progress)
    evaluation.look_at(runs)  # before the folder is made: what is refused leaves nothing
    with sole_writer(config.out, "Results folder"):
        evaluation.run()
    return evaluation.outcomes()


def _check_sizes(config: EvalConfig) -> None:
    sizes = [("--rows", config.rows), ("--contexts", config.contexts)]
    sizes += [("--ito-k", k) for k in config.ito_k]
    for flag, value in sizes:
        if value is not None and value < 1:
            raise InputError(f"{flag} must be at least 1, not {value}.")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Rows that runs are judged on, and their text where metrics ask for it: of a store, or of an
    evaluation set without labels."""

    rows: StoreRows | EvalSetRows
    runs: Sequence[RunCase]
    recipe: Mapping[str, Any]
    text: StoreText | EvalSetText | None = None
    info: ModelInfo | None = None  # of the model that the text is run on


class _Evaluation:
    """One command: its cases and sources, and the passes over them."""

    def __init__(self, config: EvalConfig, say: Say, *, show: bool) -> None:
        self.config, self._say, self._show = config, say, show
        self.device = pick_device(config.device)
        self.chosen = self._choose(None)
        self.evalsets: list[EvalSet] = [open_evalset(path) for path in config.evalsets]
        self.failed: list[Outcome] = []
        self.runs: list[RunCase] = []
        self.baselines: list[BaselineCase] = []
        self.places: list[_Place] = []

    def _choose(self, contexts: int | None) -> Chosen:
        config = self.config
        return choose_metrics(
            config.metrics, config.compat, rows=config.rows, contexts=contexts, ito_k=config.ito_k
        )

    # --- what there is ---

    def look_at(self, places: Sequence[str | Path]) -> None:
        """Find runs and sources; InputError where they do not fit."""
        for run in find_runs(places):
            try:
                facts = run_facts(run)
            except SaePipeError as error:
                self.failed.append(Outcome(name=run.name, result=None, error=error))
                continue
            self.runs.append(RunCase(run.folder, facts, self.config.out, self.config.seed))
        self._check_evalsets()
        if self.config.baselines:
            self.baselines = self._find_baselines()
        if self.runs and (self.chosen.rows or self.chosen.text):
            self.places = self._find_places()
        self._check_memory()

    def _check_evalsets(self) -> None:
        for evalset in self.evalsets:
            for case in self.runs:
                check_match(case.facts, evalset_origin(evalset), f"evaluation set {evalset.path}")
        suites = [evalset.suite for evalset in self.evalsets if evalset.tasks]
        for name in self.chosen.items_by_name:
            if not any(name in (a.name for a in self.chosen.for_suite(s)) for s in suites):
                given = f"those given are of {', '.join(suites)}" if suites else "none was given"
                raise InputError(
                    f"Metric {name} judges on a labelled evaluation set of "
                    f"{self.chosen.suites_of(name)}, and {given}. Build one with "
                    "`sae-pipe eval-set build` and pass it as --eval-set."
                )

    def _find_places(self) -> list[_Place]:
        """Sets without labels; and stores, unless such a set was given and no store."""
        unlabelled = [evalset for evalset in self.evalsets if not evalset.tasks]
        places: list[_Place] = []
        if self.config.store is not None or not unlabelled:
            for group in group_by_store(self.runs, self.config.store, self._say):
                rows = StoreRows(group.store, self.config.rows)
                recipe = group.store.recipe
                places.append(_Place(rows=rows, runs=group.cases, recipe=recipe))
        for evalset in unlabelled:
            rows_of_set = EvalSetRows(evalset, self.config.rows)
            places.append(_Place(rows=rows_of_set, runs=self.runs, recipe=evalset.recipe))
        return [self._with_text(place) for place in places] if self.chosen.text else places

    def _with_text(self, place: _Place) -> _Place:
        """With text and model, looked at before anything is computed."""
        where = f"{place.rows.where[0].upper()}{place.rows.where[1:]}"
        info = find_model(place.recipe, where, self.config.model)
        text = place.rows.text(self.config.contexts, most_tokens=TEXT_TOKENS)
        return replace(place, text=text, info=info)

    def _find_baselines(self) -> list[BaselineCase]:
        """Those of the first run of each shape."""
        found: dict[tuple[Any, ...], BaselineCase] = {}
        for run in self.runs:
            for kind in BASELINES:
                key = (kind, *shape_of(run.facts, kind))
                if key not in found:
                    found[key] = BaselineCase(kind, run, self.config.out)
        return list(found.values())

    def _check_memory(self) -> None:
        sizes = [(case.facts["d_in"], case.facts["d_sae"]) for case in self.runs]
        needed = sum(2 * 4 * d_in * d_sae for d_in, d_sae in sizes)
        most = _MEMORY_SHARE * memory_bytes()
        if needed > most:
            raise InputError(
                f"The {len(sizes)} SAEs take {human_bytes(needed)} together, and this machine has "
                f"{human_bytes(memory_bytes())}. Pass fewer runs at once: results are added to the "
                "same folder."
            )

    # --- what is done ---

    def run(self) -> None:
        """All passes."""
        for place in self.places:
            cases = self._with_baselines(place.runs)
            self._rows_pass(place.rows, cases)
            if place.text is not None:
                self._text_pass(place, place.text, cases)
        for evalset in self.evalsets:
            if evalset.tasks:
                self._items_pass(evalset, self._with_baselines(self.runs))

    def _with_baselines(self, runs: Sequence[RunCase]) -> list[Case]:
        return [*runs, *(each for each in self.baselines if each.parent in runs)]

    def _rows_pass(self, rows: StoreRows | EvalSetRows, cases: Sequence[Case]) -> None:
        seats = self._seats(rows.source, cases, self.chosen.rows, rows.read, rows.n_rows)
        if seats:
            judge_rows(rows, seats, self.device, seed=self.config.seed, show=self._show)

    def _items_pass(self, evalset: EvalSet, cases: Sequence[Case]) -> None:
        asked = self.chosen.for_suite(evalset.suite)
        source = evalset_source(evalset)
        seats = self._seats(source, cases, asked, evalset.read, evalset.n_rows)
        if seats:
            judge_items(evalset, seats, self.device, seed=self.config.seed, show=self._show)

    def _text_pass(
        self, place: _Place, text: StoreText | EvalSetText, cases: Sequence[Case]
    ) -> None:
        rows, asked = place.rows, self._choose(text.n_contexts).text
        seats = self._seats(text.source, cases, asked, rows.read, rows.n_rows)
        if not seats:
            return
        assert place.info is not None
        model = load_patched(place.recipe, place.info, self.device, self.config.dtype)
        mean_D = self._sample(rows.read, rows.n_rows).double().mean(dim=0).float()
        judge_text(text, model, mean_D, seats, seed=self.config.seed, show=self._show)

    def _seats(
        self,
        source: Source,
        cases: Sequence[Case],
        asked: Sequence[Asked],
        read: Callable[[int, int], NDArray[np.float32]],
        n_rows: int,
    ) -> list[Seat]:
        """Those that still need something on a source, loaded."""
        todo = [(case, case.todo(source, asked)) for case in cases]
        busy = [case for case, metrics in todo if metrics]
        for case in busy:
            if isinstance(case, RunCase):
                case.load(self.device)
        new = [c for c in busy if isinstance(c, BaselineCase) and c.judged is None]
        if new:
            sample_BD = self._sample(read, n_rows)
            for baseline in new:
                baseline.parent.load(self.device)
                baseline.make(sample_BD)
        return seats_of(todo)

    def _sample(self, read: Callable[[int, int], NDArray[np.float32]], n_rows: int) -> Tensor:
        """Rows from all over a source (B, D)."""
        size = min(SAMPLE_ROWS, n_rows) // _SAMPLE_PIECES
        if size == 0:
            return torch.from_numpy(read(0, n_rows)).to(self.device)
        starts = np.linspace(0, n_rows - size, _SAMPLE_PIECES).astype(int).tolist()
        parts = [read(start, start + size) for start in starts]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def outcomes(self) -> list[Outcome]:
        """How each ended: runs in order, then baselines."""
        ended = [
            Outcome(
                name=case.name,
                result=case.result if case.error is None else None,
                error=case.error,
                computed=case.n_computed,
                kept=case.n_kept,
            )
            for case in (*self.runs, *self.baselines)
            # A baseline whose run cannot be loaded says nothing that the run does not.
            if not (isinstance(case, BaselineCase) and case.error and case.parent.error)
        ]
        return [*self.failed, *ended]
