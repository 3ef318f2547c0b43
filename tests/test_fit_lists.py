"""`sae-pipe fit` with lists: every combination from every store, in this process or by workers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_pipe.stages.sweep_picture import draw_sweep
from sae_pipe.storage import ActivationStore

from .conftest import write_store
from .test_cli import refused, run
from .test_fit import checkpointed_step, same_weights, wait_for

SMALL = ("--d-sae", "48", "--batch-size", "128", "--device", "cpu")


@pytest.fixture(scope="module")
def stores(small_store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two stores, of 1,024 and of 128 rows."""
    root = tmp_path_factory.mktemp("stores")
    rows, heldout = small_store.read(slice(0, 1024)), small_store.heldout.read(0, 256)
    noise = np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)
    write_store(root / "acts-p0.zarr", rows, heldout)
    write_store(root / "acts-p0.3.zarr", (rows + noise)[:128], heldout)
    return [root / "acts-p0.zarr", root / "acts-p0.3.zarr"]


def test_lists_give_every_combination_a_table_and_a_picture(
    stores: list[Path], tmp_path: Path
) -> None:
    lists = ("--arch", "matryoshka,topk", "--l0", "2, 4", "--seed", "0,1")
    code, stdout, stderr = run(
        "fit", "--store", stores[0], *lists, *SMALL, "--out", tmp_path / "runs"
    )
    assert code == 0, stderr
    names = [
        f"acts-p0-{arch}-l0_{k}-seed{seed}"
        for k in (2, 4)
        for arch in ("matryoshka", "topk")
        for seed in (0, 1)
    ]
    assert [line.split()[0] for line in stdout.splitlines()[2:-1]] == names
    assert stdout.splitlines()[-1] == (
        f"The run folders are in {tmp_path}/runs, all summaries in {tmp_path}/runs/sweep.json, L0 "
        f"against explained variance in {tmp_path}/runs/sweep.png."
    )
    report = json.loads((tmp_path / "runs/sweep.json").read_text())
    assert report["format"] == "sae-pipe-sweep"
    assert [entry["run"] for entry in report["runs"]] == names
    for entry in report["runs"]:
        summary = json.loads((tmp_path / "runs" / entry["run"] / "summary.json").read_text())
        assert entry["summary"] == summary
        assert entry["store"] == str(stores[0])
        assert entry["error"] is None
    assert (tmp_path / "runs/sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_field_that_differs_is_in_the_names_of_the_runs(
    stores: list[Path], tmp_path: Path
) -> None:
    flags = ("--l0", 2, "--d-sae", "32,48", "--batch-size", 512, "--out", tmp_path)
    assert run("fit", "--store", stores[0], *flags)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "acts-p0-matryoshka-l0_2-seed0-d_sae_32",
        "acts-p0-matryoshka-l0_2-seed0-d_sae_48",
        "sweep.json",
        "sweep.png",
    }


def test_what_fails_is_named_at_the_end_and_the_others_are_shown(
    stores: list[Path], tmp_path: Path
) -> None:
    foreign = tmp_path / "acts-p0-topk-l0_2-seed0"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    flags = ("--arch", "topk", "--l0", "2,3", *SMALL, "--out", tmp_path)
    code, stdout, stderr = run("fit", "--store", stores[0], *flags)
    assert code == 2
    assert "acts-p0-topk-l0_3-seed0" in stdout
    assert stderr.splitlines()[-1] == (
        f"Error: 1 of 2 SAEs failed. {foreign}: {foreign} exists and is not a run of sae-pipe. "
        "Pass another --out, or move it away."
    )
    errors = [entry["error"] for entry in json.loads((tmp_path / "sweep.json").read_text())["runs"]]
    assert errors[0].startswith(str(foreign))
    assert errors[1] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--l0", "2,many"],
            "--l0 2,many has 'many' in it, which has to be a whole number.",
        ),
        (["--l0", "2,,4"], "--l0 '2,,4' has an empty place in its list."),
        (["--l0", "2,4,2"], "--l0 names 2 twice. Pass each value once."),
        (
            ["--l0", "2,4", "--arch", "topk,dense"],
            "Unknown architecture 'dense': choose one of batch_topk, gated, jumprelu, matryoshka, p_anneal, relu, topk.",
        ),
        (["--l0", "2", "--lr", "fast"], "--lr is 'fast', and has to be a number or auto."),
        (["--l0", "2,4", "--workers", "0"], "--workers must be at least 1, not 0."),
        (
            ["--l0", "2,4", "--workers", "2"],
            "--workers take a store each, and there is one --store. Leave --workers out: SAEs of "
            "one store are fitted together by one process.",
        ),
        (
            ["--l0", "2,100"],
            "--l0 100 must be smaller than --d-sae 48: an SAE that keeps every latent is not "
            "sparse. Pass a smaller --l0.",
        ),
        (
            ["--l0", "2,4", "--tokens", "100"],
            "A run of 100 tokens is less than one batch of 128. "
            "Pass more --tokens or a smaller --batch-size.",
        ),
        (
            ["--l0", "2", "--store", "none.zarr"],
            "There is no store at none.zarr. "
            "Pass the folder that `sae-pipe harvest --out` wrote, such as acts.zarr.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_lists_that_make_no_sense_are_refused_and_write_nothing(
    stores: list[Path], tmp_path: Path, flags: list[str], message: str
) -> None:
    out = tmp_path / "runs"
    assert refused("fit", "--store", stores[0], *SMALL, "--out", out, *flags) == message
    assert not out.exists()


