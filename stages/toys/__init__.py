"""Toys: activations made of known features, on which an SAE can be judged against the truth.

To add a toy: one file here that starts with its definition and the answers that are known, one line
in TOYS. Classes are named by strings, so that listing the names does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from ...storage.errors import InputError

if TYPE_CHECKING:
    from .base import Toy

TOYS: dict[str, str] = {
    "hier4": "hier4:Hier4",
    "masked_tokens": "masked_tokens:MaskedTokens",
    "tree20": "tree20:Tree20",
}


def get_toy(name: str, seed: int = 0, **options: Any) -> Toy:
    """A toy of that name, its rows drawn from the seed; InputError lists the known ones."""
    if name not in TOYS:
        raise InputError(f"Unknown toy {name!r}: choose one of {', '.join(sorted(TOYS))}.")
    module, _, attribute = TOYS[name].partition(":")
    made = getattr(import_module(f".{module}", __name__), attribute)
    return cast("Toy", made(seed=seed, **options))


__all__ = ["TOYS", "get_toy"]
