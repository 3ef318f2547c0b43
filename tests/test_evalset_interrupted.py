"""An evaluation set that is killed, stopped or built again: the same bytes, nothing half-written."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_pipe.stages.backoff import TOKENS_PER_BATCH, BatchRunner
from sae_pipe.stages.evalsets import build as building
from sae_pipe.stages.evalsets import forward
from sae_pipe.stages.evalsets.forward import batches, blocks
from sae_pipe.stages.hooks import HookedModel
from sae_pipe.storage import DiskError, InputError, NonFiniteError, StoreError
from sae_pipe.storage.evalset import EvalSet, open_evalset
from sae_pipe.storage.lock import sole_writer

from .evaluating import content, quiet, said, sentences, write_csv

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of about 20 texts and chunks of 16 rows, so that a small set has many of both."""
    monkeypatch.setattr(forward, "BLOCK_TOKENS", 400)
    monkeypatch.setattr(building, "_CHUNK_TOKENS", 1)
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 64)


@pytest.fixture
def flags(lm: Path, tmp_path: Path) -> dict[str, Any]:
    """A set of 120 texts; `mean` gives each several rows, which chunks cut through."""
    rows = [[text, "ab"[i % 2]] for i, text in enumerate(sentences(120))]
    table = write_csv(tmp_path / "texts.csv", ["prompt", "y"], rows)
    return {
        "model": str(lm),
        "suite": "csv",
        "csv": table,
        "text_column": "prompt",
        "label_column": "y",
        "position": "mean",
    }


@pytest.fixture
def whole(flags: dict[str, Any], tmp_path: Path) -> EvalSet:
    """The set, never interrupted."""
    return quiet(**flags, out=tmp_path / "whole" / "set.zarr")


