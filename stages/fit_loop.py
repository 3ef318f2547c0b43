"""One stream of batches, many SAEs: each batch is read once and given to every run that needs it.

# B rows, D d_in

A run takes the batches in their order, from the one that its checkpoint stands at; what it computes
depends on nothing that the runs beside it do. On a CPU runs step side by side in threads, each step
on its own share of the cores. A run that fails is out, and the others go on.

Several processes (parallel.py) each have a loop over the same batches, read them all and step on
their own rows. What one of them alone knows, that a run has failed or a signal has come, is agreed
on after each batch, so that all leave out the same runs and stop at the same step.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..storage import ActivationStore
from ..storage.disk import human_bytes
from ..storage.errors import SaePipeError
from ..storage.files import disk_error
from ..storage.unfinished import WaitEnded
from .batches import TorchBatches
from .devices import usable_cores
from .fit_memory import forget_peak, memory_is_enough, peak_device_bytes, peak_memory_bytes
from .fit_run import Member, Summary
from .fitconfig import default_lr_in_words
from .parallel import Group
from .runlog import SweepBar
from .stopping import leave, signals_asked


def train_all(
    store: ActivationStore,
    runs: Sequence[Member],
    *,
    cores: int,
    show: bool,
) -> None:
    """Train and finish all runs; how each ended is its `summary` or its `error`.

    cores: that steps may use together on a CPU. A signal checkpoints all and ends the process.
    What ends the stream itself (StoreError for damaged rows) is the error of all that need it.
    """
    loop = _Loop(store, runs, show=show)
    with ExitStack() as held:
        held.callback(loop.close)
        held.enter_context(_products(runs[0].config.dtype))
        held.enter_context(_own_threads())
        at_once = min(cores // max(run.config.threads or cores for run in runs), len(runs))
        # Several processes have to make their exchanges in one order.
        if at_once > 1 and loop.is_on_cpu and runs[0].trainer.group.is_alone:
            loop.pool = held.enter_context(ThreadPoolExecutor(at_once, "step"))
        try:
            loop.run()
        except SaePipeError as error:
            for run in runs:
                if run.summary is None:
                    run.error = run.error or error


class _Loop:
    """pool: where runs step side by side; None steps them here, one after another."""

    def __init__(self, store: ActivationStore, runs: Sequence[Member], *, show: bool) -> None:
        self._store, self._live = store, list(runs)
        self._group: Group = runs[0].trainer.group
        self._stream = _Stream(store, runs[0])
        names = [run.folder.path.name for run in runs]
        self._bar = SweepBar(
            names[0] if len(names) == 1 else f"{len(names)} SAEs of {store.name}",
            steps=max(run.schedule.steps for run in runs),
            first_step=self._position(),
            show=show,
        )
        self.pool: ThreadPoolExecutor | None = None
        self._is_ending = False
        self._asked: list[int] = []  # numbers of the signals that came to this process
        self._signal = 0  # one that came to any of the processes

    @property
    def is_on_cpu(self) -> bool:
        return self._stream.device.type == "cpu"

    def run(self) -> None:
        for line in dict.fromkeys(
            default_lr_in_words(run.config, run.schedule)
            for run in self._live
            if run.config.lr is None
        ):
            self._bar.say(line)
        forget_peak(self._stream.device)
        with signals_asked() as self._asked:
            asked = self._asked
            self._store.while_waiting(lambda: bool(asked) or self._is_ending, self._bar.say)
            self._train()
        # A second thread may wait for held-out rows of a store that is followed.
        self._store.while_waiting(lambda: self._is_ending, self._bar.say)
        self._finish(self._live)
        device_bytes = peak_device_bytes(self._stream.device)
        on_device = f", {human_bytes(device_bytes)} on the device" if device_bytes else ""
        self._bar.say(f"peak memory {human_bytes(peak_memory_bytes())}{on_device}")

    def _position(self) -> int:
        """The batch to read next: the first that a run still needs."""
        return min(run.updates for run in self._live)

    def _train(self) -> None:
        """Step until no run needs a batch; a signal checkpoints and ends the process."""
        while not all(run.is_trained for run in self._live):
            position = self._position()
            try:
                batch_BD = self._group.together(partial(self._stream.batch, position))
            except WaitEnded:  # of a store that is followed
                self._leave()
                raise
            takers = self._give(position, batch_BD)
            if self._signal:
                self._leave()
            trained = [run for run in self._live if run.is_trained]
            if trained and len(trained) < len(self._live):
                try:
                    self._finish(trained)
                except WaitEnded:
                    self._leave()
                    raise
            self._bar.show(position + 1, [run.line for run in takers if run.line is not None])

    def _give(self, position: int, batch_BD: torch.Tensor) -> list[Member]:
        """Let the runs step that need this batch; those ahead of it had it before a restart."""
        takers = [run for run in self._live if run.updates == position]
        waited_s = self._stream.waited_s
        self._each(takers, lambda run: run.step(batch_BD, waited_s))
        self._agree()
        self._drop_ended()
        return takers

    def _agree(self) -> None:
        """Learn from all processes which runs have failed, and whether a signal has come."""
        found, self._signal = self._group.agree(
            [run.error for run in self._live], self._asked[0] if self._asked else 0
        )
        for run, error in zip(self._live, found, strict=True):
            run.error = error

    def _finish(self, trained: list[Member]) -> None:
        self._each(trained, lambda run: run.finish())
        self._agree()
        for run in trained:
            if run.error is None:
                run.summary = self._same_summary(run)
        self._drop_ended()

    def _same_summary(self, run: Member) -> Summary:
        """The first process's, which has judged."""

        def judged() -> dict[str, Any]:
            assert run.summary is not None
            return asdict(run.summary)

        return Summary(**self._group.first(judged))

    def _leave(self) -> None:
        self._each(self._live, lambda run: run.checkpoint())
        self._agree()  # nobody ends before the first process has written
        if self._signal:
            self._bar.close()
            try:
                leave(self._signal, [run.folder.path for run in self._live if self._group.is_first])
            finally:
                self._group.wait()  # torchrun ends the others when one has ended

    def _each(self, runs: Sequence[Member], act: Callable[[Member], None]) -> None:
        """Call act for every run, side by side where there is a pool; a run that fails is marked."""

        def guarded(run: Member) -> None:
            if self.is_on_cpu and run.config.threads is not None:
                # It belongs to the thread that sets it (in torch's OpenMP builds), and sums may
                # depend on it: so it is the run's, in whichever thread the run is. More threads
                # than cores wait for one another in loops.
                torch.set_num_threads(min(run.config.threads, os.cpu_count() or 1))
            try:
                with memory_is_enough(run.config, self._stream.device):
                    act(run)
            except SaePipeError as error:
                run.error = run.error or error
            except OSError as error:
                run.error = run.error or disk_error(error, run.folder.path)

        if self.pool is None:
            for run in runs:
                guarded(run)
            return
        try:
            for _ in self.pool.map(guarded, runs):
                pass
        except BaseException:
            self._is_ending = True  # the pool is left when its threads have ended
            raise

    def _drop_ended(self) -> None:
        """Part with runs that are complete or have failed; their memory is free for the others."""
        ended = [run for run in self._live if run.summary is not None or run.error is not None]
        self._live = [run for run in self._live if run not in ended]
        for run in ended:
            if run.error is not None and self._live:
                self._bar.say(f"{run.folder.path} has failed, and the others go on: {run.error}")
            if run.warning is not None:
                self._bar.say(run.warning)
        self._each(ended, lambda run: run.close())

    def close(self) -> None:
        self.pool = None  # it has ended before
        self._each(self._live, lambda run: run.close())
        self._stream.close()
        self._bar.close()


