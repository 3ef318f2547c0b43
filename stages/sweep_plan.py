"""What the fits of a sweep will take: said before it begins.

# B rows, D d_in, S d_sae
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..storage.address import Place
from ..storage.disk import human_bytes
from .devices import pick_device, usable_cores
from .fit import build_trainer, step_threads
from .fit_memory import moment_bytes, sweep_bytes, weight_bytes
from .fitconfig import FitConfig
from .plan import human_time

_MOST_PRODUCT = 4e10  # B D S of a step that is measured on a CPU: some seconds
_MEASURE_S = 2.0
_FOLDER_BYTES = 1_000_000  # of a run beside its weights: about a thousand lines, and a picture


@dataclass(frozen=True, kw_only=True)
class StoreShape:
    """A store that is there, or that a harvest will make."""

    path: Place
    n_rows: int
    d_in: int


def plan_lines(fits: Sequence[tuple[StoreShape, Sequence[FitConfig]]]) -> list[str]:
    """The plan of fitting these SAEs from these stores, one store after another, as it is printed."""
    n_saes = sum(len(configs) for _, configs in fits)
    longest = [
        max(config.schedule(shape.n_rows).steps for config in configs) for shape, configs in fits
    ]
    several = "1 store" if len(fits) == 1 else f"{len(fits)} stores"
    steps = sum(longest)
    lines = [
        f"fits      {n_saes} SAEs from {several}; {steps:,} batches are read, of "
        f"{fits[0][1][0].batch_size:,} rows",
        f"memory    {human_bytes(max(_memory(*fit) for fit in fits))} for the SAEs of a store, "
        "beside the reader's 1 GB",
    ]
    weights = [_weights_bytes(shape, config) for shape, configs in fits for config in configs]
    at_once = max(
        sum(_checkpoint_bytes(shape, config) for config in configs) for shape, configs in fits
    )
    done = sum(weights) + n_saes * _FOLDER_BYTES
    lines.append(
        f"disk      {human_bytes(done)} for the run folders ({human_bytes(done + at_once)} at most "
        "while running)"
    )
    seconds = [_seconds_a_batch(*fit) for fit in fits]
    known = [each for each in seconds if each is not None]
    if len(known) < len(seconds):
        return [*lines, "time      not measured: a step of this size takes too long here to try"]
    total = sum(n * each for n, each in zip(longest, known, strict=True))
    return [
        *lines,
        f"time      about {human_time(total)} for the steps: {max(known):.3g} s a batch for all SAEs "
        f"of a store, measured on {pick_device(fits[0][1][0].device)}",
    ]


def _memory(shape: StoreShape, configs: Sequence[FitConfig]) -> int:
    return sweep_bytes(configs, shape.d_in, _at_once(configs))


def _at_once(configs: Sequence[FitConfig]) -> int:
    """How many step side by side."""
    if pick_device(configs[0].device).type != "cpu":
        return 1
    return min(max(usable_cores() // step_threads(configs[0]), 1), len(configs))


def _weights_bytes(shape: StoreShape, config: FitConfig) -> int:
    return weight_bytes(config) * 2 * shape.d_in * config.d_sae


def _checkpoint_bytes(shape: StoreShape, config: FitConfig) -> int:
    """Weights and two moments of those that are kept, and of the new one before the oldest goes."""
    a_number = weight_bytes(config) + 2 * moment_bytes(config)
    return 2 * a_number * 2 * shape.d_in * config.d_sae


def _seconds_a_batch(shape: StoreShape, configs: Sequence[FitConfig]) -> float | None:
    """Seconds in which every SAE of a store steps once; None where that is too much to try."""
    device = pick_device(configs[0].device)
    product = configs[0].batch_size * shape.d_in * max(config.d_sae for config in configs)
    if device.type == "cpu" and product > _MOST_PRODUCT:
        return None
    measured: dict[tuple[str, int], float] = {}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(step_threads(configs[0]))
        for config in configs:
            kind = config.arch, config.d_sae
            if kind not in measured:
                measured[kind] = _measure(replace(config, device=str(device)), shape)
    finally:
        torch.set_num_threads(before)
    return sum(measured[config.arch, config.d_sae] for config in configs) / _at_once(configs)


def _measure(config: FitConfig, shape: StoreShape) -> float:
    """Seconds of a step on random rows, after one that warms up."""
    trainer = build_trainer(config, shape.d_in, shape.n_rows)
    batch_BD = torch.randn(config.batch_size, shape.d_in, device=trainer.device)
    batch_BD /= shape.d_in**0.5
    float(trainer.step(batch_BD)["loss"])
    begun, done = time.perf_counter(), 0
    while done == 0 or (time.perf_counter() - begun < _MEASURE_S and done < 20):
        values = trainer.step(batch_BD)
        done += 1
    float(values["loss"])  # waits for the device
    return (time.perf_counter() - begun) / done
