"""A harvest into a bucket: sealed shards go as they come, killed and gone on with, manifest last."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.harvest_remote import _Sender, harvest_anywhere, spooled
from sae_pipe.storage import InputError, open_store
from sae_pipe.storage.address import Address
from sae_pipe.storage.files import write_json
from sae_pipe.storage.manifest import COMMITS, HARVESTING
from sae_pipe.storage.pull import pull
from sae_pipe.storage.remote import Link

from .harvesting import config_for, content
from .services import S3

OUT = Address("s3://lab/harvested-there.zarr")
PROGRAM = str(Path(sys.executable).with_name("sae-pipe"))


def test_a_harvest_into_a_bucket_gives_the_bytes_of_one_on_the_disk(
    s3: S3, lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    config = replace(config_for(lm, text, Path("unused")), **spooled(OUT))
    before, said = len(s3.requests("PUT")), list[str]()
    assert harvest_anywhere(config, say=said.append) == [OUT]
    sent = s3.requests("PUT")[before:]
    assert sent[-1] == "harvested-there.zarr/manifest.json"
    assert len(sent) == len(set(sent))
    assert not (tmp_path / "cache/spool").is_dir() or not list((tmp_path / "cache/spool").iterdir())
    pull(OUT, tmp_path / "back.zarr", say=lambda line: None)
    assert content(tmp_path / "back.zarr") == content(store)
    # The same command again finds it there; another recipe is refused.
    said.clear()
    assert harvest_anywhere(config, say=said.append) == [OUT]
    assert said == [f"{OUT} is complete, and of this recipe. Nothing to do."]
    assert len(s3.requests("PUT")) == before + len(sent)
    message = rf"^Store {OUT} was begun with another recipe: seed is 0 there and 5 here\. "
    with pytest.raises(InputError, match=message):
        harvest_anywhere(replace(config, seed=5), say=said.append)


def test_a_harvest_into_a_bucket_that_was_killed_goes_on_without_sending_again(
    s3: S3, lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    out = "s3://lab/killed-there.zarr"
    command = [
        PROGRAM, "harvest", "--model", str(lm), "--layer", "1", "--dataset", str(text),
        "--tokens", "6000", "--heldout-tokens", "300", "--mask-string", " the", "--mask-p", "0.3",
        "--device", "cpu", "--batch-contexts", "8", "--block-gb", "0.001", "--out", out,
    ]  # fmt: skip
    before = len(s3.requests("PUT"))
    harvesting = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    # Shards are sealed in milliseconds here: it is killed while it sends.
    while len(s3.requests("PUT")) < before + 3:
        assert time.monotonic() < until
        time.sleep(0.005)
        if harvesting.poll() is not None:
            break
    harvesting.send_signal(signal.SIGKILL)
    harvesting.wait()
    there = s3.requests("PUT")[before:]
    assert "killed-there.zarr/manifest.json" not in there
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    sent = s3.requests("PUT")[before:]
    assert len(sent) - len(set(sent)) <= 4
    assert sent[-1] == "killed-there.zarr/manifest.json"
    assert open_store(out).n_rows == 6000
    assert CliRunner().invoke(app, ["store", "verify", out]).exit_code == 0


def test_a_harvest_to_where_nothing_can_be_written_does_not_begin(lm: Path, text: Path) -> None:
    command = ["harvest", "--model", str(lm), "--layer", "1", "--dataset", str(text)]
    result = CliRunner().invoke(app, [*command, "--out", "https://host/acts.zarr"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: https://host/acts.zarr cannot be written: a web server")
    result = CliRunner().invoke(app, [*command, "--out", "s3://key:hunter2@lab/acts.zarr"])
    assert result.exit_code == 2
    assert "hunter2" not in result.stderr


def test_shards_are_sent_while_others_are_still_to_be_sealed(
    s3: S3, store: Path, tmp_path: Path
) -> None:
    """A store that is being written, at two instants."""
    spool = Path(shutil.copytree(store, tmp_path / "spool.zarr"))
    manifest = json.loads((spool / "manifest.json").read_text())
    records = {name: manifest[name].pop("shards") for name in ("train", "heldout")}

    def seal(split: str, shard: int) -> None:
        write_json(spool / COMMITS / split / f"{shard:08d}.json", records[split][shard])

    for name in records:
        manifest[name]["shards"] = []
    write_json(spool / "manifest.json", manifest | {"state": HARVESTING})
    seal("train", 0)
    stopped, before, said = threading.Event(), len(s3.requests("PUT")), list[str]()
    sender = _Sender(spool, Link(Address("s3://lab/live.zarr")), stopped)
    thread = threading.Thread(target=sender.run, args=[said.append])
    thread.start()

    def arrived(names: list[str]) -> None:
        until = time.monotonic() + 60
        while sorted(s3.requests("PUT")[before:]) != [f"live.zarr/{name}" for name in names]:
            assert time.monotonic() < until, (s3.requests("PUT")[before:], said)
            time.sleep(0.05)

    first = ["activations/c/0/0", "masked/c/0", "source/c/0"]
    arrived(first)
    seal("train", 1)
    seal("heldout", 0)
    more = ["activations/c/1/0", "masked/c/1", "source/c/1"]
    more += ["heldout/activations/c/0/0", "heldout/source/c/0"]
    arrived(sorted([*first, *more]))
    stopped.set()
    thread.join()
    assert said == []