class _Stream:
    """The batches of the order that the runs share, from any one on."""

    def __init__(self, store: ActivationStore, like: Member) -> None:
        self._store, self._config, self._scale = store, like.config, 1 / like.norm_factor
        group = like.trainer.group
        self._part = group.part(like.config.batch_size)
        share = max(usable_cores() // group.seat.local_size, 1)
        self._threads = None if group.is_alone else share
        self.device, self._dtype = like.trainer.device, like.trainer.sae.W_dec.dtype
        self._batches: TorchBatches | None = None
        self._next = -1
        self._waited_before_s = 0.0

    @property
    def waited_s(self) -> float:
        """Seconds that were spent waiting for batches."""
        return self._waited_before_s + (0.0 if self._batches is None else self._batches.waited_s)

    def batch(self, number: int) -> torch.Tensor:
        """Batch `number` of all epochs; one that does not follow the last is looked up anew."""
        if self._batches is None or number != self._next:
            self.close()
            self._batches = TorchBatches(
                self._store,
                batch_size=self._config.batch_size,
                seed=self._config.order_seed,
                start=number,
                device=self.device,
                dtype=self._dtype,
                scale=self._scale,
                threads=self._threads,
                part=self._part,
            )
        batch_BD = next(self._batches)
        self._next = number + 1
        return batch_BD

    def close(self) -> None:
        if self._batches is not None:
            self._waited_before_s += self._batches.waited_s
            self._batches.close()
            self._batches = None


@contextmanager
def _products(dtype: str) -> Iterator[None]:
    """TF32 for float32 products where asked for; sums of bfloat16 products in float32.

    As it was before afterwards.
    """
    before, matmul = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else before)
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.allow_bf16_reduced_precision_reduction = reduced


@contextmanager
def _own_threads() -> Iterator[None]:
    """The number of torch's threads as it was before, afterwards.

    The last number that was set anywhere is what threads begin with that are started later.
    """
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
