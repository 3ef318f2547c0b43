"""What an SAE is: the registry of architectures, and loading a fitted one.

To add an architecture: one file here, one line in ARCHITECTURES; the contract tests in
tests/test_sae_contract.py run over the registry, and the command line derives its choices from it.
Classes are named by strings, so that listing the names at start-up does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from ...storage.errors import InputError
from .recipe import GATED, JUMPRELU, RELU, TOPK_FAMILY, Recipe

if TYPE_CHECKING:
    from .base import Sae


class Architecture(NamedTuple):
    """where: "module:Class" below this folder; recipe: its constants."""

    where: str
    recipe: Recipe


ARCHITECTURES: dict[str, Architecture] = {
    "batch_topk": Architecture("batch_topk:BatchTopK", TOPK_FAMILY),
    "gated": Architecture("gated:Gated", GATED),
    "jumprelu": Architecture("jumprelu:JumpRelu", JUMPRELU),
    "matryoshka": Architecture("matryoshka:Matryoshka", TOPK_FAMILY),
    "p_anneal": Architecture("p_anneal:PAnneal", RELU),
    "relu": Architecture("relu:Relu", RELU),
    "topk": Architecture("topk:TopK", TOPK_FAMILY),
}


def get_architecture(name: str) -> type[Sae]:
    """The class of that name; InputError lists the known ones."""
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"Unknown architecture {name!r}: choose one of {known}.")
    module, _, attribute = ARCHITECTURES[name].where.partition(":")
    return cast("type[Sae]", getattr(import_module(f".{module}", __name__), attribute))


def load_sae(run: str | Path, device: str = "cpu") -> Sae:
    """The SAE of a run folder, ready on raw (un-normalised) activations.

    run: a folder, or hf://USER/REPO, hf://USER/REPO@REVISION, of which config.json and
    sae.safetensors are fetched and kept in the Hub's cache. Raises StoreError when it is not a
    finished run or is damaged, InputError for a device or a repository that is not there, and
    NetworkError.
    """
    from ..devices import pick_device
    from .hub import run_folder
    from .weights import read_sae

    return read_sae(run_folder(run), pick_device(device))


__all__ = ["ARCHITECTURES", "get_architecture", "load_sae"]
