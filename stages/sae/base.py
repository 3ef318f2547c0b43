"""What all SAEs share: parameters, pre-activations, encoding, decoding, folding the norm factor.

# B rows, D d_in, S d_sae

While it is fitted an SAE sees rows divided by the norm factor; before it is saved the factor is
folded into biases and threshold, so that a loaded one takes raw activations.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ...storage.errors import InputError
from ..parallel import ALONE, Group
from .initialise import unit_rows
from .support import SparseSupport, Support, entries_at, row_dots, support_of

if TYPE_CHECKING:
    from ..fitconfig import FitConfig


@dataclass(frozen=True)
class TrainingPass:
    """What one pass over a batch gives the trainer.

    loss: all terms but the auxiliary loss of dead latents; parts: its terms, for the log
    (of the rows of this process, if there are more: whole_batch.py)
    pre_BS: pre-activations of all latents, without gradients, in memory that the next pass of any
        SAE of the thread reuses
    fired_S: which latents were active on at least one row; l0: active latents per row, mean over B
    smallest_kept: what the threshold averages; not finite when nothing fired; None without one
    """

    loss: Tensor
    parts: Mapping[str, Tensor]
    x_hat_BD: Tensor
    centred_BD: Tensor
    pre_BS: Tensor
    fired_S: Tensor
    l0: Tensor
    smallest_kept: Tensor | None = None


class Workspace:
    """Memory for pre-activations, kept from pass to pass: fresh pages cost more than filling them.

    SAEs that step in one thread take turns with the same memory, whose contents last until another
    asks for it; it is freed with the last of them. One that is private shares with none.
    """

    _all: ClassVar[WeakValueDictionary[tuple[object, ...], _Buffer]] = WeakValueDictionary()

    def __init__(self, *, private: bool = False) -> None:
        self._owner = self if private else None
        self._held: dict[tuple[int, str], _Buffer] = {}

    def like(self, name: str, shape: tuple[int, int], of: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised matrix on the device of another tensor."""
        place = threading.get_ident(), name
        key = (id(self._owner), *place, shape, dtype, of.device)
        buffer = self._all.get(key)
        if buffer is None:
            buffer = self._all[key] = _Buffer(torch.empty(shape, dtype=dtype, device=of.device))
        self._held[place] = buffer
        return buffer.matrix

    def __deepcopy__(self, memo: object) -> Workspace:
        return Workspace()


