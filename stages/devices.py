"""The device that torch computes on, and the number format a model computes in."""

import os

import torch

from ..storage.errors import InputError

DEVICE_KINDS = ("cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def usable_cores() -> int:
    """Those that this process may use: a cluster may have given it a part of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def available_devices() -> list[str]:
    """The kinds of DEVICE_KINDS that this torch can use on this machine; always has cpu."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    return [kind for kind in DEVICE_KINDS if found[kind]]


def pick_device(name: str) -> torch.device:
    """`auto` is the first of cuda, mps, cpu that is there; anything else is taken at its word."""
    here = available_devices()
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if kind in here))
    offer = f"Pass --device auto or one that is here: {', '.join(here)}."
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICE_KINDS:
        known = ", ".join(DEVICE_KINDS)
        raise InputError(f"{name!r} is not a device; auto, {known} and cuda:N are known. {offer}")
    if device.type not in here:
        raise InputError(f"Device {name!r} was asked for, but torch finds none here. {offer}")
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= n_devices:
        raise InputError(
            f"Device {name!r} was asked for, but there are {n_devices}, counted from 0. {offer}"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, where it is the fast one, and float32 elsewhere.

    float32 on a CPU also upcasts float16 checkpoints, which a CPU computes slowly or not at all.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"Dtype {name!r} is not known. Pass one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]