def test_two_stores_of_one_name_are_refused(stores: list[Path], tmp_path: Path) -> None:
    (tmp_path / "acts-p0.zarr").symlink_to(stores[0])
    message = refused(
        "fit", "--store", f"{stores[0]},{tmp_path}/acts-p0.zarr", "--l0", 2, "--out", tmp_path
    )
    assert message.startswith(f"Two SAEs would be written to {tmp_path}/acts-p0-matryoshka-l0_2")


FITTING = "from sae_pipe.pipeline.cli import main\nif __name__ == '__main__':\n    main()\n"


@pytest.mark.slow
def test_workers_take_a_store_each_stop_politely_and_give_the_weights_of_one_process(
    stores: list[Path], tmp_path: Path
) -> None:
    """Ctrl-C comes when the small store is done, and the large one is not."""
    lists = ["--store", f"{stores[0]},{stores[1]}", "--l0", "2,4", *SMALL, "--epochs", "120"]
    by_workers, by_one = tmp_path / "workers", tmp_path / "one"
    large, small = ([f"{store.stem}-matryoshka-l0_{k}-seed0" for k in (2, 4)] for store in stores)
    script = tmp_path / "fitting.py"
    script.write_text(FITTING)
    flags = ["fit", *lists, "--out", str(by_workers)]
    command = [sys.executable, str(script), *flags, "--workers", "2", "--checkpoint-steps", "30"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: (by_workers / "sweep.json").is_file(), process)
        os.killpg(process.pid, signal.SIGINT)  # it reaches the workers, too
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    names = ", ".join(str(by_workers / name) for name in large)
    assert f"Stopped: {names} go on from their checkpoints.\n" in stderr
    report = json.loads((by_workers / "sweep.json").read_text())
    assert [entry["run"] for entry in report["runs"]] == small
    steps = {checkpointed_step(by_workers / name) for name in large}
    assert len(steps) == 1
    assert 0 < steps.pop() < 960
    assert run(*flags)[0] == run("fit", *lists, "--out", by_one)[0] == 0
    for name in large + small:
        assert same_weights(by_workers / name, by_one / name)


def entry(**summary: Any) -> dict[str, Any]:
    return {"run": "run", "store": "/x/acts.zarr", "error": None, "summary": summary}


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [{"run": "a", "store": "/x/acts.zarr", "error": "no", "summary": None}],
        [entry(l0=None, explained_variance=None, k=3, arch="topk", d_sae=8)],
        [entry(l0=0.0, explained_variance=-1.0, k=3, arch="topk", d_sae=8)],
        [entry(l0=2.5, explained_variance=0.5, k=None, arch="relu", d_sae=d) for d in (8, 16)],
    ],
    ids=["none", "failed", "undefined", "nothing fires", "no k"],
)
def test_any_outcome_can_be_drawn(runs: list[dict[str, Any]]) -> None:
    assert draw_sweep(runs)[:4] == b"\x89PNG"
