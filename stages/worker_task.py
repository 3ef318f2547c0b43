"""What runs in a worker process: it makes single blocks of a harvest that another process leads.

A worker holds the model and the corpus from its first block on. Two blocks are under way in it: one
is filled while the other is encoded and written. It writes shards and their commit records and
nothing else; the manifest and every zarr.json are the leading process's. What it is told is plain
data, and nothing that a store holds is ever unpickled.

A worker that was given up for dead may still be writing when another makes the same block: both
write the same bytes, under temporary names of their own. So that it cannot write into a store that
has taken the place of the one it was told of, it compares the manifest before it writes.
"""

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..storage import provenance
from ..storage.builder import StoreBuilder
from ..storage.corpus import Corpus
from ..storage.errors import InputError, SaePipeError, StoreError
from ..storage.extension import resume_any
from ..storage.manifest import MANIFEST, rows_digest
from ..storage.values import Floats, value_type
from ..storage.writer import SplitWriter
from .backoff import find_batch_size
from .calibration import first_rows
from .devices import DTYPES, pick_device, usable_cores
from .harvest_config import HarvestConfig
from .harvest_run import BlockPipeline, Pass, device_name
from .hooks import HookedModel
from .models import inspect_model, load_truncated
from .plan import Rates, measure
from .row_map import RowMap
from .worker_spec import Answer, BlockTask, ModelSpec, PassSpec, RowsSpec, RunSpec, WorkerReport

_SEEN_WITHIN_S = 5.0  # a network file system may show a new file late
_TELL_EVERY_S = 0.5


class _Stopped(Exception):
    """The leading process wants no more of this run."""


def answered(function: Callable[..., Any], *arguments: Any) -> Answer:
    """Call a function of this module; an error of the user's making becomes part of the answer."""
    try:
        return Answer(value=function(*arguments))
    except SaePipeError as error:
        return Answer(error=type(error).__name__, message=str(error))
    except _Stopped:
        return Answer()


# --- looked at before the work ---


def report(device: str, spread: bool, digests: Mapping[str, str]) -> WorkerReport:
    """Look at this worker's machine, and whether it sees the stores (path -> rows_digest)."""
    found = worker_device(device, spread)
    return WorkerReport(
        host=socket.gethostname(),
        cores=usable_cores(),
        memory_bytes=provenance.memory_bytes(),
        device=found.type,
        device_name=device_name(found).replace(str(found), found.type, 1),
        versions=provenance.versions(),
        unseen=next((path for path, digest in digests.items() if not _sees(path, digest)), None),
    )


def _sees(path: str, digest: str) -> bool:
    give_up = time.monotonic() + _SEEN_WITHIN_S
    while True:
        try:
            _check_store(path, digest)
            return True
        except SaePipeError:
            if time.monotonic() > give_up:
                return False
            time.sleep(0.2)


def _check_store(path: str, digest: str) -> None:
    """StoreError unless the store is still the one that this run writes."""
    if rows_digest(StoreBuilder.resume(Path(path)).manifest) != digest:
        raise StoreError(
            f"Store {path} was replaced by another while a worker process made rows for it: its "
            f"{MANIFEST} is not the one of this harvest. Run the same command again."
        )


def worker_device(asked: str, spread: bool) -> torch.device:
    """What this worker computes on; spread: worker i takes the i-th GPU of the machine."""
    device = pick_device(asked)
    if spread and device.type == "cuda" and device.index is None:
        from distributed import get_worker

        device = torch.device("cuda", int(get_worker().name) % torch.cuda.device_count())
    return device


_models: dict[ModelSpec, HookedModel] = {}
_loading = threading.Lock()


def _model(spec: ModelSpec) -> HookedModel:
    """The model, loaded once in a process."""
    with _loading:
        if spec not in _models:
            _models.clear()
            device = worker_device(spec.device, spec.spread)
            if spec.commit is None and not Path(spec.source).is_dir():
                raise InputError(
                    f"The worker process on {socket.gethostname()} does not see the model folder "
                    f"{spec.source}. Put it on a file system that all workers share, at the same "
                    "path."
                )
            info = inspect_model(spec.source, spec.commit)
            if not spec.spread and info.revision != spec.revision:  # reads a folder's weights
                raise InputError(
                    f"The worker process on {socket.gethostname()} sees another model at "
                    f"{spec.source}: its files have other digests. Put the same model there."
                )
            _models[spec] = load_truncated(info, spec.layers, spec.hook, device, DTYPES[spec.dtype])
        return _models[spec]


def batch_contexts(spec: ModelSpec, context_size: int) -> int:
    """Contexts a forward pass that suit this worker's device."""
    return find_batch_size(_model(spec), context_size)


def rates(
    spec: ModelSpec, sample_BT: NDArray[np.uint32], config: HarvestConfig, threads: int
) -> Rates:
    """How fast this worker runs these contexts, and how well their rows compress."""
    model = _model(spec)
    _settle(model, threads)
    return measure(model, sample_BT, config)


def calibration_rows(
    spec: ModelSpec,
    source: RowsSpec,
    layers: tuple[int, ...],
    contexts: int,
    values: str,
    threads: int,
) -> dict[int, Floats]:
    """The first rows of a split: `calibration.first_rows` on this worker's device."""
    model = _model(spec)
    _settle(model, threads)
    corpus = Corpus(Path(source.corpus))
    table = corpus.train if source.split == "train" else corpus.heldout
    rows = RowMap(table, source.rule, source.mask, shuffle_seed=source.shuffle_seed)
    return first_rows(model, rows, layers, contexts, value_type(values))


