"""What each of two processes does in tests/test_parallel.py, which looks at what they write.

python -m tests.parallel_worker STORE FOLDER, with torchrun's variables; one start for many tests,
because importing torch takes seconds. Writes FOLDER/RANK.json.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae_pipe.stages.fit import build_trainer, fit, fit_many
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.parallel import Group, join
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.stages.sae.whole_batch import (
    largest_of_processes,
    largest_of_whole_batch,
    spread_and_size,
)
from sae_pipe.stages.trainer import Trainer
from sae_pipe.storage import ActivationStore, open_store

from .parity_cases import BATCH, CASES, D_IN, Case

# For the command line, too: tests/test_parallel.py.
FLAGS = {
    "arch": "matryoshka",
    "d_sae": 64,
    "epochs": 4,
    "batch_size": 128,
    "lr": 3e-3,
    "threshold_beta": 0.9,
    "device": "cpu",
    "checkpoint_steps": 20,
    "dead_after_tokens": 400,
    "threads": 1,
    "log_every": 4,
}
CONFIG = FitConfig(k=3, **FLAGS)  # type: ignore[arg-type]
# In float64, so that rounding stays small, and with few lines, each of which compares the weights.
EACH_CONFIG = [
    replace(CONFIG, arch=arch, epochs=1, bandwidth=0.03, dtype="float64", log_every=8, p_end=0.75)
    for arch in ARCHITECTURES
]
# Resampling is not for several processes; the others go the same ways as those that are here.
LEFT_OUT = {
    "relu resampled",
    "relu free reference",
    "batch_topk reference",
    "matryoshka reference",
    "p_anneal lp_p",
}
SHARED_CASES = {name: case for name, case in CASES.items() if name not in LEFT_OUT}
REPORTED = ("loss", "l2", "aux", "explained_variance", "l0", "dead", "grad_norm")


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Means of p_anneal's queue have torch's default type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def hundred_updates(case: Case, group: Group) -> dict[str, torch.Tensor]:
    """State and reported values of a case that the processes of a group step together."""
    with float64_by_default():
        trainer = build_trainer(FitConfig(**case.fit_options), D_IN, group=group)
        start = case.start()
        with torch.no_grad():
            for name, parameter in trainer.sae.named_parameters():
                parameter.copy_(start[name])
        part, reported = group.part(BATCH), []
        for batch_BD in case.batches():
            values = trainer.step(batch_BD[part])
            reported.append([float(values[name]) for name in REPORTED])
        state = {name: value.clone().contiguous() for name, value in trainer.state_dict().items()}
        return state | {"reported": torch.tensor(reported)}


def cases(folder: Path, store: ActivationStore, group: Group) -> None:
    for name, case in SHARED_CASES.items():
        state = hundred_updates(case, group)
        save_file(state, folder / f"{name} {group.seat.rank}.safetensors")


def selection(folder: Path, store: ActivationStore, group: Group) -> int:
    """Both processes draw the same examples, and see the same failure: they stay in step."""
    examples = 0

    @settings(max_examples=100, derandomize=True, database=None, deadline=None)
    @given(
        n_rows=st.integers(1, 6),
        n_latents=st.integers(2, 12),
        levels=st.sampled_from([1, 2, 4, 1000]),
        mean=st.sampled_from([-3.0, -0.5, 0.5]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        seed=st.integers(0, 2**31),
        data=st.data(),
    )
    def same_as_one_sort_of_the_whole_batch(
        n_rows: int,
        n_latents: int,
        levels: int,
        mean: float,
        dtype: torch.dtype,
        seed: int,
        data: st.DataObject,
    ) -> None:
        nonlocal examples
        examples += 1
        k = data.draw(st.integers(1, n_latents - 1))
        random = np.random.default_rng(seed)
        values = random.standard_normal((2 * n_rows, n_latents)) + mean
        if levels < 1000:  # many that are equal
            values = np.round(values * levels) / levels
        if seed % 3 == 0:  # one process has nearly all of the large ones
            values[:n_rows] += 5
        whole_BS = torch.from_numpy(values).to(dtype)
        part = group.part(len(whole_BS))
        kept_N = largest_of_whole_batch(whole_BS[part].contiguous(), k, group)
        kept_BS = torch.zeros(n_rows, n_latents)
        kept_BS.view(-1)[kept_N] = 1
        found = group.gather(kept_BS).flatten(0, 1).numpy()
        assert (np.diff(kept_N.numpy()) > 0).all()
        # The definition: sorted from the largest, the first of equal ones first, and positive.
        flat = whole_BS.double().numpy().reshape(-1)
        order = np.argsort(-flat, kind="stable")[: k * len(whole_BS)]
        expected = np.zeros(flat.size)
        expected[order] = flat[order] > 0
        np.testing.assert_array_equal(found.reshape(-1), expected)

    same_as_one_sort_of_the_whole_batch()
    return examples


def exchanges(folder: Path, store: ActivationStore, group: Group) -> None:
    """Sums, extremes, what each has, and distances to the common mean, against their definition."""
    random = np.random.default_rng(0)
    x, y = random.standard_normal((2, 10, 5)) + 3
    part = group.part(10)
    mine_x, mine_y = torch.from_numpy(x[part]), torch.from_numpy(y[part])
    rank = torch.tensor(float(group.seat.rank))
    assert (float(group.sum(rank)), float(group.mean(rank)), float(group.min(rank))) == (1, 0.5, 0)
    assert torch.equal(group.gather(mine_x).flatten(0, 1), torch.from_numpy(x))
    spread, size, mean = spread_and_size(mine_x, mine_y, group, mine_x.sum())
    assert float(spread) == pytest.approx(np.sqrt(((x - x.mean(0)) ** 2).sum()), rel=1e-12)
    assert float(size) == pytest.approx(np.sqrt((y**2).sum()), rel=1e-12)
    assert float(mean) == pytest.approx(x.sum() / 2, rel=1e-12)
    assert largest_of_processes(torch.ones(group.seat.rank), 5, group).all()  # fewer than asked
    assert group.first(lambda: {"of": group.seat.rank}) == {"of": 0}


def fits(folder: Path, store: ActivationStore, group: Group) -> list[Any]:
    """An SAE of each architecture, from one stream."""
    outs = [folder / "fits" / config.arch for config in EACH_CONFIG]
    with float64_by_default():
        outcomes = fit_many(store, EACH_CONFIG, outs, show_progress=False)
    assert all(outcome.error is None for outcome in outcomes)
    return [outcome.summary.explained_variance for outcome in outcomes if outcome.summary]


def uninterrupted(folder: Path, store: ActivationStore, group: Group) -> None:
    fit(store, CONFIG, folder / "uninterrupted", show_progress=False)


def signal_to_one(folder: Path, store: ActivationStore, group: Group) -> list[Any]:
    """SIGTERM in step 33 of the second process, then the same again to the end."""
    run, step, stopped = folder / "signalled", Trainer.step, []

    def step_and_be_asked_to_stop(self: Trainer, batch: torch.Tensor) -> Any:
        values = step(self, batch)
        if self.updates == 33 and not group.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_be_asked_to_stop)
        try:
            fit(store, CONFIG, run, show_progress=False)
        except SystemExit as end:
            stopped = [end.code, json.loads((run / "checkpoint/checkpoint.json").read_text())]
    fit(store, CONFIG, run, show_progress=False)
    return stopped


def refusals(folder: Path, store: ActivationStore, group: Group) -> dict[str, Any]:
    """Error class, sentence, and whether the first process alone is to tell it, of what fails."""
    rank, told = group.seat.rank, {}

    def refused(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - the test looks at what it is
            told[name] = [type(error).__name__, str(error), getattr(error, "is_shared", None)]

    def run(name: str, config: FitConfig, of: ActivationStore = store) -> None:
        refused(name, lambda: fit(of, config, folder / name, show_progress=False))

    run("batch", replace(CONFIG, batch_size=127))
    run("resampling", replace(CONFIG, arch="relu", resample_steps=10))
    run("flags", replace(CONFIG, k=3 + rank))
    run("device", replace(CONFIG, device="cuda:0" if torch.cuda.is_available() else "cuda"))
    run("nan", replace(CONFIG, lr=1e36, warmup_steps=40, checkpoint_steps=1))
    (folder / "thesis").mkdir(exist_ok=True)
    (folder / "thesis/thesis.tex").write_text("years of work")
    run("thesis", CONFIG)
    run("damaged", CONFIG, open_store(damaged(folder, store, group)))
    with a_full_disk() if group.is_first else _nothing():
        run("full", replace(CONFIG, log_every=128))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", disturbed_at(5, group))
        run("parted", replace(CONFIG, log_every=4))
    return told


def damaged(folder: Path, store: ActivationStore, group: Group) -> Path:
    """A copy of the store with one byte changed in a shard."""

    def make() -> None:
        shutil.copytree(store.path, folder / "damaged.zarr")
        shard = max((folder / "damaged.zarr").rglob("c/*/*"), key=lambda file: file.stat().st_size)
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 1
        shard.write_bytes(content)

    group.first(make)
    return folder / "damaged.zarr"


@contextmanager
def a_full_disk() -> Iterator[None]:
    """No file may grow beyond the size of a config.json."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def disturbed_at(at: int, group: Group) -> Callable[[Trainer, torch.Tensor], Any]:
    """Trainer.step, after which one process has rounded a weight otherwise."""
    step = Trainer.step

    def disturbed(self: Trainer, batch: torch.Tensor) -> Any:
        values = step(self, batch)
        if self.updates == at and not group.is_first:
            with torch.no_grad():
                self.sae.b_dec[0] = torch.nextafter(self.sae.b_dec[0], self.sae.b_dec[1])
        return values

    return disturbed


def main(arguments: Sequence[str]) -> None:
    store, folder = open_store(arguments[0]), Path(arguments[1])
    torch.set_num_threads(1)
    group = join()
    checks = (exchanges, selection, cases, fits, uninterrupted, signal_to_one, refusals)
    found = {check.__name__: check(folder, store, group) for check in checks}
    (folder / f"{group.seat.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
