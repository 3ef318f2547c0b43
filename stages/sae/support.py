"""Which latents of which rows a training pass works on, and encoding and decoding of just those.

# B rows, D d_in, S d_sae, N entries (row, latent), V values: N of a sparse support, (B, S) of a full

Of the five products of a dense step only the encoder's is needed for all latents, to know which are
active. Everything after it touches active entries only: a row's reconstruction is a weighted sum of
few decoder rows, and the gradient of a latent's weights a weighted sum of few batch rows. Both are
`embedding_bag`; the gradient of an activation is a dot product of two rows.

An architecture asks `support_of` for the entries that it needs and writes its loss with `encode`,
`decode`, `per_latent` and plain functions of the values; autograd does the rest. Where many latents
are active (early in the fit of an L1 kind) the support is the full matrix, by the same interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .asking import may_ask

# Of all (row, latent) pairs: beyond this share the dense products are faster on a CPU.
DENSE_SHARE = 0.1
_SUM = 0  # embedding_bag's number for it
_PIECE = 64  # entries that one thread of a GPU adds up


class Support(ABC):
    """A set of (row, latent) pairs of one batch, and what is computed on them."""

    n_rows: int

    @abstractmethod
    def encode(self, x_BD: Tensor, w_enc_DS: Tensor, bias_S: Tensor | None) -> Tensor:
        """x W_enc + bias at the entries (V), with gradients for W_enc and the bias, not for x."""

    @abstractmethod
    def decode(self, values_V: Tensor, w_dec_SD: Tensor) -> Tensor:
        """The sum over each row's entries of value * decoder row: (B, D)."""

    @abstractmethod
    def per_latent(self, parameter_S: Tensor) -> Tensor:
        """A parameter of each latent, laid out so that it combines with values (V)."""

    @abstractmethod
    def row_sums(self, values_V: Tensor) -> Tensor:
        """Sum of the values of each row: (B,)."""

    @abstractmethod
    def latent_sums(self, values_V: Tensor) -> Tensor:
        """Sum of the values of each latent, without gradients: (S,)."""


class SparseSupport(Support):
    """Entries one by one, sorted by row."""

    def __init__(self, pre_N: Tensor, row_N: Tensor, latent_N: Tensor, shape: torch.Size) -> None:
        """pre_N: what `encode` gives at the entries, without gradients; shape: (B, S)."""
        self.pre_N, self.row_N, self.latent_N = pre_N, row_N, latent_N
        self.n_rows, self.n_latents = shape
        self._by_latent: tuple[Tensor, Tensor] | None = None
        self._pieces: tuple[Tensor, Tensor] | None = None

    @property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The order that sorts entries by latent, and where each latent's begin, and the end."""
        if self._by_latent is None:
            latent_N, order_N = torch.sort(self.latent_N, stable=True)
            self._by_latent = order_N, starts_of(latent_N, self.n_latents)
        return self._by_latent

    def sums_by_latent(self, table: Tensor, index_N: Tensor, weight_N: Tensor) -> Tensor:
        """For each latent the sum over its entries n of weight[n] * table[index[n]]: (S, ...)."""
        order_N, starts_S = self.by_latent
        index_N, weight_N = index_N[order_N], weight_N[order_N]
        if may_ask(weight_N):
            return weighted_row_sums(table, index_N, weight_N, starts_S)
        # A thread of embedding_bag adds up a bag entry by entry, and all wait for the latent that is
        # active on half of the rows. So bags are pieces of few entries, and then few pieces.
        if self._pieces is None:
            cuts = torch.arange(0, len(order_N), _PIECE, device=starts_S.device)
            cuts_P = torch.cat([starts_S, cuts]).sort().values
            self._pieces = cuts_P, torch.searchsorted(cuts_P, starts_S)
        cuts_P, firsts_S = self._pieces
        pieces = weighted_row_sums(table, index_N, weight_N, cuts_P)
        all_P = torch.arange(len(pieces), device=pieces.device)
        return weighted_row_sums(pieces, all_P, pieces.new_ones(len(pieces)), firsts_S)

    def encode(self, x_BD: Tensor, w_enc_DS: Tensor, bias_S: Tensor | None) -> Tensor:
        values: Tensor = _EncodeAt.apply(w_enc_DS.T, bias_S, x_BD, self)  # type: ignore[no-untyped-call]
        return values

    def decode(self, values_V: Tensor, w_dec_SD: Tensor) -> Tensor:
        return self.decode_to(values_V, w_dec_SD, self.row_N, self.n_rows)

    def decode_to(self, values_N: Tensor, w_dec_SD: Tensor, bag_N: Tensor, n_bags: int) -> Tensor:
        """The same with the sums in bags (ascending in N) that may be finer than rows."""
        sums: Tensor = _DecodeAt.apply(values_N, w_dec_SD, bag_N, n_bags, self)  # type: ignore[no-untyped-call]
        return sums

    def per_latent(self, parameter_S: Tensor) -> Tensor:
        return parameter_S.index_select(0, self.latent_N)

    def row_sums(self, values_V: Tensor) -> Tensor:
        return values_V.new_zeros(self.n_rows).index_add(0, self.row_N, values_V)

    def latent_sums(self, values_V: Tensor) -> Tensor:
        # Not index_add, which adds in no fixed order on a GPU.
        one, zero_N = values_V.new_ones(1, 1), torch.zeros_like(self.latent_N)
        return self.sums_by_latent(one, zero_N, values_V.detach()).squeeze(1)


