"""Many SAEs from one stream: the weights of each alone, whatever happens to the others."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_pipe.stages.batches import TorchBatches
from sae_pipe.stages.fit import Outcome, fit, fit_many
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.sae import load_sae
from sae_pipe.storage import (
    ActivationStore,
    DiskError,
    InputError,
    NonFiniteError,
    StoreError,
    open_store,
)

from .test_fit import ask_to_stop, checkpointed_step, read_lines, same_weights, wait_for

CONFIG = FitConfig(
    arch="matryoshka",
    k=3,
    d_sae=64,
    epochs=2,
    batch_size=128,
    lr=3e-3,
    threshold_beta=0.9,
    device="cpu",
    checkpoint_steps=10,
)
# Of several architectures, seeds and lengths; checkpointed at different steps.
CONFIGS = (
    CONFIG,
    replace(CONFIG, arch="topk", k=5, seed=1, checkpoint_steps=15),
    replace(CONFIG, arch="batch_topk", d_sae=48, epochs=1, checkpoint_steps=7),
)


def folders(root: Path, count: int = len(CONFIGS)) -> list[Path]:
    return [root / f"sae{number}" for number in range(count)]


def quiet(
    store: ActivationStore, configs: Sequence[FitConfig], outs: Sequence[Path]
) -> list[Outcome]:
    return fit_many(store, configs, outs, show_progress=False)


@pytest.fixture(scope="module")
def alone(small_store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The runs of CONFIGS, each fitted by itself."""
    outs = folders(tmp_path_factory.mktemp("alone"))
    for config, out in zip(CONFIGS, outs, strict=True):
        fit(small_store, config, out, show_progress=False)
    return outs


def all_same(outs: Sequence[Path], alone: Sequence[Path]) -> bool:
    return all(same_weights(out, other) for out, other in zip(outs, alone, strict=True))


def test_saes_of_a_sweep_have_the_bits_of_each_alone_and_read_the_store_once(
    small_store: ActivationStore,
    tmp_path: Path,
    alone: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served, get_next = list[int](), TorchBatches.__next__

    def counted(self: TorchBatches) -> torch.Tensor:
        served.append(1)
        return get_next(self)

    monkeypatch.setattr(TorchBatches, "__next__", counted)
    outs = folders(tmp_path)
    outcomes = quiet(small_store, CONFIGS, outs)
    assert len(served) == 2 * 4096 // 128
    assert all_same(outs, alone)
    for outcome, out, other in zip(outcomes, outs, alone, strict=True):
        assert outcome.error is None
        assert outcome.run == out
        found = json.loads((out / "summary.json").read_text())
        assert asdict(outcome.summary) == found  # type: ignore[arg-type]
        expected = json.loads((other / "summary.json").read_text())
        speed = ("seconds", "rows_per_s", "wait_share", "peak_memory_bytes")
        assert {k: v for k, v in found.items() if k not in speed} == {
            k: v for k, v in expected.items() if k not in speed
        }
        assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}
        assert load_sae(out).k == outcome.config.k


def test_side_by_side_or_one_after_another_changes_no_bit(
    small_store: ActivationStore, tmp_path: Path, alone: list[Path]
) -> None:
    for cores in (1, 3):
        outs = folders(tmp_path / str(cores))
        fit_many(small_store, CONFIGS, outs, show_progress=False, cores=cores)
        assert all_same(outs, alone)


SCRIPT = """
import json, sys
from sae_pipe.stages.fit import fit_many
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.storage import open_store
store, configs, *outs = sys.argv[1:]
configs = [
    {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    for config in json.loads(configs)
]
fit_many(open_store(store), [FitConfig(**config) for config in configs], outs)
"""