def _settle(model: HookedModel, threads: int) -> None:
    """Make this thread compute where the model is, with this worker's share of the cores."""
    torch.set_num_threads(threads)
    if (
        model.device.type == "cuda" and model.device.index is not None
    ):  # pinned memory belongs to a thread's current GPU
        torch.cuda.set_device(model.device)


# --- blocks ---


class _Run:
    """What a worker holds of one run of a harvest: model, corpus, writers, memory of two blocks."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.users, self.is_stopped = spec, 0, False
        self._filling, self._opening = threading.Lock(), threading.Lock()
        self._is_open = False
        self._tell: Callable[[int], None] = lambda rows: None

    def _open(self, threads: int) -> None:
        spec = self.spec
        self._model = _model(spec.model)
        self._encoding = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        writers = {path: resume_any(Path(path)).writers(self._encoding) for path in spec.digests}
        corpus = Corpus(Path(next(iter(spec.digests))) / "corpus")
        self._passes = [_pass(each, corpus, writers) for each in spec.passes]
        # In memory, however long it takes: two workers must never share the file of a block, whose
        # pages a network file system would write back whole, over what the other has put there.
        self._pipeline = BlockPipeline(
            self._model, note_every_s=math.inf, tokens_per_s=1.0, advance=self._advance
        )
        self._is_open = True

    def make(self, task: BlockTask, tell: Callable[[int], None]) -> None:
        """Fill one block and write its missing shards."""
        with self._opening:
            if not self._is_open:
                self._open(task.threads)
        job = self._passes[task.pass_number]
        rows = job.rows.rows(job.layout, task.block, task.span)
        try:
            with self._filling:
                if self.is_stopped:
                    raise _Stopped
                _settle(self._model, task.threads)
                self._tell = tell
                buffer = self._pipeline.fill(job, task.block, rows)
        except BaseException:
            self.is_stopped = True  # rows under way are lost; nothing of this run goes on here
            raise
        for path, digest in self.spec.digests.items():
            _check_store(path, digest)
        self._pipeline.write(job, rows, buffer, set(task.missing))

    def _advance(self, rows: int) -> None:
        if self.is_stopped:
            raise _Stopped
        self._tell(rows)

    def close(self) -> None:
        """End the threads; no block is under way."""
        if self._is_open:
            self._pipeline.close()
            self._encoding.shutdown()


def _pass(
    spec: PassSpec, corpus: Corpus, writers: Mapping[str, tuple[SplitWriter, SplitWriter]]
) -> Pass:
    is_train = spec.split == "train"
    table = corpus.train if is_train else corpus.heldout
    return Pass(
        label=spec.label,
        rows=RowMap(
            table,
            spec.rule,
            spec.mask,
            shuffle_seed=spec.shuffle_seed,
            cuts=spec.cuts,
            first_row=spec.first_row,
        ),
        layout=spec.layout,
        batch_contexts=spec.batch_contexts,
        values=next(iter(writers.values()))[0].codec.values,
        writers={
            layer: [writers[path][0 if is_train else 1] for path in paths]
            for layer, paths in spec.stores.items()
        },
    )


_runs: dict[str, _Run] = {}
_ended: set[str] = set()
_changing = threading.Lock()  # never held for long: `end_run` takes it in the worker's event loop


@contextmanager
def _run_of(spec: RunSpec) -> Iterator[_Run]:
    """The run's things, made by its first block; those of any other run are given up."""
    with _changing:
        if spec.run in _ended:
            raise _Stopped
        for other in [name for name in _runs if name != spec.run]:
            _give_up(other)  # its leading process is gone, or it would have ended it
        if spec.run not in _runs:
            _runs[spec.run] = _Run(spec)
        run = _runs[spec.run]
        run.users += 1
    try:
        yield run
    finally:
        with _changing:
            run.users -= 1
            if run.is_stopped:
                _give_up(spec.run)


def _give_up(name: str) -> None:
    """Stop a run at its next batch; the last block that is under way clears up."""
    run = _runs[name]
    run.is_stopped = True
    _ended.add(name)
    if run.users == 0:
        del _runs[name]
        run.close()


def make_block(spec: RunSpec, task: BlockTask) -> bool:
    """Make one block of a run: the task that the leading process hands out. True: it is written."""
    with _run_of(spec) as run:
        run.make(task, _teller(spec.run, task.attempt))
    return True


def end_run(name: str) -> None:
    """Stop what is under way of a run and give its memory back, the model's too."""
    with _changing:
        _ended.add(name)
        if name in _runs:
            _give_up(name)
        if not _runs.keys() - {name}:
            _models.clear()


def progress_topic(run: str) -> str:
    """The Dask topic on which workers tell how many rows of a block are in."""
    return f"sae-pipe-{run}"


def _teller(run: str, attempt: int) -> Callable[[int], None]:
    from distributed import get_worker

    worker, topic = get_worker(), progress_topic(run)
    rows, told_at = 0, time.monotonic()

    def tell(more: int) -> None:
        nonlocal rows, told_at
        rows += more
        if time.monotonic() - told_at > _TELL_EVERY_S:
            told_at = time.monotonic()
            worker.log_event(topic, {"attempt": attempt, "rows": rows})

    return tell
