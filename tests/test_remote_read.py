"""Stores at an address, read through the cache: real servers, processes of their own, cut wires."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.fit import fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.storage import (
    ActivationStore,
    InputError,
    NetworkError,
    StoreError,
    open_store,
    store_source,
)
from sae_pipe.storage import remote as remote_module
from sae_pipe.storage.remote import Refused

from .services import S3, free_port, web_server, wire_to

ADDRESS = "s3://lab/small.zarr"


@pytest.fixture
def pushed(s3: S3, small_store: ActivationStore) -> str:
    """The small store in the bucket, whole."""
    return s3.put(small_store.path, "small.zarr")


def cached(cache: Path) -> dict[str, int]:
    """Files of the cache by their name below their store, with their sizes."""
    found = {}
    for file in (cache / "stores").glob("*/**/*"):
        with suppress(FileNotFoundError):  # given up meanwhile
            if file.is_file():
                name = "/".join(file.relative_to(cache / "stores").parts[1:])
                found[name] = file.stat().st_size
    return found


def of_shards(names: list[str]) -> list[str]:
    return [name.partition("/")[2] for name in names if "/activations/c/" in name]


def test_a_store_in_a_bucket_reads_as_the_one_on_the_disk(
    pushed: str, small_store: ActivationStore
) -> None:
    store = open_store(pushed)
    assert (store.name, str(store.place), store.digest) == ("small", ADDRESS, small_store.digest)
    rows = [0, 4095, 17, 1024]
    np.testing.assert_array_equal(store.read(rows), small_store.read(rows))
    assert store._train.read_source(rows).tolist() == rows
    np.testing.assert_array_equal(store.masked(rows), small_store.masked(rows))
    np.testing.assert_array_equal(store.heldout.read(3, 9), small_store.heldout.read(3, 9))
    np.testing.assert_array_equal(store.mean, small_store.mean)
    with store.batches(300, seed=4) as far, small_store.batches(300, seed=4) as near:
        for _ in range(30):  # two epochs
            np.testing.assert_array_equal(next(far), next(near))
    store.close()


def test_the_tokens_of_a_store_in_a_bucket_are_those_on_the_disk(s3: S3, store: Path) -> None:
    far, near = open_store(s3.put(store, "harvested.zarr")), open_store(store)
    np.testing.assert_array_equal(far.corpus.train.tokens(3, 40), near.corpus.train.tokens(3, 40))
    np.testing.assert_array_equal(far.corpus.train.rows(0, 9), near.corpus.train.rows(0, 9))
    np.testing.assert_array_equal(
        far.corpus.heldout.origins(0, 5), near.corpus.heldout.origins(0, 5)
    )
    far.corpus.verify()
    assert far.file("tokenizer.json").read_bytes() == (store / "tokenizer.json").read_bytes()


def test_the_second_run_asks_for_the_manifest_alone(
    s3: S3, pushed: str, small_store: ActivationStore
) -> None:
    open_store(pushed).read(slice(None))
    before = len(s3.requests("GET"))
    again = open_store(pushed)
    np.testing.assert_array_equal(again.read(slice(None)), small_store.read(slice(None)))
    assert s3.requests("GET")[before:] == ["small.zarr/manifest.json"]


_READ_ALL = """
import sys
import numpy as np
from sae_pipe.storage import open_store
store = open_store(sys.argv[1])
with store.batches(512) as batches:
    total = sum(int(next(batches).astype(np.int64).sum()) for _ in range(8))