def start(store: ActivationStore, outs: Sequence[Path]) -> subprocess.Popen[str]:
    configs = json.dumps([asdict(config) for config in CONFIGS])
    arguments = [str(store.path), configs, *map(str, outs)]
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_killed_sweep_goes_on_from_different_checkpoints_to_the_same_bits(
    small_store: ActivationStore, tmp_path: Path, alone: list[Path]
) -> None:
    outs = folders(tmp_path)
    process = start(small_store, outs)
    wait_for(lambda: checkpointed_step(outs[1]) >= 15, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    at = [checkpointed_step(out) for out in outs if (out / "checkpoint").exists()]
    assert len(set(at)) > 1
    # Another of them goes on by itself, and is far ahead, or complete, when the sweep goes on.
    fit(small_store, CONFIGS[0], outs[0], show_progress=False)
    quiet(small_store, CONFIGS, outs)
    assert all_same(outs, alone)
    for out, other in zip(outs, alone, strict=True):
        assert [line["step"] for line in read_lines(out)] == [
            line["step"] for line in read_lines(other)
        ]


@pytest.mark.parametrize(("number", "cores"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_polite_signal_checkpoints_every_sae(
    small_store: ActivationStore,
    tmp_path: Path,
    alone: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    cores: int,
) -> None:
    outs = folders(tmp_path)
    with monkeypatch.context() as patch:
        ask_to_stop(patch, at=23, number=number, arch="topk")  # the second of them
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit_many(small_store, CONFIGS, outs, show_progress=False, cores=cores)
    names = ", ".join(map(str, outs))
    assert capsys.readouterr().err == f"Stopped: {names} go on from their checkpoints.\n"
    assert [checkpointed_step(out) for out in outs] == [23, 23, 23]
    quiet(small_store, CONFIGS, outs)
    assert all_same(outs, alone)


def test_a_sae_that_fails_does_not_stop_the_others(
    small_store: ActivationStore, tmp_path: Path, alone: list[Path]
) -> None:
    names = ("nan", "foreign", "other", "unwritable", "good")
    nan, foreign, other, unwritable, good = outs = [tmp_path / name for name in names]
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    shutil.copytree(alone[2], other)
    (tmp_path / "file").write_text("")
    unwritable = outs[3] = tmp_path / "file/run"
    configs = [replace(CONFIG, lr=1e36, warmup_steps=20), *[CONFIG] * 4]
    failed = quiet(small_store, configs, outs)
    errors = [outcome.error for outcome in failed]
    kinds = [NonFiniteError, InputError, InputError, DiskError, type(None)]
    assert [type(error) for error in errors] == kinds
    assert "Pass a smaller --lr with a new --out." in str(errors[0])
    assert str(errors[1]).startswith(f"{foreign} exists and is not a run of sae-pipe.")
    assert str(errors[2]).startswith(f"{other} holds a run of another configuration: arch=")
    assert str(errors[3]).startswith(f"{unwritable} could not be written (Not a directory)")
    assert same_weights(good, alone[0])
    assert not (nan / "summary.json").exists()
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_a_damaged_store_ends_what_needs_it_and_leaves_what_is_complete(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    path = tmp_path / "acts.zarr"
    shutil.copytree(small_store.path, path)
    outs = folders(tmp_path, 2)
    store = open_store(path)
    fit(store, CONFIG, outs[0], show_progress=False)
    shard = path / "activations/c/1/0"
    data = bytearray(shard.read_bytes())
    data[100:200] = bytes(100)
    shard.write_bytes(data)
    complete, failed = quiet(open_store(path), CONFIGS[:2], outs)
    assert (complete.error, failed.summary) == (None, None)
    assert complete.summary is not None
    assert isinstance(failed.error, StoreError)
    assert str(failed.error).startswith(f"Shard 1 of {path} is damaged: activations/c/1/0: ")


def test_what_is_complete_is_left_as_it_is_and_a_new_sae_is_added(
    small_store: ActivationStore,
    tmp_path: Path,
    alone: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    outs = folders(tmp_path)
    shutil.copytree(alone[0], outs[0])
    before = {path: path.stat().st_mtime_ns for path in outs[0].iterdir() if path.name != ".lock"}
    fit_many(small_store, CONFIGS, outs)
    assert f"Run {outs[0]} is complete: nothing to do." in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert all_same(outs, alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 256},
            "SAEs that are fitted together share one stream of rows, but batch_size is 128 and "
            "256. Fit them by one command each.",
        ),
        (
            {"order_seed": 1},
            "SAEs that are fitted together share one stream of rows, but order_seed is 0 and 1. "
            "Fit them by one command each.",
        ),
        (
            {"d_sae": 10**12},
            "2 SAEs together, with --d-sae 1000000000000 and --batch-size 128 at d_in 16, need at "
            "least 1.54e+03 TB of memory for weights, gradients, Adam's moments and activations, "
            "but this machine has ",
        ),
        (
            {"epochs": None, "tokens": 100},
            "A run of 100 tokens is less than one batch of 128. Pass more --tokens or a smaller "
            "--batch-size.",
        ),
    ],
)
def test_saes_that_cannot_be_fitted_together_are_refused_and_leave_nothing(
    small_store: ActivationStore, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    outs = folders(tmp_path, 2)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        quiet(small_store, [CONFIG, replace(CONFIG, **changes)], outs)
    assert not list(tmp_path.iterdir())


def test_two_saes_in_one_folder_are_refused(small_store: ActivationStore, tmp_path: Path) -> None:
    outs = [tmp_path / "run", tmp_path / "x/../run"]
    message = f"^Two SAEs would be written to {tmp_path / 'run'}. Pass a folder for each.$"
    with pytest.raises(InputError, match=message):
        quiet(small_store, CONFIGS[:2], outs)


def test_a_run_keeps_the_number_of_threads_that_it_was_begun_with(
    small_store: ActivationStore, alone: list[Path]
) -> None:
    recipe = json.loads((alone[0] / "config.json").read_text())["recipe"]
    assert recipe["threads"] == 1
    assert fit(small_store, CONFIG, alone[0], show_progress=False).steps == 64
    message = f"{alone[0]} holds a run of another configuration: threads=1 there and 2 here. "
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        fit(small_store, replace(CONFIG, threads=2), alone[0], show_progress=False)


def test_torch_has_as_many_threads_after_a_sweep_as_before(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    try:
        config = replace(CONFIG, epochs=0.1, threads=1)
        quiet(small_store, [config, replace(config, seed=1)], folders(tmp_path, 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
