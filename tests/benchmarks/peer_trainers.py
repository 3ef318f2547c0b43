"""The public dictionary-learning trainers, by the names of our registry.

Their package's __init__ imports nnsight and transformers, which training does not need; so only
its trainers are imported. They need einops: pip install --no-deps dictionary-learning einops
"""

# D d_in, S d_sae

import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PACKAGE = "dictionary_learning"
TOPK_FAMILY = ("topk", "batch_topk", "matryoshka")

TRAINERS = {
    "topk": "top_k:TopKTrainer",
    "batch_topk": "batch_top_k:BatchTopKTrainer",
    "matryoshka": "matryoshka_batch_top_k:MatryoshkaBatchTopKTrainer",
    "relu": "standard:StandardTrainer",
    "gated": "gdm:GatedSAETrainer",
    "jumprelu": "jumprelu:JumpReluTrainer",
    "p_anneal": "p_anneal:PAnnealTrainer",
}

_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
# Our parameter -> theirs; those of nn.Linear are the transpose of ours.
_NAMES: dict[str, dict[str, str]] = {
    "topk": _LINEAR,
    "batch_topk": _LINEAR,
    "relu": _LINEAR | {"b_dec": "bias"},
    "p_anneal": _LINEAR | {"b_dec": "bias"},
    "gated": {
        "W_enc": "encoder.weight",
        "W_dec": "decoder.weight",
        "b_gate": "gate_bias",
        "b_mag": "mag_bias",
        "b_dec": "decoder_bias",
    },
}


def are_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in (PACKAGE, "einops"))


def build(arch: str, *, d_in: int, d_sae: int, k: int, device: str = "cpu", **options: Any) -> Any:
    """Their trainer of one of our architectures, in float32."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None
        stand_in = types.ModuleType(PACKAGE)
        stand_in.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[PACKAGE] = stand_in
    module, _, name = TRAINERS[arch].partition(":")
    trainer = getattr(importlib.import_module(f"{PACKAGE}.trainers.{module}"), name)
    sizes = {"activation_dim": d_in, "dict_size": d_sae, "layer": 0, "lm_name": "-"}
    if arch in TOPK_FAMILY:
        options["k"] = k
    elif arch == "jumprelu":
        options["target_l0"] = float(k)
    return trainer(**sizes, device=device, **options)


@torch.no_grad()
def give(trainer: Any, arch: str, values: Mapping[str, Tensor]) -> None:
    """Write values under our parameter names into their SAE."""
    theirs = dict(trainer.ae.named_parameters())
    for ours, value in values.items():
        name = _NAMES.get(arch, {}).get(ours, ours)
        theirs[name].copy_(value.T if name.endswith(".weight") else value)


@torch.no_grad()
def latents(trainer: Any, arch: str, x_BD: Tensor) -> Tensor:
    """What their training step keeps of a batch."""
    if arch in ("batch_topk", "matryoshka"):
        return trainer.ae.encode(x_BD, use_threshold=False)  # type: ignore[no-any-return]
    return trainer.ae.encode(x_BD)  # type: ignore[no-any-return]
