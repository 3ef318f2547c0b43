"""A harvest by many workers: the bytes of one process, whoever dies in the middle."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distributed import Client

from sae_pipe.stages import harvest_workers, worker_task
from sae_pipe.stages.cluster import Cluster, join_cluster
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import request_of, targets
from sae_pipe.stages.harvest_run import Host, OneProcess
from sae_pipe.storage import DiskError, InputError, StoreError, open_store
from sae_pipe.storage.errors import NetworkError
from sae_pipe.storage.files import is_leftover, remove_leftovers, write_whole
from sae_pipe.storage.manifest import read_manifest, rows_digest

from .harvesting import config_for, content, quiet
from .test_cli import refused, run

TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """What a closed cluster leaves in cycles goes now. Collected while CPython 3.11 builds a syntax
    tree, as pytest does for every module it imports, it makes that fail now and then."""
    yield
    gc.collect()


def differing(found: Path, expected: Path) -> set[str]:
    """Names of the files that are not the same in both stores."""
    contents = content(found), content(expected)
    names = contents[0].keys() | contents[1].keys()
    return {name for name in names if contents[0].get(name) != contents[1].get(name)}


def is_alive(pid: int) -> bool:
    """A process that has ended may wait for its parent as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(happened: Any, what: str, seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


# --- processes of this machine ---


def test_two_workers_of_which_one_dies_give_the_bytes_of_one_process(
    lm: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers and two mask ratios, a codec that is fitted to the rows; a worker is killed with
    its third block in hand."""
    config = config_for(
        lm, text, tmp_path / "one/acts.zarr", layers=(0, 1), mask_p=(0.0, 0.3), codec="compact"
    )
    ones = quiet(config)
    submit, handed_out = Cluster.submit, list[str]()
    killed: list[int] = []

    def submit_and_kill(self: Any, address: str, function: Any, *arguments: Any) -> Any:
        future = submit(self, address, function, *arguments)
        if function is worker_task.make_block:
            handed_out.append(address)
            if handed_out.count(address) == 3 and not killed:
                killed.append(self._client.run(os.getpid, workers=[address])[address])
                os.kill(killed[0], signal.SIGKILL)
        return future

    monkeypatch.setattr(Cluster, "submit", submit_and_kill)
    said: list[str] = []
    many = replace(config, out=tmp_path / "many/acts.zarr", workers=2, note_every_s=0.0)
    manys = harvest(many, say=said.append, show_progress=False)
    assert [differing(*each) for each in zip(manys, ones, strict=True)] == [set()] * 4
    assert killed
    assert not is_alive(killed[0])
    assert len([line for line in said if "has died; its " in line]) == 1
    assert said[0].startswith("workers   2 processes of this machine, on cpu; Dask dashboard http")


def test_two_workers_extend_stores_to_the_bytes_of_one_process(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "one/acts.zarr", layers=(0, 1), codec="compact")
    ones = quiet(config)
    shutil.copytree(tmp_path / "one", tmp_path / "many")
    quiet(replace(config, tokens=9000, extend=True))
    many = replace(config, out=tmp_path / "many/acts.zarr", workers=2)
    manys = quiet(replace(many, tokens=9000, extend=True))
    assert [open_store(each).n_rows for each in manys] == [9000] * 2
    assert [differing(*each) for each in zip(manys, ones, strict=True)] == [set()] * 2


LEADING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.harvesting import config_for, quiet
from sae_pipe.stages.cluster import Cluster
from sae_pipe.stages.harvest_workers import _Foreman

if __name__ == "__main__":
    lm, text, out, pids = map(Path, sys.argv[2:])
    done = _Foreman._done

    def done_and_die(self, *arguments):
        done(self, *arguments)
        if self._attempts >= 6:
            running = self._cluster._client.run(os.getpid)
            pids.write_text(" ".join(map(str, running.values())))
            os.kill(os.getpid(), signal.SIGKILL)

    _Foreman._done = done_and_die
    quiet(config_for(lm, text, out, workers=2))
"""


def test_a_killed_leader_takes_its_workers_along_and_one_process_goes_on(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    out, pids = tmp_path / "acts.zarr", tmp_path / "pids"
    script = tmp_path / "lead.py"
    script.write_text(LEADING)
    arguments = map(str, (sys.executable, script, TESTS.parent, lm, text, out, pids))
    done = subprocess.run(list(arguments), check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_alive, workers)), "the workers live on", 20)
    sealed = len(list(out.glob(".commits/*/*.json")))
    assert 0 < sealed < 13
    quiet(config_for(lm, text, out))
    assert differing(out, store) == set()


def broken_model(lm: Path, folder: Path) -> Path:
    """Copied, with an embedding that is NaN."""
    shutil.copytree(lm, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[300] = float("nan")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workers", 0), "--workers is 0, and has to be at least 1."),
        (
            ("--workers", 2, "--scheduler", "tcp://127.0.0.1:9"),
            "--workers starts processes on this machine, and --scheduler takes those of a cluster "
            "that runs already. Pass one of them.",
        ),
        (
            ("--scheduler", "nonsense"),
            "No Dask scheduler answers at nonsense. Start one with `dask scheduler` and pass the "
            "address that it prints, such as tcp://host:8786.",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused(
    lm: Path, text: Path, tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "acts.zarr"
    options = ("--model", lm, "--layer", 1, "--dataset", text, "--out", out)
    assert refused("harvest", *options, *flags) == message
    assert not out.exists()


def test_an_address_without_a_port_is_refused_before_a_client_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distributed.Client", None)  # a half-made one takes 20 s and a traceback
    with (
        pytest.raises(NetworkError, match=r"^No Dask scheduler answers at tcp://host\. "),
        join_cluster("tcp://host", "cpu", print),
    ):
        pass


def test_who_does_the_work_is_no_part_of_the_recipe(lm: Path, text: Path, tmp_path: Path) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr")
    (target,) = targets(config)
    for other in (replace(config, workers=3), replace(config, scheduler="tcp://host:8786")):
        assert request_of(other, target) == request_of(config, target)


def test_memory_is_counted_for_every_worker_of_a_machine(
    lm: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [Host(name="host a", memory_bytes=100_000, workers=2)]
    message = (
        r"^Two blocks for each of 1 layers in each of 2 worker processes need 262 kB of memory, and "
        r"host a has 100 kB\. Pass --block-gb 1\.7e-05 or less, or fewer --layer at once or fewer "
        r"workers\.$"
    )
    monkeypatch.setattr(OneProcess, "hosts", lambda self: hosts)
    with pytest.raises(InputError, match=message):
        quiet(config_for(lm, text, tmp_path / "acts.zarr"))


# --- a cluster that somebody else has started ---


@contextmanager
def dask(*arguments: object, under: Sequence[object] = ()) -> Iterator[int]:
    """A process of the `dask` command line and its id; under: a command that it runs under."""
    command = [*under, sys.executable, "-m", "distributed.cli.dask_" + str(arguments[0])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, [*command, *arguments[1:], "--no-dashboard"])),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def scheduler(folder: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of a scheduler."""
    file = folder / "scheduler.json"
    with dask("scheduler", "--host", "127.0.0.1", "--port", 0, "--scheduler-file", file) as pid:
        wait_until(lambda: file.is_file() and file.read_text(), "the scheduler does not start")
        yield json.loads(file.read_text())["address"], pid


def worker(address: str, **options: Any) -> AbstractContextManager[int]:
    """The process id of a worker with more threads than it may have blocks."""
    return dask("worker", address, "--no-nanny", "--nthreads", 5, **options)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two workers."""
    with (
        scheduler(tmp_path_factory.mktemp("cluster")) as (address, _),
        worker(address),
        worker(address),
        Client(address, set_as_default=False) as client,
    ):
        client.wait_for_workers(2)
        yield address


def test_the_workers_of_a_running_cluster_give_the_same_bytes(
    lm: Path, text: Path, store: Path, tmp_path: Path, two_workers: str
) -> None:
    said: list[str] = []
    config = config_for(lm, text, tmp_path / "acts.zarr", scheduler=two_workers)
    harvest(config, say=said.append, show_progress=False)
    again = replace(config, out=tmp_path / "again/acts.zarr")  # workers that have made another
    quiet(again)
    assert differing(config.out, store) == differing(again.out, store) == set()
    assert said[0].startswith(f"workers   2 processes of the cluster at {two_workers}, on cpu; ")


def test_what_a_worker_meets_reaches_the_user_as_one_sentence(
    lm: Path, text: Path, tmp_path: Path, two_workers: str
) -> None:
    """Through the command line: exit code 2 and no traceback, neither here nor there."""
    code, _, stderr = run(
        *("harvest", "--model", broken_model(lm, tmp_path / "broken"), "--layer", 1),
        *("--dataset", text, "--tokens", 6000, "--heldout-tokens", 300, "--mask-string", " the"),
        *("--device", "cpu", "--out", tmp_path / "acts.zarr", "--scheduler", two_workers),
    )
    assert code == 2
    *bars, sentence = stderr.replace("\r", "\n").strip().split("\n")
    assert all("rows/s" in bar for bar in bars if bar)
    assert re.fullmatch(
        r"Error: The activation of layer 1 at context \d+, position \d+ of the (training|held-out) rows is "
        r"NaN or Inf: it overflows in this number format\. Pass --dtype float32 \(or bfloat16 "
        r"if it was float16\) with another --out\.",
        sentence,
    )


def test_a_worker_that_does_not_see_the_store_is_named(
    lm: Path,
    text: Path,
    store: Path,
    tmp_path: Path,
    two_workers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the start it is an error; one that comes later is left out."""
    hiding = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    if subprocess.run([*hiding, str(tmp_path), "true"], check=False).returncode:
        pytest.skip("only root can hide a folder from a process")
    out = tmp_path / "acts.zarr"
    config = config_for(lm, text, out, scheduler=two_workers)
    message = (
        rf"Worker tcp://127\.0\.0\.1:\d+ on \S+ does not see {out}/manifest\.json as it is here\. "
        r"Pass --out on a file system that all workers share, at the same path\."
    )
    with (
        worker(two_workers, under=[*hiding, tmp_path]) as blind,
        Client(two_workers, set_as_default=False) as client,
    ):
        client.wait_for_workers(3)
        pids = client.run(os.getpid)
        with pytest.raises(StoreError, match=f"^{message}$"):
            quiet(config)
        assert read_manifest(out)["state"] == "harvesting"
        addresses, submit, handed_out = Cluster.addresses, Cluster.submit, list[str]()

        def late(self: Cluster) -> list[str]:
            return [each for each in addresses(self) if handed_out or pids[each] != blind]

        def noted(self: Cluster, address: str, function: Any, *arguments: Any) -> Any:
            if function is worker_task.make_block:
                handed_out.append(address)
            return submit(self, address, function, *arguments)

        hand_out = harvest_workers._Foreman._hand_out

        def no_more_before_it_came(self: Any) -> None:
            if not handed_out or self._left_out:
                hand_out(self)

        client.run(exec, "import sae_pipe.stages.worker_task as t; t._SEEN_WITHIN_S = 0")
        monkeypatch.setattr(harvest_workers._Foreman, "_hand_out", no_more_before_it_came)
        monkeypatch.setattr(Cluster, "addresses", late)
        monkeypatch.setattr(Cluster, "submit", noted)
        said: list[str] = []
        harvest(config, say=said.append, show_progress=False)
    assert differing(out, store) == set()
    assert blind not in {pids[address] for address in handed_out}
    (left_out,) = [line for line in said if line.startswith("A worker is left out: ")]
    assert re.fullmatch(f"A worker is left out: {message}", left_out)


def test_a_lost_scheduler_and_a_second_harvest_are_said_and_the_next_command_goes_on(
    lm: Path, text: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr")
    monkeypatch.setattr("sae_pipe.stages.cluster._CONNECT_S", 2.0)
    with scheduler(tmp_path) as (address, pid), worker(address):
        done: list[object] = []
        happens: list[Callable[[Any], object]] = [
            # What the first block of another harvest does to this one.
            lambda foreman: foreman._cluster._client.run(worker_task.end_run, foreman._spec.run),
            lambda foreman: os.kill(pid, signal.SIGKILL),
        ]
        record_done = harvest_workers._Foreman._done

        def done_and(self: Any, *arguments: Any) -> None:
            record_done(self, *arguments)
            done.append(arguments)
            if len(done) == 3:
                happens[0](self)

        monkeypatch.setattr(harvest_workers._Foreman, "_done", done_and)
        config = replace(config, scheduler=address)
        message = (
            f"^The workers of the cluster at {address} have gone over to another harvest: they make "
            "one at a time. Run the same command again when the other has ended.$"
        )
        with pytest.raises(InputError, match=message):
            quiet(config)
        del happens[0], done[:]
        message = (
            f"^The Dask scheduler of the cluster at {address} does not answer any more. Shards that "
            "are done are kept: start it and run the same command again to go on.$"
        )
        with pytest.raises(NetworkError, match=message):
            quiet(config)
    quiet(replace(config, scheduler=None))
    assert differing(config.out, store) == set()


# --- what is left of a run whose leader is gone ---


def test_a_worker_does_not_write_into_a_store_that_took_the_place_of_its_own(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    digest = rows_digest(read_manifest(store))
    worker_task._check_store(str(store), digest)
    other = tmp_path / "acts.zarr"
    quiet(config_for(lm, text, other, seed=1))
    message = (
        f"^Store {other} was replaced by another while a worker process made rows for it: its "
        "manifest.json is not the one of this harvest. Run the same command again.$"
    )
    with pytest.raises(StoreError, match=message):
        worker_task._check_store(str(other), digest)


def test_a_leftover_worker_that_writes_while_the_store_is_finished_harms_nothing(
    lm: Path, text: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its temporary file is removed under it, and its commit record appears in a finished store."""
    out = tmp_path / "acts.zarr"
    remove = shutil.rmtree

    def with_a_late_record(path: Path, **options: Any) -> None:
        remove(path, **options)
        if path.name == ".commits":
            write_whole(path / "train/00000003.json", b"{}")

    monkeypatch.setattr("sae_pipe.storage.builder.shutil.rmtree", with_a_late_record)
    quiet(config_for(lm, text, out))
    assert open_store(out).digest == open_store(store).digest
    assert quiet(config_for(lm, text, out)) == [out]

    def leave_only_the_name(descriptor: int) -> None:
        (temporary,) = (file for file in tmp_path.iterdir() if is_leftover(file.name))
        remove_leftovers(tmp_path, deep=False)
        assert not temporary.exists()

    monkeypatch.setattr("sae_pipe.storage.files.os.fsync", leave_only_the_name)
    with pytest.raises(DiskError, match="could not be written"):
        write_whole(tmp_path / "shard", b"bytes")
    assert not (tmp_path / "shard").exists()


def test_two_writers_of_one_file_never_share_a_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts may have processes of the same id."""
    names: list[str] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        names.extend(file.name for file in tmp_path.iterdir() if is_leftover(file.name))
        fsync(descriptor)

    monkeypatch.setattr("sae_pipe.storage.files.os.fsync", seen)
    for _ in range(3):
        write_whole(tmp_path / "shard", b"the same bytes")
    assert len(set(names)) == 3
