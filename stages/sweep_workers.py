"""The stores of a sweep shared among worker processes of this machine, one store each at a time.

A worker fits all SAEs of its store as one process would, on GPU i where there are GPUs, else with
its share of the cores. Run folders and checkpoints are the worker's; this process hands out stores.
"""

import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..storage.errors import InputError, SaePipeError
from .cluster import Cluster, local_cluster
from .fit import Outcome
from .stopping import ask, leave, signals_asked
from .sweep import Say, StoreTask, all_failed, fit_store
from .worker_task import worker_device

_POLL_S = 0.2
_TRIES = 3  # of a store whose worker dies, each from its checkpoints
_STOP_S = 300.0  # for checkpoints, when asked to end


@dataclass(frozen=True, kw_only=True)
class StoreAnswer:
    """What a worker has done with a store; outcomes is None when it was asked to end."""

    outcomes: list[Outcome] | None
    said: list[str] = field(default_factory=list)


def fit_in_worker(task: StoreTask, cores: int) -> StoreAnswer:
    """Runs in a worker process."""
    said: list[str] = []
    device = str(worker_device(task.configs[0].device, True))
    configs = tuple(replace(config, device=device) for config in task.configs)
    try:
        outcomes = fit_store(
            replace(task, configs=configs), said.append, show_progress=False, cores=cores
        )
    except (SystemExit, KeyboardInterrupt):  # as `stop_worker` has asked; Dask must not see it
        return StoreAnswer(outcomes=None, said=said)
    return StoreAnswer(outcomes=outcomes, said=said)


def stop_worker() -> None:
    """Runs in a worker process: its fit checkpoints and ends."""
    ask(signal.SIGTERM)


def ignore_interrupts() -> None:
    """Runs in a worker process: Ctrl-C reaches it, too, but it is asked to end by `stop_worker`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def fit_in_workers(
    tasks: Sequence[StoreTask], n_workers: int, say: Say
) -> Iterator[tuple[StoreTask, list[Outcome]]]:
    """Each store with its outcomes, as they are done. A signal has all workers checkpoint first."""
    device = tasks[0].configs[0].device
    with local_cluster(n_workers, device, say) as cluster, signals_asked() as asked:
        cluster.run_on_all(ignore_interrupts)
        yield from _Stores(cluster, tasks, say).run(asked)


class _Stores:
    def __init__(self, cluster: Cluster, tasks: Sequence[StoreTask], say: Say) -> None:
        self._cluster, self._say = cluster, say
        self._waiting = deque(tasks)
        self._running: dict[str, tuple[StoreTask, Any]] = {}
        self._tries: dict[StoreTask, int] = dict.fromkeys(tasks, 0)

    def run(self, asked: list[int]) -> Iterator[tuple[StoreTask, list[Outcome]]]:
        while self._waiting or self._running:
            if asked:
                self._stop(asked[0])
            self._hand_out()
            for address in list(self._running):
                ended = self._look(address)
                if ended is not None:
                    yield ended
            time.sleep(_POLL_S)

    def _hand_out(self) -> None:
        for address in self._cluster.addresses():
            if self._waiting and address not in self._running:
                if address not in self._cluster.reports:  # started in place of one that died
                    self._cluster.look([address], {})
                    self._cluster.run_on_all(ignore_interrupts)
                task = self._waiting.popleft()
                self._tries[task] += 1
                cores = self._cluster.threads_of(address)
                self._say(f"{task.store}: fitting {len(task.configs)} SAEs")
                future = self._cluster.submit(address, fit_in_worker, task, cores)
                self._running[address] = task, future

    def _look(self, address: str) -> tuple[StoreTask, list[Outcome]] | None:
        """What has come of the store of a worker; None while it is at it, or if it starts anew."""
        task, future = self._running[address]
        # Asking waits for a moment, in which a signal would not be seen.
        answer = self._cluster.answer(address, future) if future.done() else None
        if answer is None:
            if address in self._cluster.addresses():
                return None
            return self._died(address, task)
        del self._running[address]
        try:
            found: StoreAnswer = answer.get()
        except SaePipeError as error:
            return task, all_failed(task, error)
        for line in found.said:
            self._say(line)
        assert found.outcomes is not None  # only `_stop` asks for that
        asked = zip(found.outcomes, task.configs, strict=True)
        return task, [replace(outcome, config=config) for outcome, config in asked]

    def _died(self, address: str, task: StoreTask) -> tuple[StoreTask, list[Outcome]] | None:
        del self._running[address]
        self._cluster.forget(address)
        if self._tries[task] < _TRIES:
            self._say(f"{task.store}: its worker has died; another goes on from the checkpoints")
            self._waiting.append(task)
            return None
        error = InputError(
            f"{_TRIES} worker processes have died while they fitted from {task.store}: most often "
            "it is too little memory. Look at `dmesg`, and pass fewer --workers or SAEs."
        )
        return task, all_failed(task, error)

    def _stop(self, number: int) -> None:
        """Have all workers checkpoint, and end as the signal would have."""
        stopped: list[Path] = []
        give_up = time.monotonic() + _STOP_S
        for address, (task, future) in self._running.items():
            told, answer = [], None  # Dask drops what nobody holds
            while address in self._cluster.addresses() and time.monotonic() < give_up:
                told.append(self._cluster.submit(address, stop_worker))
                answer = self._cluster.answer(address, future)
                if answer is not None:
                    break
            if answer is None or answer.value is None or answer.value.outcomes is None:
                stopped += task.outs
        leave(number, stopped)
