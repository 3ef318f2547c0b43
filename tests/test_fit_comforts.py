"""What makes long fits bearable: kept checkpoints, loggers, what is said at the start and the end."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_pipe.pipeline.fit_flags import fit_configs
from sae_pipe.stages import loggers
from sae_pipe.stages.fit import fit, fit_many
from sae_pipe.stages.fitconfig import FitConfig, default_lr_in_words
from sae_pipe.stages.loggers import LOGGERS
from sae_pipe.stages.runlog import RunLog
from sae_pipe.storage import ActivationStore, InputError

from .test_fit import ask_to_stop, read_lines, same_weights

CONFIG = FitConfig(
    arch="topk", k=3, d_sae=64, epochs=1, batch_size=128, device="cpu", checkpoint_steps=5
)


def states(run: Path) -> list[int]:
    return sorted(int(file.stem[6:]) for file in (run / "checkpoint").glob("state-*"))


# --- checkpoints ---


def test_the_last_checkpoints_are_kept_and_an_older_one_can_be_gone_on_from(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, run = tmp_path / "expected", tmp_path / "run"
    fit(small_store, CONFIG, expected, show_progress=False)
    config = replace(CONFIG, keep_checkpoints=3)
    with monkeypatch.context() as patch:
        ask_to_stop(patch, at=22, number=signal.SIGTERM)
        with pytest.raises(SystemExit):
            fit(small_store, config, run, show_progress=False)
    assert states(run) == [15, 20, 22]
    for step in (20, 22):
        (run / f"checkpoint/state-{step:010d}.safetensors").unlink()
    with monkeypatch.context() as patch:
        ask_to_stop(patch, at=26, number=signal.SIGTERM)
        with pytest.raises(SystemExit):
            fit(small_store, config, run, show_progress=False)
    assert states(run) == [20, 25, 26]
    assert [line["step"] for line in read_lines(run)] == list(range(1, 27))
    with monkeypatch.context() as patch:
        ask_to_stop(patch, at=28, number=signal.SIGTERM)
        with pytest.raises(SystemExit):
            fit(small_store, CONFIG, run, show_progress=False)
    assert states(run) == [28]
    fit(small_store, CONFIG, run, show_progress=False)
    assert same_weights(run, expected)
    assert not (run / "checkpoint").exists()


# --- loggers ---


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_named_with_the_command_before_anything_is_written(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    message = (
        f"--log-to {name} needs the package {name}, which is not installed. Install it: "
        f"pip install 'sae-pipe[{name}]'."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fit(small_store, replace(CONFIG, log_to=(name,)), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused_with_the_known_ones() -> None:
    message = f"Unknown logger 'paper' for --log-to: choose from {', '.join(sorted(LOGGERS))}."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        replace(CONFIG, log_to=("paper",))


def test_tensorboard_has_every_line_once_also_after_a_kill(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = replace(CONFIG, log_to=("tensorboard",)), tmp_path / "run"
    with monkeypatch.context() as patch:
        ask_to_stop(patch, at=13, number=signal.SIGTERM)
        with pytest.raises(SystemExit):
            fit(small_store, config, run, show_progress=False)
    fit(small_store, config, run, show_progress=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    lines = read_lines(run)
    assert set(found.Tags()["scalars"]) == {key for line in lines for key in line} - {"step"}
    loss = {event.step: event.value for event in found.Scalars("loss")}
    assert loss == pytest.approx({line["step"]: line["loss"] for line in lines})


WANDB = """
import sys
from sae_pipe.stages.fit import fit_many
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.storage import open_store
store, *outs = sys.argv[1:]
config = dict(arch="topk", d_sae=64, batch_size=128, device="cpu", log_to=("wandb",))
outcomes = fit_many(open_store(store), [FitConfig(k=k, **config) for k in (2, 3)], outs)
assert all(outcome.error is None for outcome in outcomes), outcomes
"""


def test_wandb_has_a_run_for_each_sae_of_a_sweep(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    """In a process of its own: wandb starts a service and threads."""
    pytest.importorskip("wandb")
    outs = [tmp_path / "a", tmp_path / "b"]
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", WANDB, str(small_store.path), *map(str, outs)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    for out in outs:
        [record] = out.glob("wandb/offline-run-*/run-*.wandb")
        assert record.stat().st_size > 1000
        assert (out / "summary.json").is_file()


def test_a_logger_that_breaks_is_left_out_and_the_lines_are_in_the_file(
    small_store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    record = RunLog.record

    def break_it(self: RunLog, step: int, *rest: Any) -> Any:
        for logger in self._loggers if step == 4 else []:
            monkeypatch.setattr(logger, "log", lambda *_: 1 / 0)
        return record(self, step, *rest)

    monkeypatch.setattr(RunLog, "record", break_it)
    fit(small_store, replace(CONFIG, log_to=("tensorboard",)), run, show_progress=False)
    assert capsys.readouterr().err == (
        f"{run}: TensorBoard is left out from here on: division by zero\n"
    )
    assert len(read_lines(run)) == 32


# --- what is said ---


def test_the_rule_behind_the_default_learning_rate_is_said(
    small_store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FitConfig(arch="topk", k=20, d_sae=4096)

    def words(config: FitConfig, tokens: int) -> str:
        return default_lr_in_words(config, replace(config, tokens=tokens).schedule())

    assert words(config, 10**9) == "lr 4e-4 = 2e-4 / sqrt(d_sae / 2^14), d_sae 4096"
    gated = FitConfig(arch="gated", k=20, d_sae=4096)
    assert words(gated, 10**9) == "lr 5e-5, the default of gated"
    assert words(gated, 5 * 10**6) == (
        "lr 5e-4: that of gated, 5e-05, raised for a run of 2441 steps"
    )
    assert words(gated, 10**5) == "lr 1e-3: that of gated, 5e-05, raised for a run of 48 steps"
    assert words(replace(gated, reference=True), 10**5) == "lr 5e-5, the default of gated"
    fit(small_store, CONFIG, tmp_path / "auto")
    assert "lr 3.2e-3 = 2e-4 / sqrt(d_sae / 2^14), d_sae 64\n" in capsys.readouterr().err
    fit(small_store, replace(CONFIG, lr=1e-3), tmp_path / "given")
    assert "lr " not in capsys.readouterr().err
    assert fit_configs({"arch": "topk", "l0": 3, "lr": "auto"})[0].lr is None
    assert fit_configs({"arch": "topk", "l0": 3, "lr": "3e-4"})[0].lr == 3e-4


def test_peak_memory_is_said_and_recorded(
    small_store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = fit(small_store, CONFIG, tmp_path / "run")
    assert re.search(r"peak memory \d+(\.\d+)? [MG]B\n", capsys.readouterr().err)
    assert summary.peak_memory_bytes is not None
    assert 1e8 < summary.peak_memory_bytes < 1e12
    assert summary.peak_device_bytes is None
    recorded = json.loads((tmp_path / "run/summary.json").read_text())
    assert recorded["peak_memory_bytes"] == summary.peak_memory_bytes


def test_many_dead_latents_at_the_end_are_warned_of(
    small_store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, k=1, d_sae=512, auxk_coefficient=0.0, dead_after_tokens=1000)
    outs = [tmp_path / "dead", tmp_path / "alive"]
    fit_many(small_store, [config, replace(CONFIG, k=8, d_sae=16)], outs)
    dead = read_lines(outs[0])[-1]["dead"]
    assert dead > 51
    said = capsys.readouterr().err
    assert (
        f"Warning: {dead:.0f} of 512 latents of {outs[0]} ({dead / 512:.0%}) have not fired for "
        "1,000 tokens. A smaller --d-sae, more --tokens or a larger --auxk-coefficient leaves "
        "fewer dead.\n"
    ) in said
    assert said.count("Warning") == 1


def test_nan_names_the_step_the_rows_and_the_last_good_checkpoint(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    config = replace(CONFIG, lr=1e36, warmup_steps=20, keep_checkpoints=2, checkpoint_steps=1)
    run = tmp_path / "run"
    [outcome] = fit_many(small_store, [config], [run], show_progress=False)
    last = states(run)[-1]
    assert re.search(
        rf" at step {last + 1} of 32, on rows {last * 128} to {last * 128 + 127} of the training "
        rf"order; the last good checkpoint is that of step {last} in {run}/checkpoint\. ",
        str(outcome.error),
    )
    assert torch.get_num_threads() == 1
