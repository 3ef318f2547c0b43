"""HOOKS: the kinds of activations that can be taken from a decoder block.

Imports no torch, so that the command line can name them at once. Inside a block, attention and MLP
are found by what libraries call them; hooks.py checks that what was found is what was meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..storage.errors import InputError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Tap:
    """One end of one module: the tensor that goes into it or comes out of it is what is taken."""

    module: nn.Module
    end: Literal["input", "output"]


def _resid_pre(block: nn.Module) -> Tap:
    """TransformerLens hook_resid_pre: the residual stream before the block."""
    return Tap(block, "input")


def _resid_post(block: nn.Module) -> Tap:
    """TransformerLens hook_resid_post: the residual stream after the block."""
    return Tap(block, "output")


def _attn_out(block: nn.Module) -> Tap:
    """TransformerLens hook_attn_out: what attention adds to the residual stream."""
    if hasattr(block, "post_feedforward_layernorm"):
        # The output is normalised before it is added (Gemma 2 and 3, OLMo 2). Elsewhere the module
        # of the name post_attention_layernorm is the norm before the MLP.
        return Tap(block.get_submodule("post_attention_layernorm"), "output")
    return Tap(_child(block, "attention", _ATTENTION_NAMES), "output")


def _mlp_out(block: nn.Module) -> Tap:
    """TransformerLens hook_mlp_out: what the MLP adds to the residual stream."""
    if hasattr(block, "post_feedforward_layernorm"):
        return Tap(block.get_submodule("post_feedforward_layernorm"), "output")
    return Tap(_child(block, "MLP", _MLP_NAMES), "output")


HOOKS: dict[str, Callable[[nn.Module], Tap]] = {
    "resid_post": _resid_post,
    "resid_pre": _resid_pre,
    "mlp_out": _mlp_out,
    "attn_out": _attn_out,
}
DEFAULT_HOOK = "resid_post"

_ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


def _child(block: nn.Module, what: str, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        child: Any = getattr(block, name, None)
        if hasattr(child, "register_forward_hook"):  # a module, said without importing torch
            module: nn.Module = child
            return module
    found = ", ".join(name for name, _ in block.named_children())
    raise InputError(
        f"No {what} module was found in {type(block).__name__}, which has {found}. "
        "Pass --hook resid_post or resid_pre, which work for any block."
    )
