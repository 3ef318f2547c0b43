"""Reading a store that is being written: the part that is there, or all of it as it comes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.fit import fit
from sae_pipe.stages.fit_source import open_to_fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.storage import StoreError, open_store
from sae_pipe.storage.files import write_json
from sae_pipe.storage.lock import has_writer, sole_writer
from sae_pipe.storage.manifest import COMMITS
from sae_pipe.storage.order import OPEN_SHARDS
from sae_pipe.storage.unfinished import follow_store

from .harvesting import config_for, quiet

ROWS, SHARD_ROWS = 6000, 128
CONFIG = FitConfig(arch="topk", k=4, d_sae=64, batch_size=256, device="cpu", log_every=5)


@pytest.fixture(scope="module")
def whole(lm: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of 47 shards: more than are mixed at once."""
    out = tmp_path_factory.mktemp("follow") / "acts.zarr"
    quiet(config_for(lm, text, out, shard_rows=SHARD_ROWS, block_bytes=SHARD_ROWS * 8 * 64))
    assert open_store(out)._train.layout.n_shards == 47 > OPEN_SHARDS
    return out


class Growing:
    """A copy of a complete store as it looked while it was written, which grows when told to."""

    def __init__(self, whole: Path, path: Path, shards: int) -> None:
        self.whole, self.path, self.shards = whole, path, 0
        shutil.copytree(
            whole, path, ignore=shutil.ignore_patterns("activations", "source", "masked")
        )
        for name in ("activations", "source"):
            shutil.copytree(whole / "heldout" / name, path / "heldout" / name)
            shutil.copy(whole / name / "zarr.json", self._made(path / name) / "zarr.json")
        shutil.copy(whole / "masked/zarr.json", self._made(path / "masked") / "zarr.json")
        self.manifest = json.loads((whole / "manifest.json").read_text())
        unfinished = json.loads(json.dumps(self.manifest)) | {"state": "harvesting"}
        for split in ("train", "heldout"):
            unfinished[split]["shards"] = []
        for name in ("statistics", "files", "digest", "shuffle"):
            unfinished.pop(name)
        write_json(path / "manifest.json", unfinished)
        for shard, record in enumerate(self.manifest["heldout"]["shards"]):
            write_json(path / COMMITS / "heldout" / f"{shard:08d}.json", record)
        (path / COMMITS / "train").mkdir(parents=True)
        self.grow(shards)

    def _made(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def grow(self, shards: int) -> None:
        for shard in range(self.shards, self.shards + shards):
            for name in (f"activations/c/{shard}/0", f"source/c/{shard}", f"masked/c/{shard}"):
                self._made((self.path / name).parent)
                shutil.copy(self.whole / name, self.path / name)
            record = self.manifest["train"]["shards"][shard]
            write_json(self.path / COMMITS / "train" / f"{shard:08d}.json", record)
        self.shards += shards

    def finish(self) -> None:
        self.grow(47 - self.shards)
        write_json(self.path / "manifest.json", self.manifest)
        shutil.rmtree(self.path / COMMITS)


def weights(run: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in sorted(run.glob("*.safetensors"))}
    assert found
    return found


def test_an_unfinished_store_is_fitted_from_its_sealed_rows_and_the_run_keeps_to_them(
    whole: Path, tmp_path: Path
) -> None:
    growing, run = Growing(whole, tmp_path / "acts.zarr", 12), tmp_path / "run"
    said: list[str] = []
    part = open_to_fit(growing.path, run, follow=False, say=said.append)
    assert part.n_rows == 12 * SHARD_ROWS
    np.testing.assert_array_equal(
        part.read(slice(None)), open_store(whole).read(slice(0, 12 * SHARD_ROWS))
    )
    first = fit(part, CONFIG, run, show_progress=False)
    looked = CliRunner().invoke(app, ["inspect", str(run), "--count", "1"])
    assert "fires on" in looked.stdout
    growing.grow(10)
    again = open_to_fit(growing.path, run, follow=False, say=said.append)
    assert fit(again, CONFIG, run, show_progress=False) == first
    growing.finish()
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "summary.json").unlink()  # as if it had been killed before its end
    late = open_to_fit(growing.path, other, follow=False, say=said.append)
    assert fit(late, CONFIG, other, show_progress=False).explained_variance == (
        first.explained_variance
    )
    assert weights(other) == weights(run)
    rows = "its first 1,536 rows, 12 of 47 shards"
    assert said == [
        f"{growing.path} is unfinished: fitting from {rows}.",
        f"{growing.path} is unfinished: going on with {rows} that it was begun with.",
        f"{growing.path} is complete by now: going on with {rows} that it was begun with.",
    ]
    assert open_to_fit(growing.path, tmp_path / "new", follow=False, say=said.append).n_rows == ROWS


