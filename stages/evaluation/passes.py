"""One reading of a source for all SAEs: rows, items, or text.

# B rows, D d_in, S d_sae

An SAE that fails ends alone: its error is kept in its case and the pass goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...storage.errors import InputError
from ...storage.evalset import EvalSet
from ..backoff import is_out_of_memory
from ..metrics.rows import Moments, RowBatch, Rows
from ..progress import progress
from .cases import Asked, Case
from .items import TaskReader
from .judged import Judged
from .latents import SparseLatents
from .patched import PatchedModel
from .results import Source
from .sources import EvalSetText, RowSource, StoreText, evalset_source
from .text import TextBatch

BATCH_ROWS = 4096
TEXT_BATCH_TOKENS = 4096


@dataclass
class Judge:
    """One metric of one case in a pass, and the seconds spent in it."""

    asked: Asked
    metric: Any
    seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun


@dataclass
class Seat:
    """A case in a pass with its judges; it leaves the pass when it fails."""

    case: Case
    judges: list[Judge] = field(default_factory=list)

    @property
    def judged(self) -> Judged:
        assert self.case.judged is not None
        return self.case.judged

    @property
    def is_in(self) -> bool:
        return self.case.error is None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """An error ends this case and no other; one of ours is raised when all others are done."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - kept, and raised at the end
            self.case.error = error
            if is_out_of_memory(error):
                self.case.error = InputError(
                    f"Memory ran out while {self.case.name} was judged. Pass fewer runs at once, "
                    "or --device cpu."
                )

    def finish(self, source: Source, result: Callable[[Any], Any]) -> None:
        """Take every metric's result and write the file."""
        with self.guarded():
            if not self.is_in:
                return
            for judge in self.judges:
                with judge.timed():
                    found = result(judge.metric)
                self.case.keep(judge.asked, judge.metric, source, found, judge.seconds)
            self.case.write()


def seats_of(todo: Sequence[tuple[Case, Sequence[Asked]]]) -> list[Seat]:
    """Seats with a fresh metric for each that is to do."""
    return [
        Seat(case, [Judge(asked, asked.make()) for asked in metrics])
        for case, metrics in todo
        if metrics and case.error is None
    ]


@torch.no_grad()
def judge_rows(
    source: RowSource, seats: Sequence[Seat], device: torch.device, *, seed: int, show: bool
) -> None:
    """Every SAE on one reading of the rows."""
    data, unit_N = Moments(source.unit), source.unit_N
    with progress(source.n_rows, f"rows of {source.source.name}", "rows", show=show) as bar:
        for start in range(0, source.n_rows, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, source.n_rows)
            x_BD = torch.from_numpy(source.read(start, stop)).to(device)
            rows = Rows(x_BD, unit_N[start:stop], start)
            data.observe(rows)
            for seat in seats:
                with seat.guarded():
                    if seat.is_in:
                        _judge_batch(seat, rows)
            bar.update(stop - start)
    for seat in seats:
        seat.finish(source.source, lambda metric: metric.result(data, seed=seed))


def _judge_batch(seat: Seat, rows: Rows) -> None:
    latents = seat.judged.encode(rows.x_BD)
    batch = RowBatch(rows, latents, seat.judged.decode(latents), seat.judged)
    for judge in seat.judges:
        with judge.timed():
            judge.metric.observe(batch)


@torch.no_grad()
def judge_items(
    evalset: EvalSet, seats: Sequence[Seat], device: torch.device, *, seed: int, show: bool
) -> None:
    """Every SAE on one reading of a labelled evaluation set, task by task."""
    by_judged = {id(seat.judged): seat for seat in seats}

    def encode(judged: Judged, x_BD: Tensor) -> SparseLatents | None:
        seat = by_judged[id(judged)]
        with seat.guarded():
            return judged.encode(x_BD) if seat.is_in else None
        return None

    with progress(evalset.n_rows, f"rows of {evalset.name}", "rows", show=show) as bar:
        for task in range(len(evalset.tasks)):
            reader = TaskReader(evalset, task, seed=seed)
            pooled = reader.read([seat.judged for seat in seats], device, encode, bar.update)
            for seat, latents_IS in zip(seats, pooled, strict=True):
                if latents_IS is None or not seat.is_in:
                    continue
                for judge in seat.judges:
                    with seat.guarded(), judge.timed():
                        judge.metric.observe(reader.data, seat.judged, latents_IS)
    for seat in seats:
        seat.finish(evalset_source(evalset), lambda metric: metric.result(seed=seed))


def judge_text(
    text: StoreText | EvalSetText,
    model: PatchedModel,
    mean_D: Tensor,
    seats: Sequence[Seat],
    *,
    seed: int,
    show: bool,
) -> None:
    """Every SAE in the language model, which runs once for what does not depend on the SAE.

    A metric over text is one instance for all SAEs: seats that ask for the same share the first's.
    """
    shared: dict[str, tuple[Judge, list[Seat]]] = {}
    for seat in seats:
        for judge in seat.judges:
            first, sharing = shared.setdefault(judge.asked.name, (judge, []))
            judge.metric = first.metric
            sharing.append(seat)
    contexts = max(1, TEXT_BATCH_TOKENS // text.context_size)
    units = Units()
    with progress(text.n_contexts, f"text of {text.source.name}", "contexts", show=show) as bar:
        for part in text.batches(contexts):
            batch = TextBatch(
                model=model,
                tokens_BT=part.tokens_BT,
                length_B=part.length_B,
                rows_BT=part.rows_BT,
                unit_BT=units.of(part.document_BT),
                first_context=part.first,
                mean_D=mean_D,
            )
            for judge, sharing in shared.values():
                with judge.timed():
                    judge.metric.observe(batch, [seat.judged for seat in sharing])
            bar.update(len(part.tokens_BT))
    for judge, sharing in shared.values():
        for seat in sharing:
            own = next(each for each in seat.judges if each.asked.name == judge.asked.name)
            own.seconds = judge.seconds / len(sharing)
    for seat in seats:
        seat.finish(text.source, _of_one(seat, seed))


class Units:
    """Documents as dense units 0, 1, ... in the order in which they are met."""

    def __init__(self) -> None:
        self._units: dict[int, int] = {}

    def of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The unit of each, in the same shape."""
        found, place = np.unique(documents, return_inverse=True)
        units = [self._units.setdefault(each, len(self._units)) for each in found.tolist()]
        return np.array(units, np.int64)[place].reshape(documents.shape)


def _of_one(seat: Seat, seed: int) -> Callable[[Any], Any]:
    return lambda metric: metric.result(seat.judged, seed=seed)
