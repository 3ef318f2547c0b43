"""A fit from a store: what it leaves behind, what survives a kill, and what is refused how."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sae_pipe.stages.fit import build_trainer, default_out, fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.metrics import evaluate
from sae_pipe.stages.sae import ARCHITECTURES, load_sae
from sae_pipe.stages.trainer import Trainer
from sae_pipe.storage import ActivationStore, InputError, NonFiniteError, StoreError
from sae_pipe.storage.lock import sole_writer

CONFIG = FitConfig(
    arch="matryoshka",
    k=3,
    d_sae=64,
    epochs=4,
    batch_size=128,
    lr=3e-3,
    threshold_beta=0.9,
    device="cpu",
    checkpoint_steps=20,
)
STEPS = 4 * 4096 // 128

SCRIPT = """
import json, sys
from sae_pipe.stages.fit import fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.storage import open_store
store, config, out = sys.argv[1:]
config = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(config).items()}
fit(open_store(store), FitConfig(**config), out, show_progress=True)
"""


def start(store: ActivationStore, config: FitConfig, out: Path) -> subprocess.Popen[str]:
    arguments = [str(store.path), json.dumps(asdict(config)), str(out)]
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, f"it ended by itself: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def checkpointed_step(run: Path) -> int:
    file = run / "checkpoint" / "checkpoint.json"
    return int(json.loads(file.read_text())["step"]) if file.is_file() else 0


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(small_store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    fit(small_store, CONFIG, run, show_progress=False)
    return run


def test_a_run_folder_holds_everything(finished: Path, small_store: ActivationStore) -> None:
    names = {path.name for path in finished.iterdir()} - {".lock"}
    assert names == {
        "config.json",
        "curve.png",
        "metrics.jsonl",
        "sae.safetensors",
        "summary.json",
    }
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["store_digest"] == config["store"]["digest"] == small_store.digest
    assert config["store"]["recipe"] == {"test": "acts.zarr"}
    assert config["recipe"]["lr"] == 3e-3
    factor = config["resolved"].pop("norm_factor")
    assert factor == pytest.approx(small_store.mean_squared_norm**0.5)
    assert config["resolved"] == json.loads(json.dumps(asdict(CONFIG.schedule(4096))))
    assert config["sae"]["group_sizes"] == [2, 4, 8, 16, 34]
    assert {"torch", "numpy", "python"} <= set(config["provenance"]["versions"])
    assert config["provenance"]["command"]
    assert (finished / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_metrics_have_each_step_once_and_judge_on_heldout_rows(finished: Path) -> None:
    lines = read_lines(finished)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines[:2]] == [128, 256]
    last = lines[-1]
    assert set(last) >= {"loss", "l2", "aux", "explained_variance", "l0", "dead", "lr"}
    assert set(last) >= {"grad_norm", "threshold", "k", "rows_per_s", "wait_share"}
    judged = [line for line in lines if "heldout_explained_variance" in line]
    assert [line["step"] for line in judged] == [72, 84, 96, 108, 120, 128]  # needs a threshold
    assert judged[-1]["heldout_explained_variance"] > lines[0]["explained_variance"] + 0.3


def test_the_summary_is_what_the_saved_sae_scores_on_raw_heldout_rows(
    finished: Path, small_store: ActivationStore
) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    rows = small_store.heldout.read(0, 512)
    metrics = ("explained_variance", "fvu", "mse", "l0", "dead_fraction", "gamma")
    found = evaluate(load_sae(finished), [rows], metrics)
    assert summary["heldout_rows"] == found.pop("dead_fraction_rows") == 512
    assert {name: summary[name] for name in found} == pytest.approx(found, rel=1e-6)
    assert summary["explained_variance"] > 0.5
    assert summary["l0"] == pytest.approx(3, rel=0.2)
    assert summary["gamma"] == pytest.approx(1, abs=0.1)
    assert (summary["tokens"], summary["steps"]) == (STEPS * 128, STEPS)


def ask_to_stop(
    patch: pytest.MonkeyPatch, *, at: int, number: int, arch: str | None = None
) -> None:
    """Let the signal come during that step of a fit, or of the one of that architecture."""
    step = Trainer.step

    def step_and_be_asked_to_stop(self: Trainer, batch: torch.Tensor) -> Any:
        values = step(self, batch)
        if self.updates == at and arch in (None, self.config.arch):
            signal.raise_signal(number)
        return values

    patch.setattr(Trainer, "step", step_and_be_asked_to_stop)


def test_folding_the_norm_factor_changes_no_reconstruction(
    finished: Path, small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is on normalised rows, the weights are on raw ones."""
    run = tmp_path / "run"
    ask_to_stop(monkeypatch, at=STEPS, number=signal.SIGTERM)
    with pytest.raises(SystemExit):
        fit(small_store, CONFIG, run, show_progress=False)
    trainer = build_trainer(CONFIG, small_store.d_in, small_store.n_rows)
    trainer.load_state_dict(load_file(run / f"checkpoint/state-{STEPS:010d}.safetensors"))
    factor = small_store.mean_squared_norm**0.5
    rows = torch.from_numpy(small_store.heldout.read(0, 100))
    with torch.no_grad():
        expected = trainer.sae(rows / factor) * factor
        torch.testing.assert_close(load_sae(finished)(rows), expected, rtol=1e-5, atol=1e-5)
    fit(small_store, CONFIG, run, show_progress=False)  # only what comes after the last step
    assert same_weights(run, finished)
    assert not (run / "checkpoint").exists()