def test_the_first_batches_come_before_the_last_shards_are_there(
    whole: Path, tmp_path: Path
) -> None:
    growing = Growing(whole, tmp_path / "acts.zarr", OPEN_SHARDS)
    with follow_store(growing.path).batches(256) as loader:
        early = loader.to_floats(next(loader)).copy()
    with follow_store(whole).batches(256) as loader:
        np.testing.assert_array_equal(early, loader.to_floats(next(loader)))


def test_the_weights_are_the_same_whether_the_harvest_was_behind_or_long_finished(
    whole: Path, tmp_path: Path
) -> None:
    fit(follow_store(whole), CONFIG, tmp_path / "after", show_progress=False)
    growing = Growing(whole, tmp_path / "acts.zarr", 3)

    def write() -> None:
        for _ in range(11):
            time.sleep(0.1)
            growing.grow(4)
        growing.finish()

    with sole_writer(growing.path, "Store"):
        writer = threading.Thread(target=write)
        writer.start()
        fit(follow_store(growing.path), CONFIG, tmp_path / "during", show_progress=False)
        writer.join()
    assert weights(tmp_path / "during") == weights(tmp_path / "after")


FITTING = """
import sys
from sae_pipe.pipeline.cli import main
sys.argv = ["sae-pipe", *sys.argv[1:]]
main()
"""


def command(store: Path, run: Path) -> list[str]:
    flags = (
        f"fit --store {store} --arch topk --l0 4 --d-sae 64 --batch-size 256 --device cpu --follow"
    )
    return [sys.executable, "-c", FITTING, *flags.split(), "--out", str(run)]


def test_a_fit_that_waits_says_so_and_stops_on_a_signal_to_go_on_later(
    whole: Path, tmp_path: Path
) -> None:
    growing, run = Growing(whole, tmp_path / "acts.zarr", OPEN_SHARDS), tmp_path / "run"
    lines: list[str] = []
    with subprocess.Popen(command(growing.path, run), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "Waiting for training shard" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    text = "".join(lines)
    assert re.search(
        rf"Waiting for training shard \d+ of {growing.path}\. No process is writing it: run the "
        r"`sae-pipe harvest` command that began it once more\.",
        text,
    )
    growing.finish()
    expected = tmp_path / "expected"
    for store, out in ((growing.path, run), (whole, expected)):
        subprocess.run(command(store, out), check=True, capture_output=True, timeout=120)
    assert weights(run) == weights(expected)


def test_a_store_without_a_sealed_shard_cannot_be_fitted_yet(whole: Path, tmp_path: Path) -> None:
    growing = Growing(whole, tmp_path / "acts.zarr", 0)
    message = (
        f"^Store {growing.path} has no sealed shard yet. Wait for the first one, or pass --follow "
        "to `sae-pipe fit`.$"
    )
    with pytest.raises(StoreError, match=message):
        open_store(growing.path, unfinished=True)


def test_a_store_begun_anew_while_it_is_followed_is_refused(whole: Path, tmp_path: Path) -> None:
    growing = Growing(whole, tmp_path / "acts.zarr", 2)
    store = follow_store(growing.path)
    manifest = json.loads((growing.path / "manifest.json").read_text())
    manifest["recipe"]["seed"] = 7
    write_json(growing.path / "manifest.json", manifest)
    message = (
        f"^Store {growing.path} was begun anew with another recipe while it was followed. "
        "Pass another --out to fit from it.$"
    )
    with pytest.raises(StoreError, match=message):
        store.read(slice(300, 310))


def test_a_damaged_shard_is_named_while_a_store_is_followed(whole: Path, tmp_path: Path) -> None:
    growing = Growing(whole, tmp_path / "acts.zarr", 3)
    file = growing.path / "activations/c/1/0"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        StoreError, match=r"^Shard 1 of .*acts\.zarr is damaged: activations/c/1/0: it"
    ):
        follow_store(growing.path).read(slice(SHARD_ROWS, SHARD_ROWS + 5))


