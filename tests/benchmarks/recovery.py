"""Does an SAE find a dictionary that is known? Every architecture, on synthetic superposition.

Rows are sums of a few of 256 directions in 64 dimensions around a common mean. Each architecture is
fitted for the true number of active features a row; then every true direction is given a latent
of its own (Hungarian assignment) and the mean cosine of these pairs is told, over seeds, beside
explained variance, L0 and dead latents on fresh rows, and the seconds of processor time of a fit.
The untrained SAE is the floor. A cosine alone does not prove recovery where features are
hierarchical (an SAE that absorbs can score 1); here they are independent.

    python tests/benchmarks/recovery.py
    python tests/benchmarks/recovery.py --arch topk gated --steps 8000 --seeds 5
"""

# N rows, D d_in, F features, S latents

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from superposition import Superposition

from sae_pipe.stages.fit import build_trainer
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.metrics import evaluate
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.stages.toys.truth import matched_cosine
from sae_pipe.storage.provenance import hardware, versions

METRICS = ("explained_variance", "l0", "dead_fraction", "gamma")
EVALUATION_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be recovered, and with how many steps."""

    n_features: int = 256
    d_in: int = 64
    active: int = 5
    d_sae: int = 256
    steps: int = 4000
    batch_size: int = 512
    lr: float = 3e-3

    def data(self, seed: int) -> Superposition:
        return Superposition(
            n_features=self.n_features,
            d_in=self.d_in,
            active=self.active,
            equal_frequencies=True,
            seed=seed,
        )

    def config(self, arch: str, seed: int, **changes: Any) -> FitConfig:
        options: dict[str, Any] = {
            "k": self.active,
            "d_sae": self.d_sae,
            "tokens": self.steps * self.batch_size,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "device": "cpu",
            "seed": seed,
        }
        return FitConfig(arch=arch, **options | changes)


def recover(arch: str, task: Task, seed: int = 0, **changes: Any) -> dict[str, float]:
    """Fit one SAE; its cosine, that of its start, and metrics on fresh rows."""
    data = task.data(seed)
    trainer = build_trainer(task.config(arch, seed, **changes), task.d_in)
    found = {"untrained": matched_cosine(trainer.sae.W_dec, data.directions_FD)}
    begun = time.process_time()
    for _ in range(task.steps):
        trainer.step(data.rows(task.batch_size))
    found["seconds"] = time.process_time() - begun
    found["cosine"] = matched_cosine(trainer.sae.W_dec, data.directions_FD)
    return found | evaluate(trainer.sae, [data.rows(EVALUATION_ROWS)], METRICS)


def table(archs: list[str], task: Task, seeds: int) -> Iterator[str]:
    names = ("cosine", "untrained", *METRICS, "seconds")
    yield "| architecture | " + " | ".join(name.replace("_", " ") for name in names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for arch in archs:
        runs = [recover(arch, task, seed) for seed in range(seeds)]
        means = {name: statistics.fmean(run[name] for run in runs) for name in names}
        low, high = (pick(run["cosine"] for run in runs) for pick in (min, max))
        cells = [f"{means['cosine']:.3f} ({low:.3f} to {high:.3f})"]
        cells += [f"{means[name]:.3f}" for name in names[1:-1]] + [f"{means['seconds']:.0f}"]
        yield f"| {arch} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(ARCHITECTURES), default=None)
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in vars(Task()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value)
    arguments = vars(parser.parse_args())
    archs, seeds = arguments.pop("arch") or sorted(ARCHITECTURES), arguments.pop("seeds")
    task = Task(**arguments)
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {hardware()['processor']}, {torch.get_num_threads()} threads")
    print(f"versions  {versions()}")
    print(f"command   {' '.join(sys.argv)}")
    print(f"task      {task}, {seeds} seeds\n")
    for line in table(archs, task, seeds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