def _build_in_child(flags: dict[str, Any], die_at: int | None, events: Any) -> None:
    """Build, and die by SIGKILL just before the given event: a sync, rename or batch."""

    def counted(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            events.value += 1
            if events.value == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    torch.set_num_threads(1)
    for name in ("replace", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    BatchRunner._try = counted(BatchRunner._try)  # type: ignore[method-assign]
    quiet(**flags)


def run_in_child(flags: dict[str, Any], die_at: int | None = None) -> tuple[int | None, int]:
    """Exit code of a build in a process of its own, and how many events it came to."""
    context = multiprocessing.get_context("fork")
    events = context.Value("q", 0, lock=False)
    process = context.Process(target=_build_in_child, args=(flags, die_at, events))
    process.start()
    process.join()
    return process.exitcode, events.value


def test_killed_at_random_instants_a_build_gives_the_bytes_of_one_never_interrupted(
    flags: dict[str, Any], whole: EvalSet, tmp_path: Path
) -> None:
    expected = content(whole.path)
    assert len(list(whole.path.glob("activations/c/*/0"))) > 40
    code, events = run_in_child(flags | {"out": tmp_path / "child" / "set.zarr"})
    assert code == 0
    rng, kills = np.random.default_rng(3), 0
    for number in range(3):
        own = flags | {"out": tmp_path / f"killed{number}" / "set.zarr"}
        while (code := run_in_child(own, int(rng.integers(1, events // 2)))[0]) != 0:
            assert code == -signal.SIGKILL
            kills += 1
            assert kills < 40
        found = content(own["out"])
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
    assert kills >= 5


def test_a_build_that_goes_on_runs_no_text_of_a_finished_block_again(
    flags: dict[str, Any], whole: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags | {"out": tmp_path / "set.zarr"}
    seen: list[int] = []
    run = BatchRunner.run
    interrupt_at = 25

    def counting(self: Any, token_ids: torch.Tensor) -> Any:
        seen.append(len(token_ids))
        if len(seen) == interrupt_at:
            raise KeyboardInterrupt
        return run(self, token_ids)

    monkeypatch.setattr(BatchRunner, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        quiet(**flags)
    before = sum(seen[:-1])
    del seen[:]
    interrupt_at = 10**9
    quiet(**flags)
    assert before + sum(seen) <= 120 + 2 * 25  # a block was under way, one held a cut chunk
    assert content(flags["out"]) == content(whole.path)


def test_a_complete_set_is_left_alone(whole: EvalSet, flags: dict[str, Any]) -> None:
    before = {f: f.stat().st_mtime_ns for f in whole.path.rglob("*") if f.name != ".lock"}
    lines = said(**flags, out=whole.path)
    assert lines == [f"{whole.path} is complete: 120 items of this recipe. Nothing to do."]
    after = {f: f.stat().st_mtime_ns for f in whole.path.rglob("*") if f.name != ".lock"}
    assert before == after


def test_other_flags_and_an_edited_file_are_not_taken_for_the_same(
    whole: EvalSet, flags: dict[str, Any]
) -> None:
    end = r"\. Pass the same flags to go on with it, or another --out\.$"
    begin = f"^Evaluation set {whole.path} was begun with another recipe: "
    with pytest.raises(
        InputError, match=f"{begin}layer is 1 there and 2 here; seed is 0 there and 1 here{end}"
    ):
        quiet(**flags, out=whole.path, layer=2, seed=1)
    flags["csv"].write_text(flags["csv"].read_text() + "one more,a\r\n")
    with pytest.raises(InputError, match=f"{begin}csv_sha256 is .* there and .* here{end}"):
        quiet(**flags, out=whole.path)


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(
    flags: dict[str, Any], whole: EvalSet
) -> None:
    manifest = whole.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"building"'))
    with sole_writer(whole.path, "Evaluation set"):
        message = (
            rf"^Evaluation set {whole.path} is being written by another process \(pid \d+\)\. Wait"
        )
        with pytest.raises(InputError, match=message):
            quiet(**flags, out=whole.path)
    assert quiet(**flags, out=whole.path).digest == whole.digest


def test_something_else_at_the_place_is_left_as_it_is(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    message = f"^{other} exists and is not an evaluation set. Pass another --out, or move it away.$"
    with pytest.raises(InputError, match=message):
        quiet(**flags, out=other)
    assert (other / "thesis.txt").read_text() == "years"


def test_a_full_disk_is_said_in_one_sentence_and_the_next_command_goes_on(
    flags: dict[str, Any], whole: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and subprocess.run(mount, check=False, capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        flags = flags | {"out": disk / "set.zarr"}
        with pytest.raises(DiskError, match=f"^The disk is too small: {disk}/set.zarr needs about"):
            quiet(**flags)
        monkeypatch.setattr(building, "check_room", lambda path, needed: None)
        message = (
            rf"^The disk is full: {disk}/set\.zarr/.* could not be written\. What is complete is "
            r"kept; free space there and run the same command again to go on\.$"
        )
        with pytest.raises(DiskError, match=message):
            quiet(**flags)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        quiet(**flags)
        assert content(flags["out"]) == content(whole.path)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_memory_that_runs_out_halves_the_batch_and_the_rows_stay_the_same(
    flags: dict[str, Any], whole: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 400)
    sizes: list[int] = []
    activations = HookedModel.activations

    def limited(self: Any, token_ids: torch.Tensor) -> Any:
        sizes.append(token_ids.numel())
        if token_ids.numel() > 100:
            raise torch.OutOfMemoryError("out of memory")
        return activations(self, token_ids)

    monkeypatch.setattr(HookedModel, "activations", limited)
    found = quiet(**flags, out=tmp_path / "set.zarr")
    np.testing.assert_allclose(
        found.read(0, found.n_rows), whole.read(0, whole.n_rows), rtol=1e-4, atol=1e-5
    )
    assert sum(size > 100 for size in sizes) <= 4  # not once a batch


def test_an_activation_that_overflows_is_named(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    activations = HookedModel.activations

    def overflowing(self: Any, token_ids: torch.Tensor) -> Any:
        return {layer: acts * np.inf for layer, acts in activations(self, token_ids).items()}

    monkeypatch.setattr(BatchRunner, "_try", lambda self, ids: overflowing(self.model, ids))
    message = (
        r"^The activation at position 1 of text \d+ is NaN or Inf: it overflows in this number "
        r"format\. Pass --dtype float32 \(or bfloat16 if it was float16\) with another --out\.$"
    )
    with pytest.raises(NonFiniteError, match=message):
        quiet(**flags, out=tmp_path / "set.zarr")


def test_blocks_and_batches_have_every_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths_C = rng.integers(1, 90, 500)
    contexts = [np.zeros(n, np.uint32) for n in lengths_C.tolist()]
    found = blocks(contexts)
    assert [part.start for part in found[1:]] == [part.stop for part in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, 500)
    assert all(lengths_C[part].sum() <= 400 + 90 for part in found)
    together = list(batches(lengths_C, 256))
    assert sorted(np.concatenate(together).tolist()) == list(range(500))
    assert all(len(each) == 1 or len(each) * lengths_C[each].max() <= 256 for each in together)


def test_the_set_after_a_kill_cannot_be_opened_as_if_it_were_whole(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "set.zarr"
    assert run_in_child(flags | {"out": out}, 80)[0] == -signal.SIGKILL
    with pytest.raises(StoreError, match=re.escape("is not finished: its state is 'building'.")):
        open_evalset(out)