print(total)
"""


def reader_process(address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _READ_ALL, address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_share_a_cache_fetch_each_shard_once(
    s3: S3, pushed: str, small_store: ActivationStore, tmp_path: Path
) -> None:
    before = len(s3.requests("GET"))
    readers = [reader_process(pushed) for _ in range(3)]
    answers = [reader.communicate(timeout=100) for reader in readers]
    assert [error for _, error in answers] == ["", "", ""]
    with small_store.batches(512) as batches:
        total = sum(int(next(batches).astype(np.int64).sum()) for _ in range(8))
    assert [int(answer) for answer, _ in answers] == [total] * 3
    fetched = of_shards(s3.requests("GET")[before:])
    assert sorted(fetched) == [f"activations/c/{shard}/0" for shard in range(4)]
    assert not list((tmp_path / "cache/incoming").iterdir())


def test_the_least_recently_used_shards_make_room_and_none_that_is_read(
    pushed: str,
    small_store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_store(pushed).read(slice(None))
    sizes = cached(tmp_path / "cache")
    shards = [size for name, size in sizes.items() if name.startswith("activations/c/")]
    shutil.rmtree(tmp_path / "cache")
    limit = sizes["manifest.json"] + 2 * max(shards) + 100
    monkeypatch.setenv("SAE_PIPE_CACHE_SIZE", str(limit))
    store = open_store(pushed)
    for shard in (0, 1, 2, 3, 1):
        row = 1024 * shard
        np.testing.assert_array_equal(store.read([row]), small_store.read([row]))
        store._train.close()
        time.sleep(0.01)  # times of use that differ
    there = cached(tmp_path / "cache")
    assert sum(there.values()) <= limit
    names = {name for name in there if name.startswith("activations/c/")}
    assert names == {"activations/c/3/0", "activations/c/1/0"}
    # Another process reads shard 3: what goes is shard 1, which was used after it.
    held = next((tmp_path / "cache/stores").glob("*/activations/c/3/0"))
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        store.read([0])
        store._train.close()
        names = {n for n in cached(tmp_path / "cache") if n.startswith("activations/c/")}
        assert names == {"activations/c/3/0", "activations/c/0/0"}
    message = (
        r"^A fit reads up to 32 shards of s3://lab/small\.zarr side by side, .*, and the cache may "
        r"hold .*\. Pass a larger --cache-size\.$"
    )
    with pytest.raises(InputError, match=message):
        store.batches(64)


def test_a_cache_of_one_group_serves_a_store_of_two(
    s3: S3, make_store: Callable[..., ActivationStore], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows_ND = np.random.default_rng(3).standard_normal((40 * 1024, 4)).astype(np.float32)
    near = make_store(tmp_path / "forty.zarr", rows_ND, rows_ND[:64])
    address = s3.put(near.path, "forty.zarr")
    sizes = [shard["files"]["activations"]["bytes"] for shard in near.manifest["train"]["shards"]]
    limit = 34 * max(sizes) + (near.path / "manifest.json").stat().st_size
    monkeypatch.setenv("SAE_PIPE_CACHE_SIZE", str(limit))
    cache = tmp_path / "cache/stores"
    largest = 0
    with open_store(address).batches(1024) as far, near.batches(1024) as local:
        for number in range(90):  # two epochs and a bit
            np.testing.assert_array_equal(next(far), next(local))
            if number % 10 == 0:
                largest = max(largest, sum(cached(cache.parent).values()))
    assert 32 * min(sizes) < largest <= limit


def test_a_folder_of_other_things_is_no_cache(
    pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine/stores/acts.zarr"
    mine.mkdir(parents=True)
    (mine / "manifest.json").write_text("mine")
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "mine"))
    with pytest.raises(InputError, match=rf"^{tmp_path}/mine is not a cache of sae-pipe\. "):
        open_store(pushed)
    assert [file.name for file in (tmp_path / "mine").rglob("*")] == [
        "stores", "acts.zarr", "manifest.json"
    ]  # fmt: skip


def test_a_killed_download_leaves_nothing_that_counts(
    s3: S3, small_store: ActivationStore, pushed: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with wire_to(s3.port, tmp_path) as wire:
        wire.cut()
        wire.join(bytes_per_s=20_000)  # two seconds a shard
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
        reader = reader_process(pushed)
        incoming, until = tmp_path / "cache/incoming", time.monotonic() + 60
        while not (incoming.is_dir() and any(f.stat().st_size for f in incoming.iterdir())):
            assert time.monotonic() < until
            time.sleep(0.02)
        reader.send_signal(signal.SIGKILL)
        reader.communicate()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    before = cached(tmp_path / "cache")
    assert not any(name.startswith("activations/c/") for name in before)
    assert list(incoming.iterdir())
    store = open_store(pushed)
    np.testing.assert_array_equal(store.read(slice(None)), small_store.read(slice(None)))
    assert not [file for file in incoming.iterdir() if file.stat().st_size]


def test_a_shard_that_was_spoilt_in_the_cache_is_fetched_again(
    s3: S3, pushed: str, small_store: ActivationStore, tmp_path: Path
) -> None:
    open_store(pushed).read(slice(None))
    for name in ("activations/c/2/0", "source/c/1"):
        file = next((tmp_path / "cache/stores").glob(f"*/{name}"), None)
        if file is None:  # sources were not read
            continue
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 4
        file.write_bytes(data)
    before = len(s3.requests("GET"))
    store = open_store(pushed)
    np.testing.assert_array_equal(store.read(slice(None)), small_store.read(slice(None)))
    assert of_shards(s3.requests("GET")[before:]) == ["activations/c/2/0"]


def test_a_shard_with_other_bytes_is_asked_for_twice_and_refused_by_name(
    s3: S3, small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    file = copy / "activations/c/1/0"
    data = bytearray(file.read_bytes())
    data[77] ^= 1
    file.write_bytes(data)
    store, before = open_store(s3.put(copy, "spoilt.zarr")), len(s3.requests("GET"))
    message = (
        r"^s3://lab/spoilt\.zarr/activations/c/1/0 has other bytes than the manifest records, also "
        r"when it is asked for again\. Push or harvest the store again\.$"
    )
    with pytest.raises(Refused, match=message):
        store.read([1500])
    assert len(of_shards(s3.requests("GET")[before:])) == 2
    np.testing.assert_array_equal(store.read([0]), small_store.read([0]))  # the others are whole
    with store.batches(512) as batches, pytest.raises(Refused, match=message):
        list(zip(range(9), batches, strict=False))
    result = CliRunner().invoke(app, ["store", "verify", "s3://lab/spoilt.zarr"])
    assert result.exit_code == 2
    assert "activations/c/1/0  its SHA-256 is not the recorded one" in result.stdout
    assert "1 of " in result.stderr
    s3.client().delete_object(Bucket="lab", Key="spoilt.zarr/activations/c/3/0")
    next((tmp_path / "cache/stores").glob("*/activations/c/3/0")).unlink(missing_ok=True)
    with pytest.raises(Refused, match=r"activations/c/3/0 is missing, also when"):
        store.read([4000])


def test_a_store_that_is_replaced_while_it_is_read_is_told_with_both_digests(
    s3: S3, small_store: ActivationStore, make_store: Callable[..., ActivationStore], tmp_path: Path
) -> None:
    address = s3.put(small_store.path, "changing.zarr")
    store = open_store(address)
    store.read([0])
    rows_ND = small_store.read(slice(0, 4096)) + 1
    other = make_store(tmp_path / "changing.zarr", rows_ND, rows_ND[:512])
    s3.put(other.path, "changing.zarr")
    message = (
        rf"^Store s3://lab/changing\.zarr was replaced while it was read: it had the digest "
        rf"{small_store.digest}, and now has {other.digest}\. "
    )
    with pytest.raises(StoreError, match=message):
        store.read([2000])
    np.testing.assert_array_equal(open_store(address).read([2000]), other.read([2000]))


def test_a_manifest_that_does_not_have_its_digest_is_refused(
    s3: S3, small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["train"]["shards"][0]["files"]["source"]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"^The manifest of s3://lab/forged\.zarr is damaged: "):
        open_store(s3.put(copy, "forged.zarr"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_PATIENCE_S", 0.5)
    monkeypatch.setattr(remote_module, "_FIRST_DELAY_S", 0.1)


@pytest.mark.usefixtures("impatient")
def test_a_fit_survives_a_cut_wire_and_says_so(
    s3: S3, pushed: str, small_store: ActivationStore, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = FitConfig(
        arch="topk",
        k=4,
        d_sae=32,
        batch_size=128,
        tokens=8192,
        heldout_rows=64,
        threads=1,
        device="cpu",
    )
    near = fit(small_store, config, tmp_path / "near", show_progress=False)
    with wire_to(s3.port, tmp_path) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
        store = open_store(pushed)
        wire.cut()
        joined = threading.Timer(2, wire.join)
        joined.start()
        far = fit(store, config, tmp_path / "far", show_progress=True)
        joined.join()
    said = capfd.readouterr().err
    assert "No connection to s3://lab/small.zarr" in said
    assert "s3://lab/small.zarr answers again, after " in said
    assert far.explained_variance == near.explained_variance
    one, other = ((tmp_path / run / "sae.safetensors").read_bytes() for run in ("near", "far"))
    assert one == other
    recorded = json.loads((tmp_path / "far/config.json").read_text())["store"]
    assert (recorded["path"], recorded["digest"]) == (ADDRESS, small_store.digest)


def test_a_signal_ends_a_wait_for_the_network(s3: S3, pushed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with wire_to(s3.port, tmp_path) as wire:
        wire.cut()
        wire.join(bytes_per_s=15_000)  # the shards take some seconds
        command = [
            str(Path(sys.executable).with_name("sae-pipe")), "fit", "--store", pushed, "--l0", "4",
            "--d-sae", "32", "--device", "cpu", "--out", str(run),
        ]  # fmt: skip
        fitting = subprocess.Popen(
            command,
            env=os.environ | {"AWS_ENDPOINT_URL": wire.url},
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 100
        while not (run / "config.json").is_file():
            assert fitting.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(1)
        wire.cut()
        time.sleep(1)
        fitting.send_signal(signal.SIGTERM)
        _, said = fitting.communicate(timeout=60)
    assert fitting.returncode == 128 + signal.SIGTERM, said
    assert "No connection to s3://lab/small.zarr" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("impatient")
def test_what_never_answers_is_given_up_soon(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    message = r"^s3://lab/small\.zarr could not be reached for \d+ s \(EndpointConnectionError: "
    with pytest.raises(NetworkError, match=message):
        open_store(ADDRESS)


def test_an_address_without_a_store_is_one_sentence(s3: S3) -> None:
    for address in ("s3://lab/none.zarr", "s3://no-such-bucket/none.zarr"):
        result = CliRunner().invoke(app, ["store", "info", address])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: There is no store at {address}. Pass the address ")


def test_no_credential_gets_into_a_run_the_cache_or_what_is_printed(
    s3: S3, pushed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        str(Path(sys.executable).with_name("sae-pipe")), "fit", "--store", pushed, "--l0", "4",
        "--d-sae", "32", "--batch-size", "256", "--device", "cpu", "--out", str(run),
        "--cache-dir", str(tmp_path / "mine"), "--cache-size", "1GB",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (run / "sae.safetensors").is_file()
    assert (tmp_path / "mine/CACHEDIR.TAG").is_file()
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for text in [done.stdout, done.stderr, *(f.read_bytes().decode("latin-1") for f in written)]:
        assert secret not in text
        assert os.environ["AWS_ACCESS_KEY_ID"] not in text


# --- over HTTP ---


@pytest.fixture
def served(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port = free_port()

    def serve(**options: Any) -> Any:
        return web_server(small_store.path.parent, port, tmp_path / "web.log", **options)

    serve.address = f"http://127.0.0.1:{port}/{small_store.path.name}"  # type: ignore[attr-defined]
    return serve


@pytest.mark.parametrize("ranges", [True, False])
def test_a_store_on_a_web_server_reads_as_the_one_on_the_disk(
    served: Any, small_store: ActivationStore, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr(store_source, "PART_BYTES", 10_000)  # a shard in several parts
    with served(ranges=ranges):
        store = open_store(served.address)
        np.testing.assert_array_equal(store.read(slice(None)), small_store.read(slice(None)))
        assert store.files.link.has_ranges == ranges  # type: ignore[attr-defined]
        result = CliRunner().invoke(app, ["store", "verify", served.address])
        assert result.exit_code == 0, result.stderr
        assert f"{served.address} is whole: " in result.stdout


def test_a_web_server_that_is_stopped_and_started_is_waited_for(
    served: Any, small_store: ActivationStore, capfd: pytest.CaptureFixture[str]
) -> None:
    with served():
        store = open_store(served.address)
        store.read([0])
    rows: list[Any] = []
    reading = threading.Thread(target=lambda: rows.append(store.read(slice(None))))
    reading.start()
    time.sleep(1)
    with served():
        reading.join()
    np.testing.assert_array_equal(rows[0], small_store.read(slice(None)))
    assert f"{served.address} answers again" in capfd.readouterr().err


def test_what_may_not_be_read_says_what_to_look_at(
    served: Any, small_store: ActivationStore
) -> None:
    with served():
        address = served.address.replace(small_store.path.name, "forbidden/acts.zarr")
        message = re.escape(
            f"{address}/manifest.json may not be read or written with these credentials ("
        )
        with pytest.raises(StoreError, match=f"^{message}.*Forbidden"):
            open_store(address)


def test_only_a_local_store_is_followed_or_repaired(tmp_path: Path) -> None:
    for command, what in (
        (["store", "repair", ADDRESS], "A store is repaired where it stands"),
        (
            ["fit", "--store", ADDRESS, "--l0", "4", "--follow", "--out", str(tmp_path / "run")],
            "A store is followed where it is written",
        ),
    ):
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, result.stderr) == (
            2,
            f"Error: {what}, and {ADDRESS} is an address. Fetch it with `sae-pipe store pull "
            f"{ADDRESS} small.zarr` first.\n",
        )