class FullSupport(Support):
    """All latents of all rows, as matrices."""

    def __init__(self, pre_BS: Tensor, *, low_products: bool = False) -> None:
        """pre_BS: what `encode` gives, without gradients; low_products: multiply in bfloat16."""
        self.pre_BS, self.n_rows, self.low_products = pre_BS, len(pre_BS), low_products

    def encode(self, x_BD: Tensor, w_enc_DS: Tensor, bias_S: Tensor | None) -> Tensor:
        values: Tensor = _EncodeAll.apply(w_enc_DS.T, bias_S, x_BD, self)  # type: ignore[no-untyped-call]
        return values

    def decode(self, values_V: Tensor, w_dec_SD: Tensor) -> Tensor:
        return self.product(values_V, w_dec_SD)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, in the type of left. Tensor cores add up in float32 whatever they multiply."""
        if not self.low_products:
            return left @ right
        return (left.bfloat16() @ right.bfloat16()).to(left.dtype)

    def per_latent(self, parameter_S: Tensor) -> Tensor:
        return parameter_S

    def row_sums(self, values_V: Tensor) -> Tensor:
        return values_V.sum(dim=1)

    def latent_sums(self, values_V: Tensor) -> Tensor:
        return values_V.detach().sum(dim=0)


def support_of(
    pre_BS: Tensor, wanted_BS: Tensor, dtype: torch.dtype, *, low_products: bool = False
) -> Support:
    """The support of the wanted entries: sparse on a CPU when they are few, else full.

    How many there are is only asked on a CPU, where asking costs nothing: a GPU would wait for it.
    dtype: of the values; low_products: of a full one.
    """
    if may_ask(pre_BS):
        n_wanted = int(torch.count_nonzero(wanted_BS))
        if n_wanted <= DENSE_SHARE * wanted_BS.numel():
            return entries_at(pre_BS, flat_nonzero(wanted_BS))
    return FullSupport(pre_BS.to(dtype), low_products=low_products)


def entries_at(pre_BS: Tensor, flat_N: Tensor) -> SparseSupport:
    """The entries of ascending flat indices row * S + latent."""
    n_latents = pre_BS.shape[1]
    row_N = torch.div(flat_N, n_latents, rounding_mode="floor")
    latent_N = flat_N - row_N * n_latents
    return SparseSupport(pre_BS.view(-1)[flat_N], row_N, latent_N, pre_BS.shape)


def flat_nonzero(mask: Tensor) -> Tensor:
    """Flat indices of what is true, ascending. On a CPU by numpy, in a fifth of torch's time."""
    if mask.device.type == "cpu":
        import numpy as np

        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().squeeze(1)


def starts_of(sorted_N: Tensor, n_bins: int) -> Tensor:
    """Where each of the bins 0 .. n_bins - 1 begins in sorted bin numbers, and the end."""
    edges = torch.arange(n_bins + 1, device=sorted_N.device, dtype=sorted_N.dtype)
    return torch.searchsorted(sorted_N, edges)


