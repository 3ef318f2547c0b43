"""Many workers: blocks of a harvest handed out to other processes, one GPU or group of cores each.

This process leads. It alone holds the locks, makes the corpus and the lay-out, and writes the
manifest and zarr.json; workers write whole shards and their commit records. A block is the same
whoever makes it, so the store has the bytes of one process's. A block whose worker dies is handed
to another.
"""

import secrets
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage.errors import InputError, SaePipeError
from ..storage.files import remove_leftovers
from ..storage.manifest import read_manifest, rows_digest
from ..storage.values import Floats, ValueType
from . import worker_task
from .cluster import AT_ONCE, START_S, Cluster, Say
from .harvest_job import HarvestJob
from .harvest_run import Host, Pass, blocks_to_do
from .plan import Rates
from .row_map import RowMap
from .worker_spec import Answer, BlockTask, ModelSpec, PassSpec, RowsSpec, RunSpec

_LOOK_EVERY_S = 0.5  # for workers that came or went
_MOST_DEATHS = 3  # of workers that had one block in hand, until that block is blamed


class ManyWorkers:
    """A `harvest_run.Crew` of other processes."""

    # Kept in memory however long a block takes: see `worker_task._Run`.
    keeps_notes = False

    def __init__(
        self, job: HarvestJob, layers: tuple[int, ...], cluster: Cluster, say: Say
    ) -> None:
        self._job, self._cluster, self._say = job, cluster, say
        is_folder = job.info.commit is None
        self._model = ModelSpec(
            source=str(Path(job.info.source).absolute()) if is_folder else job.info.source,
            commit=job.info.commit,
            revision=job.info.revision,
            layers=layers,
            hook=job.config.hook,
            dtype=str(job.dtype).removeprefix("torch."),
            device=cluster.asked_device,
            spread=cluster.is_ours,
        )

    def batch_contexts(self, context_size: int) -> int:
        one = next(iter(self._cluster.reports))
        return int(self._cluster.ask(one, worker_task.batch_contexts, self._model, context_size))

    def rates(self, sample_BT: NDArray[np.uint32]) -> Rates:
        one = next(iter(self._cluster.reports))
        asked = self._model, sample_BT, self._job.config, self._cluster.threads_of(one)
        rates: Rates = self._cluster.ask(one, worker_task.rates, *asked)
        return rates

    def first_rows(
        self, rows: RowMap, layers: tuple[int, ...], batch_contexts: int, values: ValueType
    ) -> dict[int, Floats]:
        one = next(iter(self._cluster.reports))
        table = rows.table
        source = RowsSpec(
            corpus=str(table.folder.absolute()),
            split=table.split,
            rule=rows.rule,
            mask=rows.mask,
            shuffle_seed=rows.shuffle_seed,
        )
        asked = self._model, source, layers, batch_contexts, values.name
        found: dict[int, Floats] = self._cluster.ask(
            one, worker_task.calibration_rows, *asked, self._cluster.threads_of(one)
        )
        return found

    def hosts(self) -> list[Host]:
        return self._cluster.hosts()

    def about(self) -> dict[str, Any]:
        reports = self._cluster.reports.values()
        return {
            "device": ", ".join(self._cluster.device_names()),
            "workers": {"processes": len(reports), "hosts": len({each.host for each in reports})},
        }

    def run(self, passes: list[Pass], tokens_per_s: float, bar: Any) -> None:
        """Hand out every block with missing shards; returns when all are written."""
        todo = blocks_to_do(passes)
        if not todo:
            return
        spec = self._spec(passes)
        tasks = [
            BlockTask(
                pass_number=next(n for n, each in enumerate(passes) if each is job),
                block=block,
                span=job.rows.span(job.layout, block),
                missing=tuple(sorted(job.missing(block))),
                attempt=0,
                threads=1,
            )
            for job, block in todo
        ]
        _Foreman(self._cluster, spec, passes, self._say, bar).run(tasks)
        for store in spec.digests:  # every block is written: what is unfinished a dead worker left
            remove_leftovers(Path(store), deep=True)

    def _spec(self, passes: list[Pass]) -> RunSpec:
        stores = {w.root for each in passes for ws in each.writers.values() for w in ws}
        return RunSpec(
            run=secrets.token_hex(8),
            model=self._model,
            passes=tuple(_pass_spec(each) for each in passes),
            digests={str(root.absolute()): rows_digest(read_manifest(root)) for root in stores},
        )


