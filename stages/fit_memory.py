"""Whether a fit has the memory that it needs: asked before anything is written, and said if not.

# B rows, D d_in, S d_sae
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..storage.disk import human_bytes
from ..storage.errors import InputError
from ..storage.provenance import memory_bytes
from .backoff import is_out_of_memory
from .fitconfig import FitConfig


def needed_bytes(config: FitConfig, d_in: int) -> int:
    """The least that a step holds: each of the 2 D S weights as itself, gradient and two moments,
    and (B, S) twice, as candidates and as latents."""
    weight_bytes = 8 if config.dtype == "float64" else 4
    activation_bytes = 2 if config.dtype == "bfloat16" else weight_bytes
    of_weights = 4 * weight_bytes * 2 * d_in * config.d_sae
    return of_weights + 2 * activation_bytes * config.batch_size * config.d_sae


def check_memory(config: FitConfig, d_in: int, device: torch.device) -> None:
    """InputError when even the least that a fit needs is more than there is."""
    needed, there = needed_bytes(config, d_in), _there_bytes(device)
    if needed > there:
        where = f"{device} has free" if device.type == "cuda" else "this machine has"
        raise InputError(
            f"--d-sae {config.d_sae} and --batch-size {config.batch_size} at d_in {d_in} need at "
            f"least {human_bytes(needed)} of memory for weights, gradients, Adam's moments and "
            f"activations, but {where} {human_bytes(there)}. "
            "Pass a smaller --d-sae or --batch-size."
        )


def _there_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return memory_bytes()  # MPS shares the machine's
    # What torch keeps of earlier fits of this process counts as used, but can be had.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


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
