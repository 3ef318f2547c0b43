"""Inference-time optimisation: how well the decoder could do with k latents, against the encoder.

# B rows, D d_in, S d_sae, K atoms chosen so far

argmin ||x - b_dec - a W_dec||^2 with at most k entries of a not 0, all of them >= 0, by non-negative
gradient pursuit (Blumensath and Davies 2008, "Gradient pursuits", IEEE Trans. Signal Processing 56;
its use for SAEs is from Rajamanoharan et al. 2024, arXiv 2404.16014, appendix D): the atom of unit
norm with the largest inner product with the residual joins, then the coefficients of those that
have joined go down the gradient, with exact line search, and what would be negative becomes 0.
With some steps for each atom it gives what orthogonal matching pursuit with non-negative least
squares gives (tests/test_ito.py).

Explained variance (no unit) at the same k of three: `ito_explained_variance`; of the encoder's k
latents with the largest ||f_i W_dec,i|| on each row, `encoder_explained_variance`; and `ito_gain`,
the first minus the second. k is the SAE's mean L0 on the sample, rounded, and at most 256, unless
given: then names end in `_k` and the number. The sample is drawn from the rows by their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...storage.counter import draw, stream_key
from ..evaluation.bootstrap import bootstrapped, units_of, valued
from ..evaluation.judged import Judged
from ..evaluation.latents import SparseLatents
from .base import Direction, MetricResult, to_float64
from .rows import Floats, Moments, RowBatch, Rows, UnitSums, ratio

# Of a row's coefficients after each atom: while they are few, when they are many, at the end.
STEPS, FEW_STEPS, LAST_STEPS = 16, 4, 64
_MANY_STEPS_UP_TO = 32  # atoms
_MOST_STEPS = 64  # beyond, several atoms join at once
SAMPLE_ROWS = 256
MOST_K = 256
_BATCH_ROWS, _BATCH_BYTES = 256, 1 << 28


class Ito:
    """Keeps a sample of rows, and pursues them at the end."""

    definition: ClassVar[str] = (
        "explained variance with at most k latents chosen for each row by non-negative gradient "
        "pursuit over the decoder, against the encoder's k largest"
    )
    direction: ClassVar[Direction] = "none"
    version: ClassVar[int] = 1

    def __init__(self, ks: Sequence[int] = (), rows: int = SAMPLE_ROWS) -> None:
        """ks: numbers of latents; none is the SAE's own L0. rows: of the sample."""
        self.ks = tuple(ks)
        self._sample = RowSample(rows)
        self._judged: Judged | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"rows": self._sample.size, "ks": list(self.ks)}

    def observe(self, batch: RowBatch) -> None:
        assert batch.judged is not None, "pursuit needs the decoder"
        self._judged = batch.judged
        self._sample.observe(batch.rows)

    def values(self, data: Moments) -> dict[str, float]:
        return {name: value for name, (value, _) in self._measured(data, seed=None).items()}

    def result(self, data: Moments, *, seed: int) -> MetricResult:
        measured = self._measured(data, seed=seed)
        sample = self._moments(data)
        return MetricResult(
            values={name: valued(value, found) for name, (value, found) in measured.items()},
            sample=sample.sample,
            interval=sample.interval,
            details={"k": self._k_of(self._encoded()[0])} if self._judged and not self.ks else {},
        )

    def _moments(self, data: Moments) -> Moments:
        sample = Moments(data.unit)
        sample.observe(self._sample.rows)
        return sample

    def _encoded(self) -> tuple[SparseLatents, Tensor]:
        assert self._judged is not None
        x_BD = self._sample.rows.x_BD
        return self._judged.encode(x_BD), x_BD

    @staticmethod
    def _k_of(latents: SparseLatents) -> int:
        mean = len(latents.values_N) / max(latents.n_rows, 1)
        return min(max(round(mean), 1), MOST_K, latents.d_sae)

    def _measured(
        self, data: Moments, *, seed: int | None
    ) -> dict[str, tuple[float, Floats | None]]:
        """Each value and its replicates."""
        suffixes = [f"_k{k}" for k in self.ks] or [""]
        if self._judged is None or data.n_rows == 0:
            return {name + s: (float("nan"), None) for s in suffixes for name in _NAMES}
        latents, x_BD = self._encoded()
        ks = self.ks or (self._k_of(latents),)
        moments = self._moments(data)
        resamples = moments.resamples(seed or 0)
        found: dict[str, tuple[float, Floats | None]] = {}
        for k, suffix in zip(ks, suffixes, strict=True):
            errors = UnitSums()
            encoded_BD = self._judged.decode(largest(latents, self._judged.W_dec, k))
            pursued_BD = pursue(x_BD, self._judged, k)
            both = {"encoder": _error(x_BD, encoded_BD), "ito": _error(x_BD, pursued_BD)}
            errors.add(self._sample.rows, both)
            by_unit = {name: errors.of(name, moments.n_units) for name in both}
            totals = {name: sums_U.sum(axis=0) for name, sums_U in by_unit.items()}
            values = _values(totals, moments.totals()["scatter"])
            replicates: dict[str, Floats] = {}
            if seed is not None and resamples.is_possible:
                scatter_R = moments.resampled(resamples)["scatter"]
                replicates = _values(bootstrapped(by_unit, resamples), scatter_R)
            for name, value in values.items():
                found[name + suffix] = (float(value), replicates.get(name))
        return found