def weighted_row_sums(table: Tensor, index_N: Tensor, weight_N: Tensor, starts: Tensor) -> Tensor:
    """For each bag n from starts[b] to starts[b + 1]: the sum of weight[n] * table[index[n]]."""
    return torch.embedding_bag(
        table, index_N, starts, mode=_SUM, per_sample_weights=weight_N, include_last_offset=True
    )[0]


def row_dots(left: Tensor, left_N: Tensor, right: Tensor, right_N: Tensor) -> Tensor:
    """left[left_N[n]] . right[right_N[n]] for each n, without forming either gather.

    It is what embedding_bag needs for the gradient of its weights; torch offers it by that name.
    """
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_N, right_N.new_zeros(1), left_N, _SUM
    )
    return dots


def rows_of(matrix_SD: Tensor, row_N: Tensor) -> Tensor:
    """Rows of a matrix, each asked for once; index_select whose backward pass copies, not adds."""
    rows: Tensor = _RowsOf.apply(matrix_SD, row_N)  # type: ignore[no-untyped-call]
    return rows


class _RowsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix_SD: Tensor, row_N: Tensor) -> Tensor:
        ctx.save_for_backward(row_N)
        ctx.n_rows = len(matrix_SD)
        return matrix_SD.index_select(0, row_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (row_N,) = ctx.saved_tensors
        gradient_SD = grads[0].new_zeros(ctx.n_rows, grads[0].shape[1])
        return gradient_SD.index_copy_(0, row_N, grads[0]), None


class _EncodeAt(torch.autograd.Function):
    """Entries of x W_enc + bias that are known already; their gradients reach W_enc and the bias."""

    @staticmethod
    def forward(
        ctx: Any, w_enc_SD: Tensor, bias_S: Tensor | None, x_BD: Tensor, support: SparseSupport
    ) -> Tensor:
        ctx.save_for_backward(x_BD)
        ctx.support = support
        return support.pre_N.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,), (x_BD,), support = grads, ctx.saved_tensors, ctx.support
        bias_grad_S = support.latent_sums(grad_N) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, bias_grad_S, None, None
        w_grad_SD = support.sums_by_latent(x_BD, support.row_N, grad_N)
        return w_grad_SD, bias_grad_S, None, None


class _EncodeAll(torch.autograd.Function):
    """The same for all entries."""

    @staticmethod
    def forward(
        ctx: Any, w_enc_SD: Tensor, bias_S: Tensor | None, x_BD: Tensor, support: FullSupport
    ) -> Tensor:
        ctx.save_for_backward(x_BD)
        ctx.support = support
        return support.pre_BS.view_as(support.pre_BS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BS,), (x_BD,) = grads, ctx.saved_tensors
        bias_grad_S = grad_BS.sum(dim=0) if ctx.needs_input_grad[1] else None
        w_grad_SD = ctx.support.product(grad_BS.T, x_BD) if ctx.needs_input_grad[0] else None
        return w_grad_SD, bias_grad_S, None, None


class _DecodeAt(torch.autograd.Function):
    """Sums of decoder rows weighted by values."""

    @staticmethod
    def forward(
        ctx: Any,
        values_N: Tensor,
        w_dec_SD: Tensor,
        bag_N: Tensor,
        n_bags: int,
        support: SparseSupport,
    ) -> Tensor:
        ctx.save_for_backward(values_N, w_dec_SD, bag_N)
        ctx.support = support
        return weighted_row_sums(w_dec_SD, support.latent_N, values_N, starts_of(bag_N, n_bags))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_N, w_dec_SD, bag_N = ctx.saved_tensors
        support = ctx.support
        grad_bags = grads[0].contiguous()
        value_grad_N = w_grad_SD = None
        if ctx.needs_input_grad[0]:
            value_grad_N = row_dots(grad_bags, bag_N, w_dec_SD, support.latent_N)
        if ctx.needs_input_grad[1]:
            w_grad_SD = support.sums_by_latent(grad_bags, bag_N, values_N)
        return value_grad_N, w_grad_SD, None, None, None
