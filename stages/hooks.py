"""A decoder with hooks, for any architecture: locating its blocks, running no more than needed.

Nothing here knows a model by name. The decoder's blocks are the ModuleList that has as many entries
as the model has layers; what is taken from a block is in taps.py, and `check_model` makes sure on a few tokens that what was found is what was meant.
"""

# B contexts, T positions, D d_model

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..storage.errors import InputError
from .taps import HOOKS


def locate_blocks(decoder: nn.Module, n_blocks: int) -> nn.ModuleList:
    """The decoder's blocks: of all ModuleLists of that length the one with the most parameters."""
    found = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n_blocks]
    if not found:
        raise InputError(
            f"{type(decoder).__name__} has no list of {n_blocks} blocks, so its layers cannot be "
            "told apart. Pass a model of the usual decoder-only form."
        )
    # A block may hold lists of the same length (experts); the outer list always holds more.
    return max(found, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


class _DeepestReached(Exception):
    """Raised inside the forward pass to end it: everything asked for has been caught."""


@dataclass(frozen=True, kw_only=True)
class HookedModel:
    """A decoder and the layers, all of one kind of hook, whose activations are wanted."""

    decoder: nn.Module
    blocks: nn.ModuleList
    layers: tuple[int, ...]
    hook: str
    d_model: int
    device: torch.device
    dtype: torch.dtype

    def activations(self, token_ids_BT: Tensor) -> dict[int, Tensor]:
        """Layer -> activations (B, T, D) on the device, in the dtype the model computes in.

        Nothing after the deepest hooked module is run. There is no attention mask: attention is
        causal, so whatever pads a context on its right changes nothing at the positions before.
        The activations at padding positions are real numbers that mean nothing; leave them out.
        """
        caught: dict[int, Tensor] = {}
        handles = [self._attach(layer, caught) for layer in self.layers]
        token_ids_BT = token_ids_BT.to(self.device, torch.int64, non_blocking=True)
        try:
            with torch.inference_mode():
                self.decoder(input_ids=token_ids_BT, use_cache=False)
        except _DeepestReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        assert caught.keys() == set(self.layers), f"{caught.keys()} caught, {self.layers} wanted"
        return caught

    def _attach(self, layer: int, caught: dict[int, Tensor]) -> Any:
        """A forward hook for one layer; that of the deepest layer ends the pass."""
        tap = HOOKS[self.hook](self.blocks[layer])

        def catch(value: Any) -> None:
            caught[layer] = value[0] if isinstance(value, tuple) else value
            if layer == max(self.layers):
                raise _DeepestReached

        if tap.end == "output":
            return tap.module.register_forward_hook(lambda _module, _args, output: catch(output))
        return tap.module.register_forward_pre_hook(
            lambda _module, args, kwargs: catch(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )


def check_model(model: HookedModel, source: str) -> None:
    """Refuse, on a dozen tokens, a model whose hooked activations would not mean what they should.

    What is stored must be one vector a token, and must not depend on later tokens (padding and
    "activation at this token" rest on it). What attn_out and mlp_out catch must be all that the
    block adds: resid_pre + attn_out + mlp_out = resid_post.
    """
    token_ids_BT = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]])
    shape = (*token_ids_BT.shape, model.d_model)
    for layer, found_BTD in model.activations(token_ids_BT).items():
        if found_BTD.shape != shape:
            raise InputError(
                f"Model {source} gives {model.hook} of shape {tuple(found_BTD.shape)} at layer "
                f"{layer} where {shape} was expected, so it has no single vector a token there. "
                "Pass another --hook or another model."
            )
        if not same_vectors(found_BTD[0, :-1], found_BTD[1, :-1]):
            raise InputError(
                f"Model {source} is not causal: its activations at a token depend on later tokens. "
                "Pass a decoder-only language model."
            )
    if model.hook in ("attn_out", "mlp_out"):
        deepest = max(model.layers)
        part = {
            hook: replace(model, hook=hook, layers=(deepest,)).activations(token_ids_BT)[deepest]
            for hook in HOOKS
        }
        sum_BTD = part["resid_pre"] + part["attn_out"] + part["mlp_out"]
        # Compared at the scale of resid_pre, too: late blocks cancel what sinks had piled up.
        if not same_vectors(sum_BTD, part["resid_post"], part["resid_pre"]):
            raise InputError(
                f"Model {source} does more in a block than add its attention and MLP outputs to "
                f"the residual stream, so {model.hook} is not defined for it. "
                "Pass --hook resid_post or resid_pre."
            )


def same_vectors(a: Tensor, b: Tensor, scale: Tensor | None = None) -> bool:
    """Equal at every position, vector by vector, but for what another order of summation changes."""
    tolerance = max(4 * torch.finfo(a.dtype).eps, 1e-4)
    norm = b.float().norm(dim=-1)
    if scale is not None:
        norm = torch.maximum(norm, scale.float().norm(dim=-1))
    return bool(((a.float() - b.float()).norm(dim=-1) <= tolerance * norm).all())