_NAMES = ("ito_explained_variance", "encoder_explained_variance", "ito_gain")


def _values(errors: dict[str, Floats], scatter: Floats) -> dict[str, Floats]:
    pursued, encoded = (1 - ratio(errors[name], scatter) for name in ("ito", "encoder"))
    return dict(zip(_NAMES, (pursued, encoded, pursued - encoded), strict=True))


def _error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    return (to_float64(x_BD) - to_float64(x_hat_BD)).square().sum(dim=1)


class RowSample:
    """A uniform sample of all rows met, of a given size: those with the smallest draws.

    The draw of a row depends on its number alone, so that batches do not matter.
    """

    def __init__(self, size: int, purpose: str = "row sample") -> None:
        self.size, self._key = size, stream_key(0, purpose)
        self._draw_B = np.zeros(0, np.uint64)
        self._x_BD: Tensor | None = None
        self._unit_B = np.zeros(0, np.int64)

    def observe(self, rows: Rows) -> None:
        """Consider the rows of one batch."""
        numbers_B = np.arange(rows.first_row, rows.first_row + len(rows.x_BD))
        draw_B = draw(self._key, numbers_B)
        if len(self._draw_B) == self.size:
            place_B = np.flatnonzero(draw_B < self._draw_B[-1])
        else:
            place_B = np.arange(len(draw_B))
        if len(place_B) == 0:
            return
        x_BD = rows.x_BD[torch.from_numpy(place_B).to(rows.x_BD.device)]
        if self._x_BD is not None:
            x_BD = torch.cat([self._x_BD, x_BD])
        draw_B = np.concatenate([self._draw_B, draw_B[place_B]])
        unit_B = np.concatenate([self._unit_B, rows.unit_B[place_B]])
        kept_B = np.argsort(draw_B, kind="stable")[: self.size]
        self._draw_B, self._unit_B = draw_B[kept_B], unit_B[kept_B]
        self._x_BD = x_BD[torch.from_numpy(kept_B).to(x_BD.device)]

    @property
    def rows(self) -> Rows:
        """The sample, its units counted anew from 0."""
        assert self._x_BD is not None, "no rows yet"
        return Rows(self._x_BD, units_of(self._unit_B)[0])


