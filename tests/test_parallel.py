"""Two processes that fit one SAE together: the numbers of one, and how they end.

Most of it happens in one start of two processes, `parallel_worker.py`; here is looked at what they
have found and left.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages import parallel
from sae_pipe.stages.batches import TorchBatches
from sae_pipe.stages.fit import fit, fit_many
from sae_pipe.stages.parallel import ALONE, Group, join
from sae_pipe.stages.sae import ARCHITECTURES, load_sae
from sae_pipe.stages.torchrun import Seat, find_seat
from sae_pipe.storage import ActivationStore, InputError

from .parallel_worker import (
    CONFIG,
    EACH_CONFIG,
    FLAGS,
    REPORTED,
    SHARED_CASES,
    float64_by_default,
    hundred_updates,
)
from .parity_cases import disagreement
from .test_fit import checkpointed_step, read_lines, same_weights, wait_for

TOLERANCE = 1e-9
ROOT = Path(__file__).resolve().parent.parent
FLAT_FLAGS = [
    part for name, value in FLAGS.items() for part in (f"--{name.replace('_', '-')}", str(value))
]


def start_two(*arguments: str) -> list[subprocess.Popen[str]]:
    """What torchrun would start twice, without the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", *arguments],
            env=os.environ | world | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def worked(small_store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done what parallel_worker.py says."""
    folder = tmp_path_factory.mktemp("parallel")
    started = start_two("-m", "tests.parallel_worker", str(small_store.path), str(folder))
    try:
        told = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    return folder


@pytest.fixture(scope="module")
def found(worked: Path) -> list[dict[str, Any]]:
    """What the first and the second process have found."""
    return [json.loads((worked / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(autouse=True)
def _float32_by_default() -> Iterator[None]:
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", SHARED_CASES)
def test_a_hundred_updates_of_two_processes_are_those_of_one_with_the_whole_batch(
    worked: Path, name: str
) -> None:
    first, second = (load_file(worked / f"{name} {rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    expected = hundred_updates(SHARED_CASES[name], ALONE)
    assert set(first) == set(expected)
    for key, value in expected.items():
        # The threshold of inference is kept in float32.
        is_float32 = key == "sae.threshold" and value.dtype == torch.float32
        assert disagreement(first[key], value) < (1e-6 if is_float32 else TOLERANCE), key
    for column, key in enumerate(REPORTED):
        assert disagreement(first["reported"][:, column], expected["reported"][:, column]) < (
            TOLERANCE
        ), key


def test_every_architecture_is_among_the_cases() -> None:
    assert set(ARCHITECTURES) == {case.arch for case in SHARED_CASES.values()}


def test_fits_of_all_architectures_are_those_of_one_process(
    worked: Path, small_store: ActivationStore, tmp_path: Path
) -> None:
    outs = [tmp_path / config.arch for config in EACH_CONFIG]
    with float64_by_default():
        fit_many(small_store, EACH_CONFIG, outs, show_progress=False)
    speed = {"rows_per_s", "wait_share"}
    for out in outs:
        parameters = {name for name, _ in load_sae(out).named_parameters()}
        theirs = worked / "fits" / out.name
        ours, weights = (load_file(run / "sae.safetensors") for run in (out, theirs))
        for name, value in ours.items():
            # A threshold that is estimated is an average of float32 values.
            tolerance = TOLERANCE if name in parameters else 1e-6
            assert disagreement(weights[name], value) < tolerance, (out.name, name)
        lines, expected = read_lines(theirs), read_lines(out)
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
        for line, other in zip(lines, expected, strict=True):
            assert line.keys() == other.keys()
            for name in line.keys() - speed:
                assert line[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
        assert {path.name for path in theirs.iterdir()} == {path.name for path in out.iterdir()}


def test_both_processes_have_the_summary_that_the_first_has_written(
    worked: Path, found: list[dict[str, Any]]
) -> None:
    written = [
        json.loads((worked / "fits" / config.arch / "summary.json").read_text())
        for config in EACH_CONFIG
    ]
    assert found[0]["fits"] == found[1]["fits"]
    assert found[0]["fits"] == [summary["explained_variance"] for summary in written]


def test_the_selection_was_compared_with_its_definition(found: list[dict[str, Any]]) -> None:
    """The property itself is asserted in the processes."""
    assert found[0]["selection"] == found[1]["selection"] >= 90


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_they_go_on_to_the_same_bits(
    worked: Path, found: list[dict[str, Any]]
) -> None:
    for each in found:
        code, checkpoint = each["signal_to_one"]
        assert (code, checkpoint["step"]) == (143, 33)
    assert same_weights(worked / "signalled", worked / "uninterrupted")


def test_errors_are_raised_by_both_processes_alike(found: list[dict[str, Any]]) -> None:
    assert found[0]["refusals"] == found[1]["refusals"]
    assert all(is_shared is True for *_, is_shared in found[0]["refusals"].values())


@pytest.mark.parametrize(
    ("name", "kind", "pattern"),
    [
        (
            "batch",
            "InputError",
            (
                r"--batch-size 127 cannot be shared evenly by 2 processes\. "
                r"Pass a multiple of 2\."
            ),
        ),
        (
            "resampling",
            "InputError",
            (
                r"--resample-steps draws rows from the batch of a single process\. "
                r"Leave it out, or fit without torchrun\."
            ),
        ),
        (
            "flags",
            "InputError",
            (
                r"Process 1 of this fit has k 4, but process 0 3\. Start all processes of a fit "
                r"with the same command, store and versions\."
            ),
        ),
        ("device", "InputError", r"(Device .cuda. was asked for|--device cuda:0 is one GPU).*"),
        (
            "nan",
            "NonFiniteError",
            (
                r"The loss became NaN or Inf at step (\d+) of 128, on rows \d+ to \d+ of the "
                r"training order; the last good checkpoint is that of step \d+ in "
                r".*/nan/checkpoint\. Pass a smaller --lr with a new --out\."
            ),
        ),
        (
            "thesis",
            "InputError",
            (
                r".*/thesis exists and is not a run of sae-pipe\. Pass another --out, or move it "
                r"away\."
            ),
        ),
        ("damaged", "StoreError", r"Shard \d of .*/damaged\.zarr is damaged: .*"),
        (
            "full",
            "DiskError",
            (
                r".*/full/checkpoint/state-0000000020\.safetensors could not be written \(File "
                r"too large\)\. Choose a folder that this user can write\."
            ),
        ),
        (
            "parted",
            "InputError",
            (
                r"Process 1 of this fit has the checksum of weights 8 -?\d+, but process 0 -?\d+\. "
                r"Start all processes with the same hardware and versions\."
            ),
        ),
    ],
)
def test_what_one_process_meets_ends_all_with_one_sentence(
    found: list[dict[str, Any]], name: str, kind: str, pattern: str
) -> None:
    named, sentence, _ = found[0]["refusals"][name]
    assert named == kind
    assert re.fullmatch(pattern, sentence), sentence


def test_nan_leaves_the_step_before_it_as_the_last_checkpoint(
    worked: Path, found: list[dict[str, Any]]
) -> None:
    sentence = found[0]["refusals"]["nan"][1]
    step = int(sentence.split("at step ")[1].split()[0])
    assert checkpointed_step(worked / "nan") == step - 1


def test_a_refused_run_leaves_nothing(worked: Path) -> None:
    for name in ("batch", "resampling", "flags", "device"):
        assert not (worked / name).exists()


def test_a_killed_process_ends_both_and_torchrun_goes_on_to_the_same_bits(
    small_store: ActivationStore, tmp_path: Path, worked: Path
) -> None:
    """The second command is for two SAEs: that which was killed, and one that cannot be."""
    runs = tmp_path / "runs"
    run, foreign = (runs / f"acts-matryoshka-l0_{k}-seed0" for k in (3, 4))
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("years of work")
    command = ["-m", "sae_pipe.pipeline.cli", "fit", "--store", str(small_store.path), *FLAT_FLAGS]

    first, second = start_two(*command, "--l0", "3", "--out", str(run))
    wait_for(lambda: checkpointed_step(run) >= 20, first)
    assert int((run / ".lock").read_text()) == first.pid
    second.kill()
    _, last_words = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 2
    assert last_words.splitlines()[-1] == (
        "Error: Another process of this fit has ended or does not answer, so this one ends, too. "
        "Run the same command again: it goes on from the last checkpoint."
    )
    assert not (run / "summary.json").exists()
    assert checkpointed_step(run) < 128

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    lists = [*command, "--l0", "3,4", "--out", str(runs)]
    done = subprocess.run([*torchrun, *lists], check=False, capture_output=True, text=True)
    assert same_weights(run, worked / "uninterrupted")
    assert [line["step"] for line in read_lines(run)] == [1, *range(4, 129, 4)]
    assert done.returncode != 0
    failed = (
        f"Error: 1 of 2 SAEs failed. {foreign}: {foreign} exists and is not a run of sae-pipe. "
        "Pass another --out, or move it away."
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert told == [failed], done.stderr
    assert done.stdout.count(f"The run folders are in {runs}") == 1
    report = json.loads((runs / "sweep.json").read_text())
    assert [entry["error"] is None for entry in report["runs"]] == [True, False]


def test_a_run_of_two_processes_is_not_gone_on_with_by_one(
    small_store: ActivationStore, worked: Path
) -> None:
    run = worked / "uninterrupted"
    message = (
        f"{run} holds a run of another configuration: world_size=2 there and 1 here. "
        "Pass another --out, or the configuration of that run."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fit(small_store, CONFIG, run, show_progress=False)


# --- what needs no second process ---


def test_the_parts_of_a_batch_are_the_batch(small_store: ActivationStore) -> None:
    with TorchBatches(small_store, batch_size=96, seed=1) as whole:
        expected = [next(whole) for _ in range(50)]
    parts = []
    for rank in range(3):
        group = Group()
        group.seat = Seat(world_size=3, rank=rank)
        with TorchBatches(small_store, batch_size=96, seed=1, part=group.part(96)) as part:
            parts.append([next(part) for _ in range(50)])
    for step, batch_BD in enumerate(expected):
        assert torch.equal(torch.cat([part[step] for part in parts]), batch_BD)


TOLD = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_place_is_what_torchrun_says() -> None:
    assert find_seat({}) == find_seat({"WORLD_SIZE": "1", "RANK": "0"}) == Seat()
    assert find_seat(TOLD) == Seat(world_size=4, rank=3, local_size=4, local_rank=3)
    two_machines = TOLD | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert find_seat(two_machines) == Seat(world_size=4, rank=3, local_size=2, local_rank=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"RANK": "", "MASTER_PORT": ""},
            (
                "WORLD_SIZE is '4', but RANK and MASTER_PORT are not set. Start the processes with "
                "torchrun, or unset WORLD_SIZE for a single one."
            ),
        ),
        (
            {"WORLD_SIZE": "many"},
            (
                "WORLD_SIZE is 'many', and has to be a whole number, 1 or more. Start the processes "
                "with torchrun, or unset WORLD_SIZE for a single one."
            ),
        ),
        (
            {"RANK": "4"},
            (
                "RANK is '4', and has to be a whole number, from 0 to 3. Start the processes with "
                "torchrun, or unset WORLD_SIZE for a single one."
            ),
        ),
    ],
)
def test_what_cannot_be_torchruns_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        find_seat(TOLD | changes)


def test_processes_that_do_not_come_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "_MEET", timedelta(seconds=1))
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"^Process 1 of 2 could not meet the others \("):
        join()
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["fit", "--store", "a.zarr", "--l0", "3", "--follow"],
            (
                "Error: --follow is for a single process. Fit when the store is complete, or "
                "without torchrun.\n"
            ),
        ),
        (
            ["fit", "--store", "a.zarr,b.zarr", "--l0", "3", "--workers", "2"],
            (
                "Error: --workers start processes of their own, and torchrun has started 4 that "
                "fit each SAE together. Leave --workers out.\n"
            ),
        ),
        (
            ["sweep", "sweep.toml"],
            (
                "Error: sweep is a single process, and torchrun has started 4. Start it without "
                "torchrun; the lists of `sae-pipe fit` can be fitted by several.\n"
            ),
        ),
        (
            ["fit", "--store", "a.zarr", "--l0", "3", "--lr", "high"],
            "Error: --lr is 'high', and has to be a number or auto.\n",
        ),
    ],
)
def test_wrong_flags_are_told_by_the_first_process_alone(
    flags: Sequence[str], message: str, run_cli: Callable[[Sequence[str], int], tuple[int, str]]
) -> None:
    assert run_cli(flags, 0) == (2, message)
    assert run_cli(flags, 3) == (2, "")


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Sequence[str], int], tuple[int, str]]:
    """Exit code and standard error of a command in the place of one of four processes."""

    def run(arguments: Sequence[str], rank: int) -> tuple[int, str]:
        for name, value in (TOLD | {"RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)
        result = CliRunner().invoke(app, list(arguments))
        return result.exit_code, result.stderr

    return run
