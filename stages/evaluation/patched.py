"""A language model whose activations at the hook are replaced, running no more than it must.

# B contexts, T positions, D d_model, V vocabulary, P some positions

What comes before the hook is the same whatever is put there, so one clean pass is kept and only the
blocks after the hook are run again: the blocks before are replaced by stand-ins that compute
nothing, the last of which gives what the first block to be run takes. The decoder itself stays
Transformers' own, with its masks, position embeddings and final norm. Of a hook inside a block
(mlp_out, attn_out) that block is run again, from the residual stream before it.

On its first batch the model is tried: putting the clean activations back has to give the clean
hidden states. Where it does not (layers that share state behind the stand-ins' back), whole passes
are run from then on, with the activations replaced by a hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...storage.errors import InputError
from ..hooks import same_vectors
from ..models import FullModel
from ..taps import HOOKS, Tap


@dataclass(frozen=True)
class CleanPass:
    """What an unpatched pass leaves.

    x_BTD: activations at the hook; entry_BTD: what enters the first block that is run again, None
    when that is the hook itself or the embedding; returned: the last skipped block's output, whose
    form its stand-in has to give; final_BTD: the decoder's last hidden states.
    """

    tokens_BT: Tensor
    x_BTD: Tensor
    entry_BTD: Tensor | None
    returned: Any
    final_BTD: Tensor

    def part(self, contexts: slice, length: int, copies: int = 1) -> CleanPass:
        """Some contexts, up to a length, each repeated: what is before a position depends on
        nothing after it."""

        def cut(values: Tensor) -> Tensor:
            return values[contexts, :length].repeat_interleave(copies, dim=0)

        return CleanPass(
            tokens_BT=cut(self.tokens_BT),
            x_BTD=cut(self.x_BTD),
            entry_BTD=None if self.entry_BTD is None else cut(self.entry_BTD),
            returned=self.returned,
            final_BTD=cut(self.final_BTD),
        )


class PatchedModel:
    """A full model, one hook of which can be given other activations.

    reruns_all: whether whole passes are needed; known after the first batch.
    """

    def __init__(self, model: FullModel) -> None:
        self.model, self._hooked = model, model.hooked
        self._layer = model.hooked.layers[0]
        hook = model.hooked.hook
        self._tap: Tap = HOOKS[hook](model.hooked.blocks[self._layer])
        # Blocks that need not be run again, and whether the hook is where the others begin.
        self._n_skipped = self._layer + (1 if hook == "resid_post" else 0)
        self._is_entry = hook == "resid_post" or (hook == "resid_pre" and self._layer > 0)
        self.reruns_all = self._n_skipped == 0
        self._is_tried = False

    @property
    def device(self) -> torch.device:
        return self._hooked.device

    @torch.inference_mode()
    def clean(self, tokens_BT: Tensor) -> CleanPass:
        """An unpatched pass. Raises InputError, on the first one, for a model that cannot be
        patched."""
        tokens_BT = tokens_BT.to(self.device, torch.int64)
        caught: dict[str, Any] = {}
        handles = [_catch(self._tap, caught, "x")]
        if self._n_skipped:
            last = self._hooked.blocks[self._n_skipped - 1]
            handles.append(_catch(Tap(last, "output"), caught, "returned"))
        try:
            final_BTD = self._decode(tokens_BT)
        finally:
            for handle in handles:
                handle.remove()
        returned = caught.get("returned")
        clean = CleanPass(
            tokens_BT=tokens_BT,
            x_BTD=_tensor_of(caught["x"]),
            entry_BTD=None if self._is_entry or returned is None else _tensor_of(returned),
            returned=returned[1:] if isinstance(returned, tuple) else None,
            final_BTD=final_BTD,
        )
        if not self._is_tried:
            self._try(clean)
        return clean

    @torch.inference_mode()
    def patched(self, clean: CleanPass, x_BTD: Tensor) -> Tensor:
        """The decoder's last hidden states (B, T, D) with other activations at the hook."""
        x_BTD = x_BTD.to(clean.x_BTD)
        if self.reruns_all:
            with _replaced(self._tap, x_BTD):
                return self._decode(clean.tokens_BT)
        entry_BTD = x_BTD if clean.entry_BTD is None else clean.entry_BTD
        with self._standing_in(entry_BTD, clean.returned):
            if self._is_entry:
                return self._decode(clean.tokens_BT)
            with _replaced(self._tap, x_BTD):
                return self._decode(clean.tokens_BT)

    @torch.inference_mode()
    def logits(self, final_PD: Tensor) -> Tensor:
        """Logits (P, V) of last hidden states, by the model's own head, in float32."""
        name = self.model.lm.base_model_prefix
        base = getattr(self.model.lm, name)
        setattr(self.model.lm, name, _Given(final_PD[None]))
        try:
            logits: Tensor = self.model.lm(input_ids=None, use_cache=False).logits
        finally:
            setattr(self.model.lm, name, base)
        return logits[0].float()

    def _decode(self, tokens_BT: Tensor) -> Tensor:
        final_BTD: Tensor = self._hooked.decoder(
            input_ids=tokens_BT, use_cache=False
        ).last_hidden_state
        return final_BTD

    def _try(self, clean: CleanPass) -> None:
        if not self.reruns_all and not self._gives_back(clean):
            self.reruns_all = True
        whole = self.model.lm(input_ids=clean.tokens_BT, use_cache=False).logits.float()
        own = self.logits(clean.final_BTD.flatten(0, 1)).view_as(whole)
        if not (self._gives_back(clean) and same_vectors(own, whole)):
            hooked = self._hooked
            raise InputError(
                f"Model {self.model.source} gives other logits when its own {hooked.hook} of layer "
                f"{self._layer} is put back, so what a reconstruction does to it cannot be "
                "measured. Leave out the metrics that need the language model."
            )
        self._is_tried = True

    def _gives_back(self, clean: CleanPass) -> bool:
        try:
            again_BTD = self.patched(clean, clean.x_BTD)
        except (RuntimeError, TypeError, AttributeError, IndexError, KeyError, ValueError):
            if self.reruns_all:
                raise
            return False  # the decoder asks something of its blocks that a stand-in has not
        return same_vectors(again_BTD, clean.final_BTD)

    @contextmanager
    def _standing_in(self, entry_BTD: Tensor, rest: Any) -> Iterator[None]:
        """Stand-ins for the first blocks; those after see entry_BTD."""
        blocks = self._hooked.blocks
        originals = [blocks[place] for place in range(self._n_skipped)]
        try:
            for place, original in enumerate(originals):
                blocks[place] = _StandIn(original, entry_BTD, rest)
            yield
        finally:
            for place, original in enumerate(originals):
                blocks[place] = original