def _pass_spec(job: Pass) -> PassSpec:
    return PassSpec(
        label=job.label,
        split=job.rows.table.split,
        rule=job.rows.rule,
        mask=job.rows.mask,
        shuffle_seed=job.rows.shuffle_seed,
        cuts=job.rows.cuts,
        first_row=job.rows.first_row,
        layout=job.layout,
        batch_contexts=job.batch_contexts,
        stores={
            layer: tuple(str(writer.root.absolute()) for writer in writers)
            for layer, writers in job.writers.items()
        },
    )


@dataclass(frozen=True)
class _InHand:
    """A block that a worker has."""

    worker: str
    task: BlockTask
    future: Any


class _Foreman:
    """Hands out blocks in order, at most two to a worker; again, when a worker dies."""

    def __init__(
        self, cluster: Cluster, spec: RunSpec, passes: list[Pass], say: Say, bar: Any
    ) -> None:
        self._cluster, self._spec, self._passes, self._bar = cluster, spec, passes, bar
        self._tell_user = say
        self._waiting: deque[BlockTask] = deque()
        self._in_hand: dict[int, _InHand] = {}  # by attempt
        self._ready: list[str] = []
        self._arriving: dict[str, Any] = {}  # worker -> future of its report
        self._left_out: dict[str, str] = {}  # worker -> why
        self._deaths: Counter[tuple[int, int]] = Counter()
        self._attempts = 0
        self._alone_since: float | None = None  # since when there has been no worker
        self._wake = threading.Event()
        self._counting = threading.Lock()
        self._rows: dict[int, int] = {}  # attempt -> rows that the bar shows of it

    def run(self, tasks: list[BlockTask]) -> None:
        """Until all blocks are written. Raises what a worker met, as its sentence for the user."""
        self._waiting.extend(tasks)
        self._ready = self._cluster.addresses()
        try:
            self._cluster.look(self._ready, self._spec.digests)
            self._cluster.listen(self._spec.run, self._heard)
            while self._waiting or self._in_hand:
                self._notice_workers()
                self._hand_out()
                self._wake.wait(_LOOK_EVERY_S)
                self._wake.clear()
                self._collect()
        finally:
            for each in self._in_hand.values():
                each.future.cancel()
            if self._in_hand or not self._cluster.is_ours:
                self._cluster.end_run(self._spec.run)

    # --- workers come and go ---

    def _notice_workers(self) -> None:
        alive = set(self._cluster.addresses())
        for address in [each for each in self._ready if each not in alive]:
            self._ready.remove(address)
            self._take_back(address)
        for address in alive - {*self._ready, *self._arriving, *self._left_out}:
            future = self._cluster.submit_look(address, self._spec.digests)
            future.add_done_callback(lambda _: self._wake.set())
            self._arriving[address] = future
        for address, future in list(self._arriving.items()):
            if address not in alive:
                future.cancel()
                del self._arriving[address]
            elif future.done():
                del self._arriving[address]
                self._welcome(address, future)
        if self._ready or self._arriving:
            self._alone_since = None
        elif self._left_out:
            raise InputError(" ".join(dict.fromkeys(self._left_out.values())))
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
            if not self._cluster.is_ours:
                self._say("There is no worker at the moment: waiting for one.")
        elif self._cluster.is_ours and time.monotonic() - self._alone_since > START_S:
            raise InputError(
                f"All worker processes have died, and none has started again in {START_S:.0f} s. "
                "Run the same command again with fewer --workers to go on."
            )

    def _welcome(self, address: str, future: Any) -> None:
        """A worker that came later and cannot take part is named, and the others go on."""
        try:
            answer = self._cluster.answer(address, future)
            if answer is not None:  # or it is gone again
                self._cluster.looked(address, answer)
                self._ready.append(address)
        except SaePipeError as error:
            self._left_out[address] = str(error)
            self._say(f"A worker is left out: {error}")

    def _take_back(self, address: str) -> None:
        """The blocks of a dead worker are the next to be handed out."""
        self._cluster.forget(address)
        lost = [each for each in self._in_hand.values() if each.worker == address]
        for each in sorted(lost, key=lambda each: each.task.attempt, reverse=True):
            each.future.cancel()
            self._put_back(each.task)
            self._count_death(each)
        if lost:
            blocks = "block is" if len(lost) == 1 else f"{len(lost)} blocks are"
            self._say(f"Worker {address} has died; its {blocks} made again by others.")

    def _put_back(self, task: BlockTask) -> None:
        del self._in_hand[task.attempt]
        self._show(task.attempt, 0)
        self._waiting.appendleft(task)

    def _count_death(self, lost: _InHand) -> None:
        self._deaths[lost.task.pass_number, lost.task.block] += 1
        if self._deaths[lost.task.pass_number, lost.task.block] >= _MOST_DEATHS:
            raise self._deadly(lost)

    def _deadly(self, lost: _InHand) -> InputError:
        label = self._passes[lost.task.pass_number].label
        return InputError(
            f"{_MOST_DEATHS} workers have died, one after another, while they made block "
            f"{lost.task.block} of {label}, the last one {lost.worker}: something ends them, such "
            "as too little memory. Look at their logs and at `dmesg`; pass fewer workers on a "
            "machine, or --block-gb smaller with another --out. Shards that are done are kept."
        )

    # --- blocks ---

    def _hand_out(self) -> None:
        """One block to each worker before any has two."""
        for at_most in range(1, AT_ONCE + 1):
            for address in self._ready:
                has = sum(each.worker == address for each in self._in_hand.values())
                if self._waiting and has < at_most:
                    self._submit(address, self._waiting.popleft())

    def _submit(self, address: str, task: BlockTask) -> None:
        self._attempts += 1
        threads = self._cluster.threads_of(address)
        task = replace(task, attempt=self._attempts, threads=threads)
        future = self._cluster.submit(address, worker_task.make_block, self._spec, task)
        self._in_hand[task.attempt] = _InHand(address, task, future)
        future.add_done_callback(lambda _: self._wake.set())

    def _collect(self) -> None:
        alive: set[str] | None = None
        for each in [each for each in self._in_hand.values() if each.future.done()]:
            if each.future.status != "finished":
                alive = set(self._cluster.addresses()) if alive is None else alive
                if each.worker not in alive:
                    continue  # it died; seen to by _notice_workers
                if each.future.status in ("cancelled", "lost"):
                    raise self._cluster.lost()
                error = each.future.exception()
                if type(error).__name__ == "KilledWorker":  # started again at the same address
                    raise self._deadly(each) from error
            answer = self._cluster.answer(each.worker, each.future)  # raises a bug of ours
            if answer is not None:
                self._done(each, answer)

    def _done(self, each: _InHand, answer: Answer) -> None:
        if answer.get() is not True:
            # It works for another run now, or another block of it has failed: then that is heard.
            self._put_back(each.task)
            if each.worker in self._ready:
                self._ready.remove(each.worker)
            self._left_out[each.worker] = (
                f"The workers of {self._cluster.name} have gone over to another harvest: they make "
                "one at a time. Run the same command again when the other has ended."
            )
            return
        job = self._passes[each.task.pass_number]
        for writers in job.writers.values():
            for writer in writers:
                writer.committed.update(each.task.missing)
        del self._in_hand[each.task.attempt]
        self._show(each.task.attempt, job.n_rows_of(each.task.block))

    # --- the bar ---

    def _heard(self, attempt: int, rows: int) -> None:
        """A worker tells how far it is; in a thread of the Dask client."""
        with self._counting:
            if attempt in self._in_hand:
                self._bar.update(rows - self._rows.get(attempt, 0))
                self._rows[attempt] = rows

    def _show(self, attempt: int, rows: int) -> None:
        """The last word on a block, which is in hand no more."""
        with self._counting:
            self._bar.update(rows - self._rows.pop(attempt, 0))

    def _say(self, line: str) -> None:
        with self._counting:
            self._bar.clear()
            self._tell_user(line)
