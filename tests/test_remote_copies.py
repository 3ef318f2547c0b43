"""push and pull: whole or not there, killed and gone on with, nothing sent twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.pipeline.cli_store_transfer import whole_rows
from sae_pipe.storage import ActivationStore, InputError, StoreError, open_store
from sae_pipe.storage.address import place
from sae_pipe.storage.hub_commits import in_commits
from sae_pipe.storage.pull import Part, pull
from sae_pipe.storage.push import push
from sae_pipe.storage.statistics import Moments

from .services import S3, web_server, wire_to

PROGRAM = str(Path(sys.executable).with_name("sae-pipe"))


def files_of(store: Path) -> dict[str, bytes]:
    return {
        file.relative_to(store).as_posix(): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def in_bucket(s3: S3, name: str) -> dict[str, bytes]:
    client = s3.client()
    listed = client.list_objects_v2(Bucket="lab", Prefix=f"{name}/").get("Contents", [])
    found = {
        entry["Key"].removeprefix(f"{name}/"): client.get_object(Bucket="lab", Key=entry["Key"])[
            "Body"
        ].read()
        for entry in listed
    }
    client.close()
    return found


def quiet_push(store: Path, address: str) -> list[str]:
    said: list[str] = []
    where = place(address)
    assert not isinstance(where, Path)
    push(store, where, say=said.append)
    return said


def test_a_store_comes_back_from_a_bucket_byte_for_byte(
    s3: S3, store: Path, tmp_path: Path
) -> None:
    before = len(s3.requests("PUT"))
    [said] = quiet_push(store, "s3://lab/there.zarr")
    assert re.fullmatch(r"s3://lab/there\.zarr is complete: \d+ files, [^;]* sent\.", said)
    assert in_bucket(s3, "there.zarr") == files_of(store)
    sent = s3.requests("PUT")[before:]
    assert sent[-1] == "there.zarr/manifest.json"
    assert len(sent) == len(set(sent)) == len(files_of(store))
    pull(place("s3://lab/there.zarr"), tmp_path / "back.zarr", say=lambda line: None)
    assert files_of(tmp_path / "back.zarr") == files_of(store)
    assert open_store(tmp_path / "back.zarr").digest == open_store(store).digest


def test_a_second_push_sends_only_what_is_missing(s3: S3, small_store: ActivationStore) -> None:
    quiet_push(small_store.path, "s3://lab/twice.zarr")
    before = len(s3.requests("PUT"))
    [said] = quiet_push(small_store.path, "s3://lab/twice.zarr")
    assert said.endswith(" files, as here. Nothing to do.")
    assert len(s3.requests("PUT")) == before
    client = s3.client()
    client.delete_object(Bucket="lab", Key="twice.zarr/activations/c/2/0")
    client.put_object(Bucket="lab", Key="twice.zarr/source/c/1", Body=b"short")
    client.close()
    quiet_push(small_store.path, "s3://lab/twice.zarr")
    assert sorted(s3.requests("PUT")[before:]) == [
        "twice.zarr/activations/c/2/0",
        "twice.zarr/manifest.json",
        "twice.zarr/source/c/1",
        "twice.zarr/source/c/1",  # that of this test
    ]
    assert in_bucket(s3, "twice.zarr") == files_of(small_store.path)


def test_a_push_that_was_killed_goes_on_and_sends_each_file_once(
    s3: S3, small_store: ActivationStore, tmp_path: Path
) -> None:
    before = len(s3.requests("PUT"))
    command = [PROGRAM, "store", "push", str(small_store.path), "s3://lab/killed.zarr"]
    with wire_to(s3.port, tmp_path) as wire:
        environment = os.environ | {"AWS_ENDPOINT_URL": wire.url}
        pushing = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while len(s3.requests("PUT")) < before + 12:
            assert time.monotonic() < until
            assert pushing.poll() is None
            time.sleep(0.005)
        pushing.send_signal(signal.SIGKILL)
        pushing.wait()
    there = s3.requests("PUT")[before:]
    assert 12 <= len(there) < len(files_of(small_store.path))
    assert "killed.zarr/manifest.json" not in there
    with pytest.raises(StoreError, match=r"^There is no store at s3://lab/killed\.zarr\. "):
        open_store("s3://lab/killed.zarr")
    [said] = quiet_push(small_store.path, "s3://lab/killed.zarr")
    assert "were there already" in said
    sent = s3.requests("PUT")[before:]
    # Four are on their way at a time: their arrival may not have been noted.
    assert len(sent) - len(set(sent)) <= 4
    assert in_bucket(s3, "killed.zarr") == files_of(small_store.path)
    np.testing.assert_array_equal(
        open_store("s3://lab/killed.zarr").read([7, 4000]), small_store.read([7, 4000])
    )


def test_what_somebody_else_has_put_there_is_not_taken_for_what_was_sent(
    s3: S3, small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    (copy / "heldout/source/c/0").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="does not have its recorded digest, so it was not sent"):
        quiet_push(copy, "s3://lab/mixed.zarr")
    other = in_bucket(s3, "mixed.zarr")
    shard = other["activations/c/0/0"]
    assert "manifest.json" not in other
    client = s3.client()
    client.put_object(
        Bucket="lab", Key="mixed.zarr/activations/c/0/0", Body=bytes(len(shard))
    )  # of the same size
    client.close()
    quiet_push(small_store.path, "s3://lab/mixed.zarr")
    assert in_bucket(s3, "mixed.zarr") == files_of(small_store.path)


def test_a_push_survives_a_cut_wire(
    s3: S3, small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wire_to(s3.port, tmp_path) as wire:
        wire.cut()
        wire.join(dies_after=60_000)
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
        command = [PROGRAM, "store", "push", str(small_store.path), "s3://lab/cut.zarr"]
        pushing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wire.wait_until_it_dies()
        time.sleep(1)
        assert pushing.poll() is None
        wire.join()
        _, said = pushing.communicate(timeout=100)
    assert pushing.returncode == 0, said
    assert "No connection to s3://lab/cut.zarr" in said
    assert in_bucket(s3, "cut.zarr") == files_of(small_store.path)


def test_ctrl_c_ends_a_pull_that_waits_for_the_network(
    s3: S3, small_store: ActivationStore, tmp_path: Path
) -> None:
    address = s3.put(small_store.path, "interrupted.zarr")
    with wire_to(s3.port, tmp_path) as wire:
        wire.cut()
        wire.join(bytes_per_s=20_000)
        pulling = subprocess.Popen(
            [PROGRAM, "store", "pull", address, str(tmp_path / "back.zarr")],
            env=os.environ | {"AWS_ENDPOINT_URL": wire.url},
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 60
        while not list((tmp_path / "back.zarr").glob("activations/c/*/.*.tmp")):
            assert time.monotonic() < until
            time.sleep(0.01)
        wire.cut()
        time.sleep(1)
        pulling.send_signal(signal.SIGINT)
        _, said = pulling.communicate(timeout=60)
    assert pulling.returncode == 130, said
    assert said.splitlines()[-1].startswith("Interrupted. What is done is kept")
    pull(place(address), tmp_path / "back.zarr", say=lambda line: None)
    assert files_of(tmp_path / "back.zarr") == files_of(small_store.path)


def test_another_store_is_never_written_over(
    s3: S3, small_store: ActivationStore, store: Path, tmp_path: Path
) -> None:
    quiet_push(small_store.path, "s3://lab/taken.zarr")
    digest = open_store(store).digest
    message = (
        rf"^s3://lab/taken\.zarr holds another store, with the digest {small_store.digest}; that "
        rf"of {store} is {digest}\. Push to another address, or remove what is there first\.$"
    )
    with pytest.raises(InputError, match=message):
        quiet_push(store, "s3://lab/taken.zarr")
    shutil.copytree(store, tmp_path / "mine.zarr")
    with pytest.raises(InputError, match=rf"^{tmp_path}/mine\.zarr holds another store, with the"):
        pull(place("s3://lab/taken.zarr"), tmp_path / "mine.zarr")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/love.txt").write_text("dear")
    with pytest.raises(InputError, match=r"letters exists and is not what a pull of s3://"):
        pull(place("s3://lab/taken.zarr"), tmp_path / "letters")
    assert (tmp_path / "letters/love.txt").read_text() == "dear"


def test_where_nothing_can_be_written_is_told_before_anything_is_read(
    s3: S3, small_store: ActivationStore
) -> None:
    with pytest.raises(InputError, match=r"^https://host/a\.zarr cannot be written: a web server"):
        quiet_push(small_store.path, "https://host/a.zarr")
    with pytest.raises(StoreError, match=r"^s3://no-bucket/a\.zarr cannot be written: there is no"):
        quiet_push(small_store.path, "s3://no-bucket/a.zarr")


@pytest.mark.parametrize("target", ["copy.zarr", "s3://lab/acts.zarr"])
def test_only_a_repository_of_the_hub_is_made_private(
    small_store: ActivationStore, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["store", "push", str(small_store.path), target, "--private"])
    assert (result.exit_code, result.stderr) == (
        2,
        f"Error: --private is for a repository of the Hub, and DST is {target}. Leave it out: who may "
        "read there is set at the service itself.\n",
    )
    assert not list(tmp_path.iterdir())


def test_a_pull_that_was_killed_goes_on_with_what_is_there(
    s3: S3, small_store: ActivationStore, tmp_path: Path
) -> None:
    address, back = s3.put(small_store.path, "far.zarr"), tmp_path / "back.zarr"
    with wire_to(s3.port, tmp_path) as wire:
        wire.cut()
        wire.join(bytes_per_s=100_000)
        environment = os.environ | {"AWS_ENDPOINT_URL": wire.url}
        pulling = subprocess.Popen(
            [PROGRAM, "store", "pull", address, str(back)],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 60
        while not list(back.glob("activations/c/*/0")):
            assert time.monotonic() < until
            assert pulling.poll() is None
            time.sleep(0.005)
        pulling.send_signal(signal.SIGKILL)
        pulling.wait()
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        open_store(back)
    whole = {f.relative_to(back).as_posix() for f in back.glob("activations/c/*/0")}
    before = len(s3.requests("GET"))
    pull(place(address), back, say=lambda line: None)
    fetched = {name.removeprefix("far.zarr/") for name in s3.requests("GET")[before:]}
    assert not fetched & whole
    assert files_of(back) == files_of(small_store.path)


@pytest.mark.parametrize("codec", ["lossless", "compact"])
def test_a_part_is_a_whole_store_of_its_first_shards(
    s3: S3, store: Path, tmp_path: Path, codec: str
) -> None:
    given = store
    if codec == "compact":
        from sae_pipe.storage.recode import recode

        given = tmp_path / "compact.zarr"
        recode(store, given, "compact", say=lambda line: None)
    whole = open_store(given)
    address = s3.put(given, f"{codec}.zarr")
    result = CliRunner().invoke(
        app, ["store", "pull", address, str(tmp_path / "part.zarr"), "--rows", "1.1k"]
    )
    assert result.exit_code == 0, result.stderr
    assert f"1,536 of {whole.n_rows:,} training" in result.stdout
    part = open_store(tmp_path / "part.zarr")
    assert (part.n_rows, part.heldout.n_rows) == (1536, whole.heldout.n_rows)  # three shards
    np.testing.assert_array_equal(part.read(slice(None)), whole.read(slice(1536)))
    for one, other in zip(part.source(slice(None)), whole.source(slice(1536)), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = part.read(slice(None)).astype(np.float64)
    np.testing.assert_allclose(part.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(part.variance, rows.var(0), rtol=1e-5)
    np.testing.assert_allclose(part.mean_squared_norm, (rows**2).sum(1).mean(), rtol=1e-6)
    assert part.manifest["provenance"]["sampled"] == {
        "store": f"{codec}.zarr",
        "digest": whole.digest,
        "rows": whole.n_rows,
    }
    assert part.digest != whole.digest
    for command in (["verify"], ["verify", "--shuffle"], ["info"]):
        done = CliRunner().invoke(app, ["store", *command, str(part.path)])
        assert done.exit_code == 0, done.stderr
    # The same again has nothing to do; another size is another store.
    said: list[str] = []
    pull(place(address), part.path, Part(fraction=1536 / whole.n_rows), say=said.append)
    assert said == [f"{part.path} is complete: it is what {address} holds. Nothing to do."]
    with pytest.raises(InputError, match=r"part\.zarr holds another store"):
        pull(place(address), part.path, Part(rows=3000))
    with part.batches(128) as batches:
        assert next(batches).shape == (128, whole.d_in)


@pytest.mark.parametrize("provenance", [None, [], ["recoded"]])
def test_a_part_of_a_store_that_does_not_say_how_it_was_made_is_one(
    small_store: ActivationStore, tmp_path: Path, provenance: object
) -> None:
    """Nothing that reads rows needs that, so a manifest may say anything."""
    store = Path(shutil.copytree(small_store.path, tmp_path / "acts.zarr"))
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["provenance"]
    if provenance is not None:
        manifest["provenance"] = provenance
    (store / "manifest.json").write_text(json.dumps(manifest))
    pull(store, tmp_path / "p.zarr", Part(rows=10), say=lambda line: None)
    made = open_store(tmp_path / "p.zarr").manifest["provenance"]
    assert made.keys() == {"sampled"}
    assert made["sampled"]["digest"] == small_store.digest


def test_a_part_is_as_fair_a_sample_as_its_rows_are_many(
    s3: S3, store: Path, tmp_path: Path
) -> None:
    whole = open_store(store)
    pull(
        place(s3.put(store, "fair.zarr")),
        tmp_path / "p.zarr",
        Part(fraction=0.25),
        say=lambda line: None,
    )
    part = open_store(tmp_path / "p.zarr")
    error = np.sqrt(whole.variance / part.n_rows)
    assert np.abs((part.mean - whole.mean) / error).mean() < 2
    assert Moments.of(part.read(slice(None))).count == part.n_rows


def test_a_part_that_cannot_be_is_refused() -> None:
    for given, message in (
        ({"rows": 0}, r"^--rows is 0, and has to be at least 1\.$"),
        ({"fraction": 1.5}, r"^--fraction is 1\.5, and has to be above 0 and at most 1"),
        ({"fraction": float("nan")}, "^--fraction is nan"),
        ({"rows": 5, "fraction": 0.1}, "^--rows and --fraction both say how much"),
    ):
        with pytest.raises(InputError, match=message):
            Part(**given)
    assert [whole_rows(t) for t in ("50M", "1.5k", "7_000", "2B")] == [
        50_000_000, 1500, 7000, 2_000_000_000
    ]  # fmt: skip
    for text in ("many", "-5", "1e6", ""):
        with pytest.raises(InputError, match=f"^--rows is {text!r}, and has to be a number"):
            whole_rows(text)


def test_a_store_is_pulled_from_a_web_server_and_copied_on_the_disk(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    from .services import free_port

    port = free_port()
    with web_server(small_store.path.parent, port, tmp_path / "web.log"):
        address = place(f"http://127.0.0.1:{port}/{small_store.path.name}")
        pull(address, tmp_path / "web.zarr", say=lambda line: None)
    assert files_of(tmp_path / "web.zarr") == files_of(small_store.path)
    again = f"file://{tmp_path}/copy.zarr"
    result = CliRunner().invoke(app, ["store", "push", str(tmp_path / "web.zarr"), again])
    assert result.exit_code == 0, result.stderr
    assert files_of(tmp_path / "copy.zarr") == files_of(small_store.path)


def test_all_other_commands_take_an_address(s3: S3, store: Path, tmp_path: Path) -> None:
    address, run = s3.put(store, "given.zarr"), str(tmp_path / "run")
    small = ["--l0", "4", "--d-sae", "48", "--batch-size", "512", "--device", "cpu"]
    for command in (
        ["fit", "--store", address, *small, "--out", run],
        ["inspect", run, "--count", "1"],
        ["eval", run, "--out", str(tmp_path / "results"), "--metrics", "explained_variance,l0"],
        ["eval", run, "--out", str(tmp_path / "named"), "--metrics", "l0", "--store", address],
        ["store", "recode", address, str(tmp_path / "copy.zarr"), "--codec", "none"],
        ["store", "export", address, str(tmp_path / "npy"), "--format", "numpy"],
        ["store", "info", address],
        ["store", "verify", "--shuffle", address],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.stderr
    copy, given = open_store(tmp_path / "copy.zarr"), open_store(store)
    np.testing.assert_array_equal(copy.read(slice(None)), given.read(slice(None)))
    assert copy.manifest["provenance"]["recoded"]["store"] == "given.zarr"
    notes = json.loads((tmp_path / "npy/export.json").read_text())
    assert notes["digest"] == given.digest


def test_commits_hold_several_files_and_none_is_left_out() -> None:
    sizes = [
        (name, size)
        for name, size in zip("abcdefg", [1, 2, 3, 1_999_999_999, 5, 6, 7], strict=True)
    ]
    groups = list(in_commits(sizes))
    assert groups == [["a", "b", "c"], ["d"], ["e", "f", "g"]]
    assert [len(group) for group in in_commits([(i, 1) for i in range(130)])] == [64, 64, 2]
