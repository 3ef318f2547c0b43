"""Fit throughput from a store, as a ratio to the same training step on rows already in memory.

The difference is everything but the step: reading, decoding, shuffling, widening, logging. Both are
measured in turns, and the ratio is the median over pairs of neighbours, so that other work on the
machine hits both alike. The first steps of a fit, in which the reader fills its first window, are
told apart as the start-up.

    python tests/benchmarks/fit_overhead.py                     # d_in 768, d_sae 4096, batch 2048
    python tests/benchmarks/fit_overhead.py --arch topk --steps 50 --device cuda
"""

# N rows, D d_in

import argparse
import datetime
import importlib.metadata
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sae_pipe.stages.fit import build_trainer, fit, norm_factor
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.builder import StoreBuilder
from sae_pipe.storage.corpus_writer import complete as complete_corpus
from sae_pipe.storage.corpus_writer import create_groups
from sae_pipe.storage.layout import Layout
from sae_pipe.storage.provenance import hardware
from sae_pipe.storage.values import round_to_bfloat16

START_UP_STEPS = 5


def random_store(path: Path, n_rows: int, d_in: int) -> ActivationStore:
    """Rows of a random sparse code, in shards of 8,192, without held-out rows."""
    create_groups(path / "corpus")
    complete_corpus(path / "corpus", {})
    builder = StoreBuilder.begin(path, {}, {"benchmark": "fit_overhead"}, "lossless")
    sizes = {"d_in": d_in, "chunk_rows": 1024, "shard_rows": 8192, "block_rows": 8192}
    builder.lay_out(Layout(n_rows=n_rows, **sizes), Layout(n_rows=0, **sizes), {})
    random = np.random.default_rng(0)
    directions_FD = random.standard_normal((2 * d_in, d_in), dtype=np.float32)
    with ThreadPoolExecutor() as pool:
        train, heldout = builder.writers(pool)
        for shard in range(train.layout.n_shards):
            first, last = train.layout.rows_of_shard(shard)
            active_NF = random.random((last - first, 2 * d_in), dtype=np.float32) < 0.02
            rows_ND = active_NF.astype(np.float32) @ directions_FD + 1
            source_N, masked_N = np.arange(first, last), np.zeros(last - first, np.bool_)
            train.write(shard, round_to_bfloat16(rows_ND), source_N, masked_N)
        builder.finish(train, heldout)
    return open_store(path)


def in_memory(store: ActivationStore, config: FitConfig) -> float:
    """Rows per second of the bare step on normalised tensors that are on the device already."""
    trainer = build_trainer(config, store.d_in, store.n_rows)
    factor, size = norm_factor(store, config), config.batch_size
    batches = [
        torch.from_numpy(store.read(slice(i * size, (i + 1) * size)) / factor).to(trainer.device)
        for i in range(min(8, store.n_rows // size))
    ]
    steps = config.schedule(store.n_rows).steps
    for step in range(steps):
        if step == START_UP_STEPS:
            synchronise(trainer.device)
            begun = time.perf_counter()
        trainer.step(batches[step % len(batches)])
    synchronise(trainer.device)
    return (steps - START_UP_STEPS) * size / (time.perf_counter() - begun)


def from_store(store: ActivationStore, config: FitConfig, run: Path) -> tuple[float, float, float]:
    """Rows per second of a whole fit after its start-up and with it, and the wait share."""
    summary = fit(store, config, run, show_progress=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(config.batch_size / line["rows_per_s"] for line in lines[START_UP_STEPS:])
    waited_s = sum(
        line["wait_share"] * config.batch_size / line["rows_per_s"]
        for line in lines[START_UP_STEPS:]
    )
    n_rows = (len(lines) - START_UP_STEPS) * config.batch_size
    return n_rows / seconds, summary.rows_per_s, waited_s / seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="matryoshka")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--l0", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    config = FitConfig(
        arch=arguments.arch,
        k=arguments.l0,
        d_sae=arguments.d_sae,
        batch_size=arguments.batch_size,
        tokens=arguments.steps * arguments.batch_size,
        device=arguments.device,
        log_every=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        n_rows = max(8, arguments.steps) * arguments.batch_size
        store = random_store(Path(folder) / "acts.zarr", n_rows, arguments.d_in)
        bare, fitted = [], []
        for i in range(arguments.repeats):
            bare.append(in_memory(store, config))
            run = Path(folder) / f"run{i}"
            fitted.append(from_store(store, replace(config, seed=i), run))
    ratios = sorted(after / step for step, (after, _, _) in zip(bare, fitted, strict=True))
    step = statistics.median(bare)
    after, whole, wait = (statistics.median(values) for values in zip(*fitted, strict=True))
    machine = hardware()
    versions = {name: importlib.metadata.version(name) for name in ("sae-pipe", "torch", "numpy")}
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {machine['processor']}, {torch.get_num_threads()} threads{gpu}")
    print(f"versions  {versions}")
    print(f"config    {vars(arguments)}")
    print(f"in memory {step:,.0f} rows/s, median of {arguments.repeats}")
    print(f"fit       {after:,.0f} rows/s, waiting {wait:.2%}; {whole:,.0f} with the start-up")
    spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
    print(f"ratio     {statistics.median(ratios):.3f}, {spread} (aim: at least 0.95)")


if __name__ == "__main__":
    main()
