"""Harvest throughput as a ratio to the bare truncated forward pass on the same batches.

What a harvest adds: masking, keeping rows, rounding, the copy to the host, the block shuffle,
compression, digests, writing and fsync. Loading the model, tokenising and the plan's warm-up are
not in it: they are done once. Floor and harvest take turns, so that what else runs on the machine
meets both; the ratio of processor seconds (all threads) is less disturbed by it than that of the
clock.

    python tests/benchmarks/harvest_overhead.py                  # random, shaped like pythia-160m
    python tests/benchmarks/harvest_overhead.py --model DIR --layer 3 --tokens 400000
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forward_floor import describe_machine, forward_pass, save_pythia_160m_shape

from sae_pipe.pipeline import cli_demo
from sae_pipe.stages import harvest as harvest_stage
from sae_pipe.stages.devices import pick_device, pick_dtype
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.models import inspect_model, load_truncated
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import open_store

Cost = tuple[float, float]  # seconds by the clock, seconds of processors


def cost_of(work: Callable[[], Any]) -> Cost:
    """What a piece of work takes."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def harvest_cost(config: HarvestConfig) -> Cost:
    """From the first forward pass to the finished store."""
    cost: Cost = (0.0, 0.0)
    run: Any = vars(harvest_stage)["run_and_finish"]

    def timed(*args: Any, **kwargs: Any) -> None:
        nonlocal cost
        cost = cost_of(lambda: run(*args, **kwargs))

    vars(harvest_stage)["run_and_finish"] = timed
    try:
        harvest_stage.harvest(config, say=lambda line: None, show_progress=False)
    finally:
        vars(harvest_stage)["run_and_finish"] = run
    return cost


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", help="folder or Hub id; default random, shaped like pythia-160m")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--context-size", type=int)
    parser.add_argument("--dataset", default=str(cli_demo.TEXT))
    parser.add_argument("--mask-p", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    scratch = Path(tempfile.mkdtemp(prefix="harvest-overhead-"))
    try:
        folder = arguments.model
        if folder is None:
            folder = scratch / "model"
            save_pythia_160m_shape(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(cli_demo.MODEL / name, folder / name)
        config = HarvestConfig(
            model=str(folder),
            layers=(arguments.layer,),
            mask_p=(arguments.mask_p,),
            out=scratch / "acts.zarr",
            text=TextConfig(dataset=arguments.dataset),
            context_size=arguments.context_size,
            tokens=arguments.tokens,
            heldout_tokens=0,
            device=arguments.device,
            dtype=arguments.dtype,
        )
        print(describe_machine(device))
        _compare(config, inspect_model(str(folder)), device, dtype, arguments.rounds)
    finally:
        shutil.rmtree(scratch)


def _compare(
    config: HarvestConfig, info: Any, device: torch.device, dtype: torch.dtype, rounds: int
) -> None:
    model = load_truncated(info, config.layers, config.hook, device, dtype)
    harvest_cost(config)  # makes the corpus, which later rounds find beside them
    first = open_store(config.out)
    table, contexts = first.corpus.train, first.manifest["execution"]["batch_contexts"]
    tokens_NT = torch.from_numpy(table.tokens(0, table.n_contexts).astype(np.int64))
    floors, harvests = [], []
    for number in range(rounds):
        floors.append(cost_of(lambda: forward_pass(model, tokens_NT, contexts)))
        out = config.out.with_name(f"round{number}.zarr")
        harvests.append(harvest_cost(replace(config, out=out)))
        shutil.rmtree(out)
    print(
        f"{info.architecture}, layer {config.layers[0]} of {info.n_layers}, d_model "
        f"{info.d_model}, {dtype}, {contexts} contexts of {table.context_size} a batch, "
        f"{tokens_NT.numel():,} tokens"
    )
    for place, name in enumerate(("clock", "processors")):
        ratios = [f[place] / h[place] for f, h in zip(floors, harvests, strict=True)]
        floor, harvest = (
            tokens_NT.numel() / statistics.median(cost[place] for cost in costs)
            for costs in (floors, harvests)
        )
        print(
            f"by the {name}: floor {floor:,.0f} tokens/s, harvest {harvest:,.0f} tokens/s, ratio "
            f"{statistics.median(ratios):.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})"
        )


if __name__ == "__main__":
    main()