def largest(latents: SparseLatents, w_dec_SD: Tensor, k: int) -> SparseLatents:
    """Of each row the k latents that add most to the reconstruction, by the norm of what they add."""
    weight_N = latents.values_N.abs() * w_dec_SD.norm(dim=1)[latents.latent_N]
    by_weight_N = torch.argsort(weight_N, descending=True, stable=True)
    by_row_N = by_weight_N[torch.argsort(latents.row_N[by_weight_N], stable=True)]
    rank_N = torch.arange(len(by_row_N), device=weight_N.device)
    rank_N = rank_N - latents.starts[:-1][latents.row_N[by_row_N]]
    kept_N = by_row_N[rank_N < k].sort().values
    starts = torch.zeros_like(latents.starts)
    starts[1:] = latents.counts_B.clamp(max=k).cumsum(0)
    return SparseLatents(
        values_N=latents.values_N[kept_N],
        latent_N=latents.latent_N[kept_N],
        starts=starts,
        d_sae=latents.d_sae,
    )


@torch.no_grad()
def pursue(x_BD: Tensor, judged: Judged, k: int) -> Tensor:
    """Reconstructions (B, D) from at most k latents a row, by non-negative gradient pursuit."""
    norm_S = judged.W_dec.norm(dim=1, keepdim=True)
    atoms_SD = judged.W_dec / norm_S.clamp_min(torch.finfo(norm_S.dtype).tiny)
    x_BD = x_BD.to(judged.W_dec) - judged.b_dec
    k = min(k, judged.d_sae)
    row_bytes = 4 * k * (k + judged.d_in)
    n_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
    parts = [_pursued(part, atoms_SD, k) for part in torch.split(x_BD, n_rows)]
    return torch.cat(parts) + judged.b_dec


def _pursued(x_BD: Tensor, atoms_SD: Tensor, k: int) -> Tensor:
    chosen_BK = torch.zeros(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    atoms_BKD = x_BD.new_zeros(len(x_BD), k, x_BD.shape[1])
    gram_BKK, target_BK = x_BD.new_zeros(len(x_BD), k, k), x_BD.new_zeros(len(x_BD), k)
    a_BK = x_BD.new_zeros(len(x_BD), k)
    residual_BD, width = x_BD, -(-k // _MOST_STEPS)
    for start in range(0, k, width):
        stop = min(start + width, k)
        products_BS = residual_BD @ atoms_SD.T
        if start == 0:
            first_BS = products_BS.clone()
        products_BS.scatter_(1, chosen_BK[:, :start], -torch.inf)
        new_BW = products_BS.topk(stop - start, dim=1).indices
        chosen_BK[:, start:stop] = new_BW
        atoms_BKD[:, start:stop] = atoms_SD[new_BW]
        target_BK[:, start:stop] = first_BS.gather(1, new_BW)
        pairs_BKW = atoms_BKD[:, :stop] @ atoms_BKD[:, start:stop].transpose(1, 2)
        gram_BKK[:, :stop, start:stop] = pairs_BKW
        gram_BKK[:, start:stop, :stop] = pairs_BKW.transpose(1, 2)
        steps = STEPS if stop <= _MANY_STEPS_UP_TO else FEW_STEPS
        steps = LAST_STEPS if stop == k else steps
        a_BK[:, :stop] = _descend(
            gram_BKK[:, :stop, :stop], target_BK[:, :stop], a_BK[:, :stop], steps
        )
        residual_BD = x_BD - (a_BK[:, None, :stop] @ atoms_BKD[:, :stop])[:, 0]
    return x_BD - residual_BD


def _descend(gram_BKK: Tensor, target_BK: Tensor, a_BK: Tensor, steps: int) -> Tensor:
    """Coefficients nearer to the non-negative least squares solution over a row's own atoms.

    gram_BKK: products of the atoms with one another; target_BK: with the row.
    """
    for _ in range(steps):
        down_BK = target_BK - _times(gram_BKK, a_BK)
        down_BK = torch.where((a_BK > 0) | (down_BK > 0), down_BK, 0)
        curvature_B = (down_BK * _times(gram_BKK, down_BK)).sum(dim=1)
        length_B = torch.where(curvature_B > 0, down_BK.square().sum(dim=1) / curvature_B, 0)
        a_BK = torch.relu(a_BK + length_B[:, None] * down_BK)
    return a_BK


def _times(matrix_BKK: Tensor, vector_BK: Tensor) -> Tensor:
    return torch.bmm(matrix_BKK, vector_BK[:, :, None])[:, :, 0]
