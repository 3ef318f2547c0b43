"""What the metrics over labelled items cost: CPU seconds of one core for 8 SAEs, by metric.

Activations and latents are drawn (d_in 768, d_sae 4096, L0 40), so that no model is needed; a concept
is a direction of the activations and a few latents. The first SAE of a task pays for what all share:
ground-truth probes, oracles, resamples.

    python tests/benchmarks/item_metrics.py
    python tests/benchmarks/item_metrics.py --metric absorption --saes 1
"""

import argparse
import datetime
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sae_pipe.stages.evaluation.judged import Judged
from sae_pipe.stages.metrics import get_metric
from sae_pipe.stages.metrics.base import TaskData
from sae_pipe.storage.provenance import hardware, versions

D_IN, D_SAE, L0 = 768, 4096, 40


class Decoder(Judged):
    def latents(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD @ self.W_dec.T


@dataclass(frozen=True)
class Setting:
    """What a metric is timed on: tasks of items in three splits (train, test, ood)."""

    tasks: int
    classes: int
    items: tuple[int, int, int]


LETTERS = Setting(tasks=1, classes=26, items=(560, 140, 0))
OOD = Setting(tasks=8, classes=2, items=(1024, 300, 300))
PROBES = Setting(tasks=113, classes=2, items=(1024, 300, 0))
SETTINGS = (
    ("absorption", LETTERS),
    ("tpp", LETTERS),
    ("tpp", PROBES),
    ("sparse_probing", PROBES),
    ("shortcut_control", PROBES),
    ("ood_probing", OOD),
    ("scr", OOD),
)


def tasks_of(setting: Setting, saes: int) -> Iterator[tuple[TaskData, list[csr_array]]]:
    """Each task with the latents of every SAE."""
    for task in range(setting.tasks):
        rng = np.random.default_rng(task)
        n_items = sum(setting.items)
        label_I = rng.permutation(n_items) % setting.classes
        direction_CD = rng.normal(size=(setting.classes, D_IN))
        x_ID = 3 + rng.normal(size=(n_items, D_IN)) + 0.3 * direction_CD[label_I]
        data = TaskData(
            name=f"task {task}",
            suite="csv",
            classes=[f"class {each}" for each in range(setting.classes)],
            groups=["without", "with"],
            x_ID=x_ID.astype(np.float32),
            label_I=label_I.astype(np.int32),
            group_I=rng.integers(2, size=n_items).astype(np.int32),
            split_I=np.repeat([0, 1, 2], setting.items).astype(np.uint8),
            document_I=np.arange(n_items),
            texts=["word " * int(n) for n in rng.integers(1, 40, n_items)],
            seed=0,
        )
        yield data, [latents_of(label_I, rng) for _ in range(saes)]


def latents_of(label_I: NDArray[np.int64], rng: np.random.Generator) -> csr_array:
    """L0 latents an item: latent c on nine in ten items of class c, the others at random, of which
    low numbers fire more often, as in a fitted SAE."""
    n_items = len(label_I)
    draw_IN = rng.random((n_items, L0))
    latent_IN = (100 + (D_SAE - 100) * draw_IN**2).astype(np.int64)
    latent_IN[:, 0] = np.where(rng.random(n_items) < 0.9, label_I, latent_IN[:, 0])
    value_IN = 0.5 + np.abs(rng.normal(size=(n_items, L0)))
    item_IN = np.repeat(np.arange(n_items), L0)
    entries = (value_IN.ravel(), (item_IN, latent_IN.ravel()))
    return csr_array(entries, shape=(n_items, D_SAE), dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = sorted({name for name, _ in SETTINGS})
    parser.add_argument("--metric", choices=names, action="append")
    parser.add_argument("--saes", type=int, default=8)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    W_dec = torch.tensor(rng.normal(size=(D_SAE, D_IN)) / D_IN**0.5, dtype=torch.float32)
    judged = Decoder(W_dec=W_dec, b_dec=torch.zeros(D_IN), facts={"name": "drawn"})
    print(f"{datetime.date.today()}, {hardware()}, {versions()}")
    print("| metric | tasks | items a task | first SAE s | each further SAE s |")
    print("|---|---|---|---|---|")
    for name, setting in SETTINGS:
        if arguments.metric and name not in arguments.metric:
            continue
        metrics = [get_metric(name) for _ in range(arguments.saes)]
        seconds_of = np.zeros(arguments.saes)
        for task, latents in tasks_of(setting, arguments.saes):
            for place, (metric, latents_IS) in enumerate(zip(metrics, latents, strict=True)):
                start = time.process_time()
                metric.observe(task, judged, latents_IS)
                seconds_of[place] += time.process_time() - start
        for place, metric in enumerate(metrics):
            start = time.process_time()
            metric.result(seed=0)
            seconds_of[place] += time.process_time() - start
        further = f"{seconds_of[1:].mean():.2f}" if arguments.saes > 1 else "-"
        cells = [name, setting.tasks, sum(setting.items), f"{seconds_of[0]:.2f}", further]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