class _Buffer:
    """A matrix that several may hold, and that goes when none does."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix


class Sae(nn.Module, ABC):
    """A sparse autoencoder with W_enc (D, S), b_enc (S), W_dec (S, D), b_dec (D).

    k is the L0 asked for; None where only a coefficient of sparsity was given.
    """

    # How the fit goes about it; no part of what is saved.
    reference: bool = False  # the reference trainers' behaviour where ours is another
    low_precision: bool = False  # latents are chosen by bfloat16 products
    group: Group = ALONE  # the processes that have the other rows of a batch
    low_products: bool = False  # full matrices are multiplied in bfloat16, off the CPU

    def __init__(self, *, d_in: int, d_sae: int, k: int | None) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        # Both have a latent's numbers side by side, (S, D) in memory: sparse gradients come so.
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.add_biases()
        self._workspace = Workspace()

    def add_biases(self) -> None:
        """Register what else there is beside W_enc, W_dec and b_dec."""
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    @classmethod
    def options_from(cls, config: FitConfig) -> dict[str, Any]:
        """Constructor arguments beyond d_in, d_sae and k that a fit's config decides."""
        return {}

    @property
    def options(self) -> dict[str, Any]:
        """The same arguments of this SAE, as its config.json keeps them."""
        return {}

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether the encoder sees x - b_dec."""
        return True

    @property
    def has_unit_rows(self) -> bool:
        """Whether decoder rows are held at unit norm."""
        return True

    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every saved tensor; the sizes of a file are checked against it on loading."""
        return {name: tuple(value.shape) for name, value in self.state_dict().items()}

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        """Decoder rows of unit norm, encoder tied to them, biases 0.

        Drawn on the CPU, so that a seed means the same weights on every device.
        """
        self._tie_to(unit_rows(self.d_sae, self.d_in, torch.Generator().manual_seed(seed)))

    def _tie_to(self, rows_SD: Tensor) -> None:
        self.W_dec.copy_(rows_SD)
        self.W_enc.copy_(rows_SD.T)

    @torch.no_grad()
    def start_from(self, x_BD: Tensor) -> None:
        """Whatever the first batch decides."""

    @torch.no_grad()
    def set_threshold_(self, threshold: float) -> None:
        """Of an SAE as `initialise_` leaves it: latents become active where (x - b_dec) W_enc, or
        x W_enc, is above the threshold. One that keeps k a row regardless has nothing to set."""
        self.b_enc.fill_(-threshold)

    # --- training ---

    @abstractmethod
    def training_pass(self, x_BD: Tensor, sparsity: Tensor | float = 0.0) -> TrainingPass:
        """Losses of one batch, with gradients; changes no state that a checkpoint holds.

        sparsity: weight of the sparsity term in this step.
        """

    @contextmanager
    def own_workspace(self) -> Iterator[Workspace]:
        """Passes inside work in memory that stays for as long as what this yields is held."""
        before, self._workspace = self._workspace, Workspace(private=True)
        try:
            yield self._workspace
        finally:
            self._workspace = before

    def centred(self, x_BD: Tensor) -> Tensor:
        """What the encoder's product takes, without gradients: b_dec's comes by `encoder_bias`."""
        return x_BD - self.b_dec.detach() if self.subtracts_b_dec else x_BD

    def encoder_bias(self, own_S: Tensor | None) -> Tensor:
        """The bias of the encoder (own_S; None is 0), and in its gradient that of x - b_dec.

        d/d b_dec is -W_enc times the column sums of d/d pre, a vector product. Subtracting b_dec
        inside the graph would make autograd form the whole (B, D) gradient of x first, at the
        price of a second encoder product.
        """
        if own_S is None:
            own_S = self.b_dec.new_zeros(self.d_sae)
        if not self.subtracts_b_dec:
            return own_S
        bias: Tensor = _ShiftedBias.apply(own_S, self.b_dec, self.W_enc.detach())  # type: ignore[no-untyped-call]
        return bias

    @torch.no_grad()
    def pre_activations(self, centred_BD: Tensor, bias_S: Tensor | None) -> Tensor:
        """centred W_enc + bias (B, S), in memory that the next call overwrites."""
        shape = (len(centred_BD), self.d_sae)
        if not self.low_precision:
            pre_BS = self._workspace.like("pre", shape, centred_BD, centred_BD.dtype)
            if bias_S is None:
                return torch.mm(centred_BD, self.W_enc, out=pre_BS)
            return torch.addmm(bias_S, centred_BD, self.W_enc, out=pre_BS)
        low = torch.bfloat16
        pre_BS = self._workspace.like("pre", shape, centred_BD, low)
        w_enc_DS = self.W_enc.to(low)
        if bias_S is None:
            return torch.mm(centred_BD.to(low), w_enc_DS, out=pre_BS)
        return torch.addmm(bias_S.to(low), centred_BD.to(low), w_enc_DS, out=pre_BS)

    def entries(
        self, pre_BS: Tensor, centred_BD: Tensor, bias_S: Tensor | None, flat_N: Tensor
    ) -> SparseSupport:
        """The support of ascending flat indices, its numbers in full precision."""
        support = entries_at(pre_BS, flat_N)
        return self._exact(support, centred_BD, bias_S) if self.low_precision else support

    def support(
        self, pre_BS: Tensor, centred_BD: Tensor, bias_S: Tensor | None, wanted_BS: Tensor
    ) -> Support:
        """The support of the wanted entries, whichever form is faster."""
        dtype = self.W_dec.dtype
        support = support_of(pre_BS, wanted_BS, dtype, low_products=self.low_products)
        if isinstance(support, SparseSupport) and self.low_precision:
            return self._exact(support, centred_BD, bias_S)
        return support

    @torch.no_grad()
    def _exact(
        self, support: SparseSupport, centred_BD: Tensor, bias_S: Tensor | None
    ) -> SparseSupport:
        pre_N = row_dots(centred_BD, support.row_N, self.W_enc.T, support.latent_N)
        if bias_S is not None:
            pre_N += bias_S[support.latent_N]
        support.pre_N = pre_N
        return support

    # --- inference ---

    @property
    def offset(self) -> Tensor | None:
        """The bias of the product that `activate` starts from."""
        return self.b_enc

    @abstractmethod
    def activate(self, pre_BS: Tensor) -> Tensor:
        """Latents of pre-activations, row by row."""

    def encode(self, x_BD: Tensor) -> Tensor:
        """Latents of activations (..., D), each row for itself. Raises InputError on another D."""
        if x_BD.shape[-1] != self.d_in:
            raise InputError(
                f"Activations have d_in={x_BD.shape[-1]}, but the SAE expects {self.d_in}. "
                "Pass activations of the model and layer that it was fitted on."
            )
        flat_BD = x_BD.reshape(-1, self.d_in).to(self.W_enc.dtype)
        if self.subtracts_b_dec:
            flat_BD = flat_BD - self.b_dec
        pre_BS = flat_BD @ self.W_enc
        latents_BS = self.activate(pre_BS if self.offset is None else pre_BS + self.offset)
        return latents_BS.reshape(*x_BD.shape[:-1], self.d_sae)

    def decode(self, latents_BS: Tensor) -> Tensor:
        """Reconstruction of activations from latents (..., S)."""
        return latents_BS @ self.W_dec + self.b_dec

    def forward(self, x_BD: Tensor) -> Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x_BD))

    @property
    def is_ready(self) -> bool:
        """Whether inference keeps about k latents a row; needs the threshold where one is used."""
        return True

    @torch.no_grad()
    def fold_norm_factor_(self, norm_factor: float) -> None:
        """From rows divided by the factor to raw rows: what is added to x or f is scaled by it.

        relu((x / c - b) W + e) = relu((x - c b) W + c e) / c, so latents become c times larger and
        a threshold with them, and the decoder keeps its rows.
        """
        for name, value in self.named_parameters():
            if name in self.scaled_by_norm:
                value.mul_(norm_factor)

    scaled_by_norm: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")


