"""Whether a fit has the memory that it needs: asked before anything is written, and said if not.

# B rows, D d_in, S d_sae
"""

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..storage.disk import human_bytes
from ..storage.errors import InputError
from ..storage.provenance import memory_bytes
from .backoff import is_out_of_memory
from .fitconfig import FitConfig
from .parallel import ALONE, Group


def needed_bytes(config: FitConfig, d_in: int) -> int:
    """The least that a step holds: weights with gradient and moments, and activations."""
    return _of_weights(config, d_in) + _of_activations(config)


def _of_weights(config: FitConfig, d_in: int) -> int:
    """Each of the 2 D S weights as itself, gradient and two moments."""
    return 2 * (weight_bytes(config) + moment_bytes(config)) * 2 * d_in * config.d_sae


def weight_bytes(config: FitConfig) -> int:
    """Of one number of a weight or its gradient."""
    return 8 if config.dtype == "float64" else 4


def moment_bytes(config: FitConfig) -> int:
    """Of one number of one of Adam's moments."""
    return 2 if config.optimizer_state == "bfloat16" else weight_bytes(config)


def _of_activations(config: FitConfig) -> int:
    """(B, S) twice, as candidates and as latents."""
    value_bytes = {"float64": 8, "bfloat16": 2}.get(config.dtype, 4)
    return 2 * value_bytes * config.batch_size * config.d_sae


def sweep_bytes(configs: Sequence[FitConfig], d_in: int, at_once: int) -> int:
    """The least that SAEs hold that are fitted together: the weights of all, and the activations of
    those that step at the same time."""
    activations = sorted(map(_of_activations, configs), reverse=True)
    return sum(_of_weights(config, d_in) for config in configs) + sum(activations[:at_once])


def check_memory(
    configs: Sequence[FitConfig],
    d_in: int,
    device: torch.device,
    *,
    at_once: int = 1,
    group: Group = ALONE,
) -> None:
    """InputError when even the least that the SAEs need is more than there is.

    at_once: how many of them step at the same time, which only a CPU does. group: the processes
    that step them together, each with all weights and its share of the activations.
    """
    at_once = at_once if device.type == "cpu" else 1
    own = [replace(each, batch_size=each.batch_size // group.world_size) for each in configs]
    needed, there = sweep_bytes(own, d_in, at_once), _there_bytes(device)
    if device.type != "cuda":
        needed *= group.seat.local_size  # they share the machine's
    if needed <= there:
        return
    d_sae = max(config.d_sae for config in configs)
    flags = f"--d-sae {d_sae} and --batch-size {configs[0].batch_size}"
    what = f"{flags} at d_in {d_in}"
    advice = "Pass a smaller --d-sae or --batch-size."
    if len(configs) > 1:
        what = f"{len(configs)} SAEs together, with {flags} at d_in {d_in},"
        advice = "Fit fewer at once, or pass a smaller --d-sae or --batch-size."
    where = f"{device} has free" if device.type == "cuda" else "this machine has"
    raise InputError(
        f"{what} need at least {human_bytes(needed)} of memory for weights, gradients, Adam's "
        f"moments and activations, but {where} {human_bytes(there)}. {advice}"
    )


def _there_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return memory_bytes()  # MPS shares the machine's
    # What torch keeps of earlier fits of this process counts as used, but can be had.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def peak_memory_bytes() -> int:
    """The most that this process has held so far, of all that it has done."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """The most that tensors have held on a CUDA device since `forget_peak`; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    """Count the peak of a CUDA device anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def memory_is_enough(config: FitConfig, device: torch.device) -> Iterator[None]:
    """InputError in place of the allocator's, for a need that the estimate did not see."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"The memory of device {device} does not suffice for --d-sae {config.d_sae} with "
            f"--batch-size {config.batch_size}. Pass a smaller one of them, with a new --out."
        ) from error
