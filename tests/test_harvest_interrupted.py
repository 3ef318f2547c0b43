"""A harvest that is killed, stopped or run again: the same bytes, nothing lost."""

import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_pipe.stages import harvest_plan, harvest_run
from sae_pipe.stages.backoff import BatchRunner
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.plan import Rates
from sae_pipe.storage import DiskError, InputError, StoreError, open_store
from sae_pipe.storage.lock import sole_writer

from .harvesting import config_for, content, quiet
from .interrupting import run_in_child, run_until


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("note_every_s", [60.0, 0.0], ids=["in-memory", "on-disk"])
def test_killed_at_random_instants_a_harvest_gives_the_bytes_of_one_never_interrupted(
    lm: Path, text: Path, store: Path, tmp_path: Path, note_every_s: float
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", note_every_s=note_every_s)
    code, events = run_in_child(replace(config, out=tmp_path / "elsewhere" / "whole.zarr"))
    assert code == 0
    rng, kills = np.random.default_rng(3), 0
    for number in range(5):
        config = replace(config, out=tmp_path / f"killed{number}" / "acts.zarr")
        # Half of the way at most each time, so that every phase down to the last rename is hit.
        # The first writes of all, one by one, and then anywhere.
        for event in range(1, 9) if number == 0 else ():
            assert run_in_child(config, event)[0] == -signal.SIGKILL
        while (code := run_in_child(config, int(rng.integers(1, events // 2)))[0]) != 0:
            assert code == -signal.SIGKILL
            kills += 1
            assert kills < 60
        expected, found = content(store), content(config.out)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
    assert kills >= 10


# What a harvest comes to, in order: each is a list of writes, the last of which is the moment.
MOMENTS = {
    "beginning": ([r"fsync .*/\.tokenizer\.json"], [r"replace .*\.zarr/manifest\.json"]),
    "tokenising": ([r"fsync .*/cache\.documents"], [r"fsync .*/cache\.tokens"]),
    "assembling the tokens": (
        [r"replace .*building/corpus/train/tokens/c/0"],
        [r"fsync .*building/corpus/zarr\.json"],
        [r"replace .*building/corpus/corpus\.json"],
        [r"replace .*\.zarr/corpus$"],
    ),
    "laying out": (
        [r"replace .*\.zarr/masked/zarr\.json"],
        [r"replace .*\.zarr/zarr\.json"],
        [r"replace .*\.zarr/zarr\.json", r"replace .*\.zarr/manifest\.json"],
    ),
    "sealing a shard": (
        [r"replace .*/heldout/source/c/0"],
        [r"replace .*/\.commits/heldout/0"],
        [r"replace .*\.zarr/source/c/2"],
        [r"replace .*\.zarr/masked/c/4"],
        [r"fsync .*\.zarr/activations/c/6/\.0"],
        [r"replace .*\.zarr/activations/c/8/0"],
        [r"replace .*/\.commits/train/00000010"],
    ),
    "writing the manifest": (
        [r"replace .*/statistics/mean/c/0"],
        [r"replace .*/statistics/variance/c/0"],
        [r"replace .*/statistics/variance/c/0", r"fsync .*\.zarr/\.manifest\.json"],
        [r"replace .*/statistics/variance/c/0", r"replace .*\.zarr/manifest\.json"],
    ),
}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs names of open files")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_killed_at_the_writes_of_every_phase_in_turn_a_harvest_loses_and_repeats_no_row(
    lm: Path, text: Path, store: Path, tmp_path: Path, is_done: bool
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr")
    for phase, moments in MOMENTS.items():
        for moment in moments:
            code = run_until(config, moment, is_done=is_done)
            assert code == -signal.SIGKILL, f"{phase}: {moment} never came"
    if not is_done:
        with pytest.raises(StoreError, match="is not finished"):
            open_store(config.out)
    quiet(config)
    # After the last of these writes the store is complete, and nothing reads the commit records.
    found = {name: data for name, data in content(config.out).items() if ".commits/" not in name}
    assert found == content(store)


def test_a_block_kept_on_disk_goes_on_at_the_context_it_had_reached(
    lm: Path, text: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", note_every_s=0.0)
    monkeypatch.setattr(
        harvest_run, "measure", lambda *_: Rates(tokens_per_s=1000.0, bytes_per_value=1.4)
    )
    seen: list[int] = []
    interrupt_at = 12
    run = BatchRunner.run

    def counting(self: Any, token_ids: torch.Tensor) -> Any:
        seen.append(len(token_ids))
        if len(seen) == interrupt_at:
            raise KeyboardInterrupt
        return run(self, token_ids)

    monkeypatch.setattr(BatchRunner, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        quiet(config)
    before = sum(seen[:-1])
    left = list((config.out / ".block").glob("*.json"))
    assert left
    del seen[:]
    interrupt_at = 10**9
    quiet(config)
    contexts = open_store(config.out).corpus.train.n_contexts
    blocks = 6
    heldout = open_store(config.out).corpus.heldout.n_contexts
    # A context on the border of two blocks runs for both; one batch may have been under way.
    assert before + sum(seen) <= contexts + heldout + blocks + 8
    assert content(config.out)["manifest"] == content(store)["manifest"]


def test_the_same_command_on_a_complete_store_says_so_and_changes_nothing(
    lm: Path, text: Path, store: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.name != ".lock"}
    said: list[str] = []
    harvest(config_for(lm, text, store), say=said.append, show_progress=False)
    assert said == [f"{store} is complete: 6,000 rows of this recipe. Nothing to do."]
    after = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.name != ".lock"}
    assert before == after


def test_another_recipe_on_an_existing_store_shows_the_difference(
    lm: Path, text: Path, store: Path
) -> None:
    message = (
        f"^Store {store} was begun with another recipe: mask_p is 0.3 there and 0.2 here; "
        "seed is 0 there and 1 here. Pass the same flags to go on with it, or another --out.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(config_for(lm, text, store, mask_p=(0.2,), seed=1))


def test_a_second_writer_is_refused_and_a_dead_one_holds_nothing(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr")
    quiet(config)
    (config.out / "manifest.json").write_text(
        (config.out / "manifest.json").read_text().replace('"complete"', '"harvesting"')
    )
    with sole_writer(config.out, "Store"):
        message = r"^Store .*acts.zarr is being written by another process \(pid \d+\)\. Wait"
        with pytest.raises(InputError, match=message):
            quiet(config)


def test_an_unfinished_store_is_not_opened_as_if_it_were_whole(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "acts.zarr"
    shutil.copytree(store, copy)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"complete"', '"harvesting"'))
    message = (
        f"^Store {copy} is not finished: its state is 'harvesting'. Run the `sae-pipe harvest` "
        "command that began it once more; it goes on where it stopped.$"
    )
    with pytest.raises(StoreError, match=message):
        open_store(copy)


def test_a_full_disk_is_said_in_one_sentence_and_the_next_command_goes_on(
    lm: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and subprocess.run(mount, check=False, capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        monkeypatch.setattr(harvest_plan, "free_bytes", lambda path: 10**12)
        config = config_for(lm, text, disk / "acts.zarr", tokens=12_000)
        message = (
            rf"^The disk is full: {disk}/acts\.zarr/.* could not be written\. What is complete is "
            r"kept; free space there and run the same command again to go on\.$"
        )
        with pytest.raises(DiskError, match=message):
            quiet(config)
        sealed = list(disk.glob("acts.zarr/.commits/train/*.json"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        quiet(config)
        assert open_store(config.out).n_rows == 12_000
        assert sealed
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
