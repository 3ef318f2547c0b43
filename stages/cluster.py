"""The worker processes of a harvest: started on this machine, or those of a Dask cluster.

Dask starts processes, carries messages and notices deaths. Which block goes where is decided in
`harvest_workers.py`: so no worker ever holds more than two blocks, whatever its number of threads,
and a block that kills its workers is named.

distributed is imported only here and only when it is needed: it takes half a second.
"""

import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..storage import provenance
from ..storage.errors import InputError, NetworkError, StoreError
from . import worker_task
from .harvest_run import Host
from .worker_spec import Answer, WorkerReport

AT_ONCE = 2  # blocks under way in a worker: one is filled while the other is written
_CONNECT_S = 10.0
START_S = 120.0
_ANSWER_S = 600.0  # a worker that is asked may have a large model to load first
_GATHER_S = 2.0  # an answer of a few bytes that is there
_GOODBYE_S = 5.0

Say = Callable[[str], None]


@contextmanager
def local_cluster(n_workers: int, device: str, say: Say) -> Iterator["Cluster"]:
    """Start worker processes on this machine. They end with this process, however it ends: the
    kernel closes a pipe that each of them watches."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=AT_ONCE,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,  # the plan has counted the blocks; Dask would kill at its own guess
            silence_logs=logging.CRITICAL,  # what matters is said by us
        ) as processes,
        Client(processes, set_as_default=False) as client,
    ):
        cluster = Cluster(client, device, "this machine", is_ours=True)
        cluster.wait_for(n_workers)
        say(f"workers   {cluster.described()}")
        yield cluster


@contextmanager
def join_cluster(address: str, device: str, say: Say) -> Iterator["Cluster"]:
    """Use the workers of a running Dask cluster. NetworkError when no scheduler answers."""
    from distributed import Client
    from distributed.comm.addressing import parse_address, parse_host_port

    try:
        # Of an address without a port a client is left half made, whose end is a traceback.
        parse_host_port(parse_address(address)[1])
        client = Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise NetworkError(
            f"No Dask scheduler answers at {address}. Start one with `dask scheduler` and pass the "
            "address that it prints, such as tcp://host:8786."
        ) from error
    with client:
        cluster = Cluster(client, device, f"the cluster at {address}", is_ours=False)
        if not cluster.addresses():
            say(f"workers   none yet at {address}: waiting for the first (`dask worker {address}`)")
        cluster.wait_for(1)
        say(f"workers   {cluster.described()}")
        yield cluster


class Cluster:
    """Worker processes that can be asked and given work, one by one."""

    def __init__(self, client: Any, device: str, name: str, *, is_ours: bool) -> None:
        """device: as asked for with --device; is_ours: we have started the processes here."""
        self._client, self._asked, self.name, self.is_ours = client, device, name, is_ours
        self.reports: dict[str, WorkerReport] = {}

    @property
    def asked_device(self) -> str:
        return self._asked

    @property
    def device(self) -> torch.device:
        """What the workers compute on."""
        return torch.device(next(iter(self.reports.values())).device)

    def addresses(self) -> list[str]:
        """The workers that live now."""
        try:
            return list(self._client.nthreads())
        except (OSError, RuntimeError, TimeoutError) as error:
            raise self.lost() from error

    def lost(self) -> NetworkError:
        """The sentence for a scheduler that is gone."""
        return NetworkError(
            f"The Dask scheduler of {self.name} does not answer any more. Shards that are done are "
            "kept: start it and run the same command again to go on."
        )

    def wait_for(self, n_workers: int) -> None:
        """Until there are that many workers, all looked at; ours come soon, others when they do."""
        try:
            self._client.wait_for_workers(n_workers, timeout=START_S if self.is_ours else None)
        except TimeoutError as error:
            raise InputError(
                f"Of {n_workers} worker processes {len(self.addresses())} have started in "
                f"{START_S:.0f} s. Pass fewer --workers."
            ) from error
        self.look(self.addresses(), {})

    def submit(self, address: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have one worker call a function of worker_task; a Dask future of its Answer."""
        return self._client.submit(
            worker_task.answered,
            function,
            *arguments,
            workers=[address],
            allow_other_workers=False,
            pure=False,
        )

    def run_on_all(self, function: Callable[[], None]) -> None:
        """Call a function in the main thread of every worker process."""
        self._client.run(function)

    def ask(self, address: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What one worker answers; raises the error that it met."""
        return self._wait(address, self.submit(address, function, *arguments)).get()

    def _wait(self, address: str, future: Any) -> Answer:
        give_up = time.monotonic() + _ANSWER_S
        while time.monotonic() < give_up:
            answer = self.answer(address, future)
            if answer is not None:
                return answer
            if address not in self.addresses():
                raise InputError(
                    f"Worker {address} has died before the first block: something ended it, such "
                    "as too little memory for the model. Look at its log and at `dmesg`, and pass "
                    "fewer workers on a machine."
                )
        raise NetworkError(
            f"Worker {address} has not answered within {_ANSWER_S:.0f} s. Look at its log, and "
            "run the same command again."
        )

    def answer(self, address: str, future: Any) -> Answer | None:
        """What a worker has answered; None when there is no answer yet, or never will be, because
        the worker died with it."""
        try:
            answer: Answer = future.result(timeout=_GATHER_S)
        except TimeoutError:
            return None
        except ImportError as error:
            raise InputError(_cannot_import(address, error)) from error
        return answer

    def submit_look(self, address: str, digests: Mapping[str, str]) -> Any:
        """Have a worker report on itself; `looked` takes the Answer."""
        spread = self.is_ours
        return self.submit(address, worker_task.report, self._asked, spread, dict(digests))

    def look(self, addresses: list[str], digests: Mapping[str, str]) -> None:
        """Have workers report on themselves and check what they say.

        digests: `rows_digest` of each store that they must see, by its path. Raises InputError and
        StoreError, naming the worker.
        """
        futures = {address: self.submit_look(address, digests) for address in addresses}
        for address, future in futures.items():
            self.looked(address, self._wait(address, future))

    def looked(self, address: str, answer: Answer) -> None:
        """Accept a worker, or raise why it cannot take part."""
        found: WorkerReport = answer.get()
        if found.unseen is not None:
            raise StoreError(
                f"Worker {address} on {found.host} does not see {found.unseen}/manifest.json as it "
                "is here. Pass --out on a file system that all workers share, at the same path."
            )
        others = [self.reports[each] for each in self.reports if each != address]
        if others and others[0].device != found.device:
            raise InputError(
                f"Worker {address} on {found.host} computes on {found.device}, and others on "
                f"{others[0].device}, which round differently. Pass --device {others[0].device} or "
                f"{found.device}, or stop the workers of one kind."
            )
        differences = _version_differences(found.versions, provenance.versions())
        if differences and not self.is_ours:
            raise InputError(
                f"Worker {address} on {found.host} has other versions than this process: "
                f"{'; '.join(differences)}. Other versions may give other rows: install the same "
                "ones on both (constraints.txt)."
            )
        self.reports[address] = found

    def threads_of(self, address: str) -> int:
        """A worker's share of its machine's cores."""
        here = self.reports[address]
        beside = sum(each.host == here.host for each in self.reports.values())
        return max(here.cores // beside, 1)

    def forget(self, address: str) -> None:
        """A worker has gone."""
        self.reports.pop(address, None)

    def hosts(self) -> list[Host]:
        """The machines, with the number of workers on each."""
        memory = {each.host: each.memory_bytes for each in self.reports.values()}
        return [
            Host(
                name="this machine" if self.is_ours else f"host {name}",
                memory_bytes=memory[name],
                workers=workers,
            )
            for name, workers in Counter(each.host for each in self.reports.values()).items()
        ]

    def device_names(self) -> list[str]:
        """The devices of all workers, each once."""
        return sorted({each.device_name for each in self.reports.values()})

    def described(self) -> str:
        """Processes, devices and the dashboard, as they are printed."""
        hosts = {each.host for each in self.reports.values()}
        n_workers, where = len(self.reports), self.name
        if not self.is_ours and len(hosts) > 1:
            where += f" on {len(hosts)} hosts"
        devices = ", ".join(self.device_names())
        processes = "1 process" if n_workers == 1 else f"{n_workers} processes"
        return f"{processes} of {where}, on {devices}; {self._dashboard()}"

    def _dashboard(self) -> str:
        link = self._client.dashboard_link
        if not link:
            return "no Dask dashboard"
        if importlib.util.find_spec("bokeh") is None and self.is_ours:
            # Without bokeh Dask draws nothing, but lists workers and tasks.
            return f"Dask dashboard {link.removesuffix('/status')}/info/main/workers.html"
        return f"Dask dashboard {link}"

    def listen(self, run: str, heard: Callable[[int, int], None]) -> None:
        """Call heard(attempt, rows so far) in another thread, now and then while blocks fill."""

        def handle(event: tuple[Any, dict[str, int]]) -> None:
            heard(event[1]["attempt"], event[1]["rows"])

        self._client.subscribe_topic(worker_task.progress_topic(run), handle)

    def end_run(self, run: str) -> None:
        """Stop what workers still do for a run at their next batch, and have them forget it."""
        try:
            self._client.unsubscribe_topic(worker_task.progress_topic(run))
            self._client.sync(
                self._client._run, worker_task.end_run, run, callback_timeout=_GOODBYE_S
            )
        except (OSError, RuntimeError, TimeoutError, ValueError):
            return  # what they do is done twice at worst, to the same bytes


def _cannot_import(address: str, error: ImportError) -> str:
    return f"Worker {address} cannot run sae-pipe ({error}). Install it there, in the same version."


def _version_differences(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """CPU and CUDA builds of one version count as the same; Python computes no row."""
    return [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted({*there, *here} - {"python"})
        if _release(there.get(name)) != _release(here.get(name))
    ]


def _release(version: str | None) -> str | None:
    return None if version is None else version.partition("+")[0]
