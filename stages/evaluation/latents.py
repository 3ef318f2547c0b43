"""Latents as their active entries: what an SAE's encoder gives to metrics.

# B rows, S latents, N active entries, sorted by row and within a row by latent
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..metrics.base import to_float64
from ..sae.support import flat_nonzero, starts_of


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """The latents of B rows in compressed rows, on the device of the SAE.

    values_N: activations, none of them 0; latent_N: int64; starts: int64 (B + 1), row b has the
    entries starts[b] to starts[b + 1].
    """

    values_N: Tensor
    latent_N: Tensor
    starts: Tensor
    d_sae: int

    @classmethod
    def of(cls, latents_BS: Tensor) -> SparseLatents:
        """The entries of a full matrix that are not 0."""
        n_rows, d_sae = latents_BS.shape
        flat_N = flat_nonzero(latents_BS != 0)
        row_N = torch.div(flat_N, d_sae, rounding_mode="floor")
        return cls(
            values_N=latents_BS.reshape(-1)[flat_N],
            latent_N=flat_N - row_N * d_sae,
            starts=starts_of(row_N, n_rows),
            d_sae=d_sae,
        )

    @classmethod
    def joined(cls, parts: list[SparseLatents]) -> SparseLatents:
        """The rows of several, one after another; at least one part."""
        starts, offset = [parts[0].starts], int(parts[0].starts[-1])
        for part in parts[1:]:
            starts.append(part.starts[1:] + offset)
            offset += int(part.starts[-1])
        return cls(
            values_N=torch.cat([part.values_N for part in parts]),
            latent_N=torch.cat([part.latent_N for part in parts]),
            starts=torch.cat(starts),
            d_sae=parts[0].d_sae,
        )

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def counts_B(self) -> Tensor:
        """Active entries of each row, int64 (B,)."""
        return self.starts.diff()

    @cached_property
    def row_N(self) -> Tensor:
        """The row of each entry, int64 (N,)."""
        rows_B = torch.arange(self.n_rows, device=self.starts.device)
        return torch.repeat_interleave(rows_B, self.counts_B)

    def dense(self) -> Tensor:
        """The full matrix (B, S)."""
        latents_BS = self.values_N.new_zeros(self.n_rows, self.d_sae)
        latents_BS[self.row_N, self.latent_N] = self.values_N
        return latents_BS

    def fired_S(self) -> Tensor:
        """Rows on which each latent is not 0, int64 (S,)."""
        return torch.bincount(self.latent_N, minlength=self.d_sae)

    def row_sums(self, weight_N: Tensor) -> Tensor:
        """Of a number for each entry: the sum of each row, float64 (B,)."""
        weight_N = to_float64(weight_N)
        sums_B = weight_N.new_zeros(self.n_rows)
        return sums_B.index_add_(0, self.row_N.to(weight_N.device), weight_N)

    def rows(self, start: int, stop: int) -> SparseLatents:
        """Rows start to stop."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        return SparseLatents(
            values_N=self.values_N[first:last],
            latent_N=self.latent_N[first:last],
            starts=self.starts[start : stop + 1] - first,
            d_sae=self.d_sae,
        )