def test_a_store_whose_tokens_are_being_made_is_waited_for_or_refused(
    whole: Path, tmp_path: Path
) -> None:
    growing, said = Growing(whole, tmp_path / "acts.zarr", 2), list[str]()
    harvesting = json.loads((growing.path / "manifest.json").read_text())
    write_json(growing.path / "manifest.json", harvesting | {"state": "tokenising"})
    message = (
        f"^Store {growing.path} has no rows yet: its tokens are being made. Wait for its first "
        "shard, or pass --follow to `sae-pipe fit`.$"
    )
    with pytest.raises(StoreError, match=message):
        open_store(growing.path, unfinished=True)
    later = threading.Timer(0.2, write_json, (growing.path / "manifest.json", harvesting))
    later.start()
    assert follow_store(growing.path, said.append).n_rows == ROWS
    later.join()
    assert said == [
        f"Waiting for the tokens of {growing.path}. No process is writing it: run the `sae-pipe "
        "harvest` command that began it once more."
    ]


def test_a_wait_for_the_very_first_shard_is_spoken_of(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_pipe.storage.unfinished._FIRST_WORD_S", 0.0)
    growing, said = Growing(whole, tmp_path / "acts.zarr", 0), list[str]()
    store = follow_store(growing.path, said.append)
    later = threading.Timer(1.0, growing.grow, (1,))
    later.start()
    assert store.mean_squared_norm > 0  # what a fit asks for before it has a trainer
    later.join()
    assert said == [
        f"Waiting for training shard 0 of {growing.path}. No process is writing it: run the "
        "`sae-pipe harvest` command that began it once more."
    ]


def test_looking_for_a_writer_turns_none_away(tmp_path: Path) -> None:
    assert has_writer(tmp_path / "none") is False
    looking, stop = list[bool | None](), threading.Event()

    def look() -> None:
        while not stop.is_set():
            looking.append(has_writer(tmp_path / "store"))
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(50):
            with sole_writer(tmp_path / "store", "Store"):
                time.sleep(0.002)
            time.sleep(0.002)
    finally:
        stop.set()
        watcher.join()
    assert {True, False} <= set(looking)


def test_statistics_of_an_unfinished_store_are_refused_and_its_norm_is_that_of_its_first_shard(
    whole: Path, tmp_path: Path
) -> None:
    growing = Growing(whole, tmp_path / "acts.zarr", 3)
    shutil.rmtree(growing.path / "statistics")
    rows = open_store(whole).read(slice(0, SHARD_ROWS)).astype(np.float64)
    for store in (open_store(growing.path, unfinished=True), follow_store(growing.path)):
        assert store.mean_squared_norm == pytest.approx((rows**2).sum(axis=1).mean(), rel=1e-6)
        message = (
            f"^Store {growing.path} is unfinished: the statistics of its rows are written when it "
            "is complete. Open it again then.$"
        )
        with pytest.raises(StoreError, match=message):
            assert store.mean is None