class _ShiftedBias(torch.autograd.Function):
    """own - (b_dec - b_dec) W_enc: the value of `own`, the gradients of both."""

    @staticmethod
    def forward(ctx: Any, own_S: Tensor, b_dec_D: Tensor, w_enc_DS: Tensor) -> Tensor:
        ctx.save_for_backward(w_enc_DS)
        return own_S.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (w_enc_DS,) = ctx.saved_tensors
        return grads[0], -(w_enc_DS @ grads[0]), None


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """||x - x_hat||^2, summed over D and averaged over B; with a gradient for x_hat alone."""
    error: Tensor = _SquaredError.apply(x_hat_BD, x_BD)  # type: ignore[no-untyped-call]
    return error


class _SquaredError(torch.autograd.Function):
    """In two passes over memory forward and one backward, where plain autograd takes seven."""

    @staticmethod
    def forward(ctx: Any, x_hat_BD: Tensor, x_BD: Tensor) -> Tensor:
        error_BD = x_hat_BD.detach() - x_BD
        ctx.save_for_backward(error_BD)
        norm: Tensor = torch.linalg.vector_norm(error_BD)
        return norm.square() / len(x_BD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (error_BD,) = ctx.saved_tensors
        return error_BD * (2 * grads[0] / len(error_BD)), None
