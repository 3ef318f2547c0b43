"""What several SAEs cost that are fitted together, as a share of what each costs alone.

They differ in L0 (20, 40, 80, 160) and seed, and a larger L0 costs more: each L0 is timed alone. One alone steps with all threads. Both are whole fits from one store, without their start-up, measured
in turns; the ratio is the median over pairs. CPU seconds of the process stand beside it: on a machine
with other work they say more than the clock, but for what two threads of one step lose to waiting.

    python tests/benchmarks/sweep_cost.py                       # 8 SAEs, d_in 768, d_sae 4096
    python tests/benchmarks/sweep_cost.py --arch topk --saes 4
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from fit_overhead import START_UP_STEPS, random_store

from sae_pipe.stages.fit import fit_many
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.storage import ActivationStore
from sae_pipe.storage.provenance import hardware

L0_VALUES = 4


def cost(store: ActivationStore, configs: Sequence[FitConfig], root: Path) -> tuple[float, float]:
    """Seconds of a batch for all SAEs after the start-up; CPU seconds of a batch, start-up included."""
    outs = [root / f"sae{number}" for number in range(len(configs))]
    begun = time.process_time()
    for outcome in fit_many(store, configs, outs, show_progress=False):
        assert outcome.error is None
    cpu_s = time.process_time() - begun
    lines = [json.loads(line) for line in (outs[0] / "metrics.jsonl").read_text().splitlines()]
    seconds = [configs[0].batch_size / line["rows_per_s"] for line in lines[START_UP_STEPS:]]
    return statistics.mean(seconds), cpu_s / len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="matryoshka")
    parser.add_argument("--saes", type=int, default=8)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    configs = [
        FitConfig(
            arch=arguments.arch,
            k=20 * 2 ** (number % L0_VALUES),
            d_sae=arguments.d_sae,
            batch_size=arguments.batch_size,
            tokens=arguments.steps * arguments.batch_size,
            seed=number,
            device=arguments.device,
            log_every=1,
        )
        for number in range(arguments.saes)
    ]
    alone, first, together = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        n_rows = max(8, arguments.steps) * arguments.batch_size
        store = random_store(Path(folder) / "acts.zarr", n_rows, arguments.d_in)
        for turn in range(arguments.repeats):
            each = [
                cost(store, [config], Path(folder) / f"alone{turn}-{config.k}")
                for config in configs[:L0_VALUES]
            ]
            share = arguments.saes / len(each)
            alone.append((share * sum(s for s, _ in each), share * sum(cpu for _, cpu in each)))
            first.append(arguments.saes * each[0][0])
            together.append(cost(store, configs, Path(folder) / f"together{turn}"))
    ratios = sorted(t[0] / a[0] for a, t in zip(alone, together, strict=True))
    of_first = statistics.median(t[0] / a for a, t in zip(first, together, strict=True))
    versions = {name: importlib.metadata.version(name) for name in ("sae-pipe", "torch", "numpy")}
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {hardware()['processor']}, {torch.get_num_threads()} threads")
    print(f"versions  {versions}")
    print(f"config    {vars(arguments)}")
    for name, found in (("alone", alone), ("together", together)):
        wall, cpu = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:9} {wall:.3f} s a batch of all, {cpu:.3f} CPU s")
    spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
    print(f"ratio     {statistics.median(ratios):.3f}, {spread} of all alone (aim: below 0.8)")
    print(f"          {of_first:.3f} of {arguments.saes} with L0 {configs[0].k} alone")


if __name__ == "__main__":
    main()