def test_a_finished_run_is_left_as_it_is(
    finished: Path, small_store: ActivationStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    again = fit(small_store, replace(CONFIG, checkpoint_minutes=1), finished, show_progress=True)
    assert capsys.readouterr().err == f"Run {finished} is complete: nothing to do.\n"
    assert asdict(again) == json.loads((finished / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_configuration_in_the_same_folder_shows_the_difference(
    finished: Path, small_store: ActivationStore
) -> None:
    message = (
        f"{finished} holds a run of another configuration: k=3 there and 5 here; "
        "seed=0 there and 7 here. Pass another --out, or the configuration of that run."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fit(small_store, replace(CONFIG, k=5, seed=7), finished, show_progress=False)


def test_a_second_fit_on_the_same_run_is_refused(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    message = (
        f"Run {run} is being written by another process (pid {os.getpid()}). "
        "Wait for it to end, or stop it, then run the same command again."
    )
    with sole_writer(run, "Run"), pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fit(small_store, CONFIG, run, show_progress=False)
    assert not (run / "config.json").exists()


def same_weights(run: Path, other: Path) -> bool:
    ours, theirs = load_file(run / "sae.safetensors"), load_file(other / "sae.safetensors")
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_killed_twice_and_resumed_it_ends_with_the_same_bits(
    small_store: ActivationStore, tmp_path: Path, finished: Path
) -> None:
    run = tmp_path / "killed"
    for past in (20, 60):
        process = start(small_store, CONFIG, run)
        wait_for(lambda past=past: checkpointed_step(run) >= past, process)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (run / "summary.json").exists()
        assert checkpointed_step(run) < STEPS
        with pytest.raises(StoreError, match=f"Run {re.escape(str(run))} has no weights: the fit"):
            load_sae(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "loss": 1}\n{"step": 100')  # past the checkpoint, and cut off
    fit(small_store, CONFIG, run, show_progress=False)
    assert same_weights(run, finished)
    lines, expected = read_lines(run), read_lines(finished)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    speed = {"rows_per_s", "wait_share"}
    for line, other in zip(lines, expected, strict=True):
        assert {k: line[k] for k in line.keys() - speed} == {
            k: other[k] for k in other.keys() - speed
        }


@pytest.mark.parametrize(
    ("number", "leaves"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_polite_signal_checkpoints_first(
    small_store: ActivationStore,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    leaves: type[BaseException],
) -> None:
    run, config = tmp_path / "stopped", replace(CONFIG, checkpoint_steps=None)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        ask_to_stop(patch, at=33, number=number)
        with pytest.raises(leaves) as caught:
            fit(small_store, config, run, show_progress=False)
    if number == signal.SIGTERM:
        assert caught.value.args == (143,)
    assert capsys.readouterr().err == f"Stopped: {run} goes on from its checkpoint.\n"
    assert checkpointed_step(run) == read_lines(run)[-1]["step"] == 33
    assert signal.getsignal(number) == handler
    fit(small_store, config, run, show_progress=False)
    assert same_weights(run, finished)


def test_nan_stops_the_run_and_names_the_step_and_the_last_checkpoint(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = replace(CONFIG, lr=1e36, warmup_steps=40, checkpoint_steps=1)
    with pytest.raises(NonFiniteError) as caught:
        fit(small_store, config, run, show_progress=False)
    match = re.fullmatch(
        r"The (?:loss|weights) became NaN or Inf at step (\d+) of 128, on rows (\d+) to (\d+) of "
        r"the training order; (?:the last good checkpoint is that of step (\d+) in .*/checkpoint). "
        r"Pass a smaller --lr with a new --out\.",
        str(caught.value),
    )
    assert match is not None, str(caught.value)
    step, first, last, kept = map(int, match.groups())
    assert (first, last) == ((step - 1) * 128, step * 128 - 1)
    assert kept == step - 1
    saved = load_file(next((run / "checkpoint").glob("*.safetensors")))
    assert all(value.isfinite().all() for value in saved.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_fits_and_loads(
    small_store: ActivationStore, tmp_path: Path, arch: str
) -> None:
    config = replace(CONFIG, arch=arch, epochs=4, bandwidth=0.03)
    summary = fit(small_store, config, tmp_path / arch, show_progress=False)
    assert summary.explained_variance is not None
    # 128 steps are few for a coefficient that has to be found on the way.
    assert summary.explained_variance > (0.3 if config.recipe.keeps_k else 0.05)
    assert load_sae(tmp_path / arch).k == 3


def test_a_batch_may_be_larger_than_the_store(small_store: ActivationStore, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=None, tokens=3 * 5000, batch_size=5000)
    assert fit(small_store, config, tmp_path / "run", show_progress=False).steps == 3


def test_without_heldout_rows_the_summary_says_so(
    tmp_path: Path, small_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_store.heldout, "n_rows", 0)
    summary = fit(small_store, replace(CONFIG, epochs=1), tmp_path / "run", show_progress=False)
    assert summary.heldout_rows == 0
    assert (summary.explained_variance, summary.l0, summary.gamma) == (None, None, None)
    assert "heldout_l0" not in read_lines(tmp_path / "run")[-1]


def test_the_default_run_name_can_be_read(small_store: ActivationStore) -> None:
    assert default_out(small_store, CONFIG) == "runs/acts-matryoshka-l0_3-seed0"


def test_progress_tells_loss_and_speed_where_there_is_no_terminal(
    small_store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(small_store, CONFIG, tmp_path / "run", show_progress=True)
    said = capsys.readouterr().err
    for part in ("loss", "EV", "L0 3.0", "dead", "rows/s", "wait"):
        assert part in said, part
    assert len(re.split(r"[\r\n]+", said)) < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"epochs": None, "tokens": 100},
            (
                "A run of 100 tokens is less than one batch of 128. "
                "Pass more --tokens or a smaller --batch-size."
            ),
        ),
        (
            {"threshold_start": 127},
            (
                "--threshold-start 127 leaves no step of 128 to estimate the inference threshold in, "
                "and the SAE would fire on everything. "
                "Pass a smaller --threshold-start or more --tokens."
            ),
        ),
        (
            {"warmup_steps": 120},
            (
                "--warmup-steps 120 ends after the learning rate begins to fall, at step 102 of 128. "
                "Pass fewer --warmup-steps or more --tokens."
            ),
        ),
        (
            {"device": "cuda:77"},
            "Device 'cuda:77' was asked for, but ",
        ),
        ({"device": "abacus"}, "'abacus' is not a device; "),
        (
            {"k": 20, "k_anneal_steps": 10},
            (
                "k is annealed from d_in down to --l0, but d_in is 16 and --l0 20. "
                "Pass a smaller --l0, or leave out --k-anneal-steps."
            ),
        ),
        (
            {"d_sae": 10**12},
            (
                "--d-sae 1000000000000 and --batch-size 128 at d_in 16 need at least 1.54e+03 TB of "
                "memory for weights, gradients, Adam's moments and activations, but this machine "
                "has "
            ),
        ),
    ],
)
def test_a_config_that_does_not_fit_the_store_is_refused_and_leaves_nothing(
    small_store: ActivationStore, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        fit(small_store, replace(CONFIG, **changes), run, show_progress=False)
    assert not run.exists()


def test_a_run_of_one_step_still_has_a_threshold(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=None, tokens=128)
    summary = fit(small_store, config, tmp_path / "run", show_progress=False)
    assert float(load_sae(tmp_path / "run").state_dict()["threshold"]) > 0
    assert summary.l0 is not None
    assert summary.l0 < 10


def test_initial_weights_follow_the_seed_and_the_order_of_rows_the_order_seed(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    weights, first_l2 = [], []
    for name, seed, order_seed in (("a", 0, 0), ("b", 0, 0), ("c", 1, 0), ("d", 0, 1)):
        config = replace(CONFIG, epochs=0.25, seed=seed, order_seed=order_seed)
        fit(small_store, config, tmp_path / name, show_progress=False)
        weights.append(load_file(tmp_path / name / "sae.safetensors")["W_enc"])
        first_l2.append(read_lines(tmp_path / name)[0]["l2"])
    assert torch.equal(weights[0], weights[1])
    assert not np.allclose(weights[0], weights[2], atol=0.1)
    assert not torch.equal(weights[0], weights[3])
    assert first_l2[0] == first_l2[1]
    assert len(set(first_l2)) == 3
