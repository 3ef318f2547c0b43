"""The run folder: what is never touched in one that is not ours, and what a crash may leave."""

import json
import re
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_pipe.stages.curve import draw_curve
from sae_pipe.stages.fit import build_trainer, fit
from sae_pipe.stages.fit_memory import needed_bytes
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.rundir import RunFolder
from sae_pipe.stages.trainer import Trainer
from sae_pipe.storage import ActivationStore, InputError

from .test_fit import ask_to_stop

CONFIG = FitConfig(
    arch="topk", k=3, d_sae=64, epochs=1, batch_size=128, device="cpu", checkpoint_steps=10
)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refuses(store: ActivationStore, out: Path) -> None:
    message = f"{out} exists and is not a run of sae-pipe. Pass another --out, or move it away."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fit(store, CONFIG, out, show_progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex",
        ".draft.tmp",
        ".backup.123.tmp",  # the form of our temporary files, but none that comes first
        "checkpoint/checkpoint.json",
        "deep/.config.json.7.tmp",
    ],
)
def test_a_folder_that_is_no_run_is_refused_and_left_alone(
    small_store: ActivationStore, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "mine"
    for file in (out / name, out / ".config.json.99.tmp"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("years of work")
    before = contents(out)
    refuses(small_store, out)
    assert contents(out) == before


def test_a_store_or_a_file_or_another_config_is_no_run(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    before = contents(small_store.path)
    refuses(small_store, small_store.path)
    assert contents(small_store.path) == before
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt_neox"}')
    (model / ".notes.1.tmp").write_text("mine")
    before = contents(model)
    refuses(small_store, model)
    assert contents(model) == before
    refuses(small_store, model / "config.json")


def test_what_a_fit_leaves_that_was_killed_before_its_config_is_taken_over(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").write_text("12345")
    (out / ".config.json.12345.tmp").write_text('{"for')
    fit(small_store, CONFIG, out, show_progress=False)
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "config.json",
        "curve.png",
        "metrics.jsonl",
        "sae.safetensors",
        "summary.json",
    }


def test_only_our_temporary_files_are_removed_from_a_run(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fit(small_store, CONFIG, out, show_progress=False)
    (out / ".curve.png.99.tmp").write_text("ours")
    (out / ".draft.tmp").write_text("not ours")
    (out / "notes").mkdir()
    (out / "notes/.curve.png.99.tmp").write_text("not ours")
    fit(small_store, CONFIG, out, show_progress=False)
    assert not (out / ".curve.png.99.tmp").exists()
    assert (out / ".draft.tmp").exists()
    assert (out / "notes/.curve.png.99.tmp").exists()


def test_a_kill_right_after_the_summary_leaves_a_complete_run(
    small_store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    fit(small_store, CONFIG, out, show_progress=False)
    (out / "checkpoint").mkdir()
    for name in ("checkpoint.json", "state-0000000032.safetensors", ".checkpoint.json.99.tmp"):
        (out / "checkpoint" / name).write_text("whatever")
    again = fit(small_store, CONFIG, out, show_progress=True)
    assert capsys.readouterr().err == f"Run {out} is complete: nothing to do.\n"
    assert asdict(again) == json.loads((out / "summary.json").read_text())
    assert not (out / "checkpoint").exists()


# --- metrics.jsonl after a power cut ---


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 3, "lo',
        b'{"step": 3, "lo\n',
        b"\0" * 4096,
        b"\0" * 4096 + b"\n",
        b'{"step": 3}\0\0\n{"step": 4}\n',
        b'{"loss": 1.0}\n',
        b'{"step": null}\n',
        b'{"step": true}\n',
        b"3\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"\n",
    ],
    ids=lambda tail: repr(tail[:16]),
)
def test_lines_are_read_up_to_the_first_that_is_not_whole(tmp_path: Path, tail: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], durably=True)
    whole = folder.metrics_file.read_bytes()
    with folder.metrics_file.open("ab") as file:
        file.write(tail)
    lines = folder.read_metrics()
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert draw_curve(lines, "run")[:4] == b"\x89PNG"
    folder.truncate_metrics(2)
    assert folder.metrics_file.read_bytes() == whole


# --- memory ---


def test_the_estimate_is_below_what_a_step_holds() -> None:
    config = replace(CONFIG, d_sae=1000, batch_size=10)
    assert needed_bytes(config, 7) == 16 * 2 * 7 * 1000 + 2 * 4 * 10 * 1000
    trainer = build_trainer(config, 7, 10_000)
    held = sum(4 * p.numel() * p.element_size() for p in trainer.sae.parameters())
    assert needed_bytes(config, 7) - 2 * 4 * 10 * 1000 < held


def test_memory_that_ends_all_the_same_is_one_sentence(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    message = (
        "The memory of device cpu does not suffice for --d-sae 64 with --batch-size 128. "
        "Pass a smaller one of them, with a new --out."
    )
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", refuse)
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            fit(small_store, CONFIG, tmp_path / "step", show_progress=False)
    monkeypatch.setattr(Trainer, "__init__", refuse)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fit(small_store, CONFIG, tmp_path / "build", show_progress=False)
    assert [path.name for path in (tmp_path / "build").iterdir()] == [".lock"]


def test_a_complete_run_is_complete_on_a_machine_too_small_to_fit_it(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    done = fit(small_store, CONFIG, out, show_progress=False)
    monkeypatch.setattr("sae_pipe.stages.fit_memory.memory_bytes", lambda: 1000)
    assert fit(small_store, CONFIG, out, show_progress=False) == done
    message = (
        "--d-sae 64 and --batch-size 128 at d_in 16 need at least 98.3 kB of memory for weights, "
        "gradients, Adam's moments and activations, but this machine has 1 kB. "
        "Pass a smaller --d-sae or --batch-size."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fit(small_store, CONFIG, tmp_path / "new", show_progress=False)
    assert not (tmp_path / "new").exists()


# --- a state on a device without float64 ---


class OnTheHost(torch.Tensor):
    """A tensor that a device refuses, as MPS refuses float64."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_only_what_lives_on_the_device_is_moved_there() -> None:
    config = replace(CONFIG, epochs=None, tokens=1280)
    first, second = build_trainer(config, 16), build_trainer(replace(config, seed=1), 16)
    first.step(torch.randn(128, 16))
    state = first.state_dict()
    host = {n: state[n].as_subclass(OnTheHost) for n in ("lr", "updates", "k")}
    second.load_state_dict(state | host)
    assert second.updates == 1
    for name, value in state.items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_resumed_run_stands_a_zero_filled_tail_of_its_metrics(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        ask_to_stop(patch, at=20, number=signal.SIGTERM)
        with pytest.raises(SystemExit):
            fit(small_store, CONFIG, out, show_progress=False)
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 512 + b"\n")
    fit(small_store, CONFIG, out, show_progress=False)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 33))