class _StandIn(nn.Module):
    """Gives the same tensor whatever it is called with, in a block's form; has its attributes."""

    def __init__(self, original: nn.Module, given_BTD: Tensor, rest: Any) -> None:
        super().__init__()
        self.original = original
        self._given_BTD, self._rest = given_BTD, rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._given_BTD if self._rest is None else (self._given_BTD, *self._rest)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class _Given(nn.Module):
    """In place of a decoder: hidden states that are there already."""

    def __init__(self, final_BTD: Tensor) -> None:
        super().__init__()
        self._final_BTD = final_BTD

    def forward(self, *args: Any, **kwargs: Any) -> _HiddenStates:
        return _HiddenStates(self._final_BTD)


class _HiddenStates:
    """A decoder's output: last_hidden_state, first in order, and None for whatever else a head
    passes on (each model's output has other names)."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def _tensor_of(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, tuple) else value
    return found


def _catch(tap: Tap, caught: dict[str, Any], name: str) -> Any:
    """A hook that keeps what goes through a tap."""

    def keep(value: Any) -> None:
        caught[name] = value

    if tap.end == "output":
        return tap.module.register_forward_hook(lambda _module, _args, output: keep(output))
    return tap.module.register_forward_pre_hook(
        lambda _module, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )


@contextmanager
def _replaced(tap: Tap, x_BTD: Tensor) -> Iterator[None]:
    """While it lasts, what goes through a tap is x_BTD."""

    def after(_module: Any, _args: Any, output: Any) -> Any:
        return (x_BTD, *output[1:]) if isinstance(output, tuple) else x_BTD

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (x_BTD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x_BTD}

    if tap.end == "output":
        handle = tap.module.register_forward_hook(after)
    else:
        handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
