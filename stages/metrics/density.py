"""Density: the share of rows on which a latent is not 0; its quantiles over latents.

# B rows, S d_sae, G groups of units, R resamples

No unit. The whole vector is `per_latent`; values are its 10th, 50th and 90th percentile and its
maximum, because a mean over latents is only L0 / d_sae. details: a histogram over latents of
log10(density), bins of a quarter, latents that never fire counted apart.

For intervals counts are kept in at most 64 groups of units, which are resampled: counts for each
document would be as large as the store.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluation.bootstrap import Resamples, described, valued
from .base import Direction, MetricResult
from .rows import Floats, Moments, RowBatch

QUANTILES = {"density_p10": 0.1, "density_p50": 0.5, "density_p90": 0.9, "density_max": 1.0}
GROUPS = 64
_RESAMPLES = 200
_EDGES = np.arange(-8, 0.25, 0.25)  # of log10(density)


class Density:
    """Rows on which each latent fired, by group of units."""

    definition: ClassVar[str] = "quantiles over latents of the share of rows on which one is not 0"
    direction: ClassVar[Direction] = "none"
    version: ClassVar[int] = 1

    def __init__(self) -> None:
        self._fired_GS: NDArray[np.int64] | None = None
        self._rows_G = np.zeros(GROUPS, np.int64)

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def observe(self, batch: RowBatch) -> None:
        latents = batch.latents
        if self._fired_GS is None:
            self._fired_GS = np.zeros((GROUPS, latents.d_sae), np.int64)
        group_B = torch.from_numpy(batch.rows.unit_B % GROUPS).to(latents.latent_N.device)
        flat_N = group_B[latents.row_N] * latents.d_sae + latents.latent_N
        counts = torch.bincount(flat_N, minlength=GROUPS * latents.d_sae)
        self._fired_GS += counts.view(GROUPS, -1).cpu().numpy()
        self._rows_G += np.bincount(group_B.cpu().numpy(), minlength=GROUPS)

    @property
    def per_latent(self) -> Floats:
        """Density of each latent (S,)."""
        n_rows = int(self._rows_G.sum())
        if self._fired_GS is None or n_rows == 0:
            return np.full(1, np.nan)
        return np.asarray(self._fired_GS.sum(axis=0) / n_rows)

    def values(self, data: Moments) -> dict[str, float]:
        density_S = self.per_latent
        return {name: float(np.quantile(density_S, q)) for name, q in QUANTILES.items()}

    def result(self, data: Moments, *, seed: int) -> MetricResult:
        values = self.values(data)
        n_groups = min(data.n_units, GROUPS)
        replicates = self._replicates(Resamples(n_groups, seed, _RESAMPLES))
        unit = data.unit if data.n_units <= GROUPS else f"{GROUPS} groups of {data.unit}"
        return MetricResult(
            values={name: valued(value, replicates.get(name)) for name, value in values.items()},
            sample=data.sample,
            interval=described(unit, n_groups, _RESAMPLES),
            details=histogram(self.per_latent) if data.n_rows else {},
        )

    def _replicates(self, resamples: Resamples) -> dict[str, Floats]:
        if self._fired_GS is None or not resamples.is_possible:
            return {}
        n_groups = resamples.n_units
        rows_R = resamples.totals(self._rows_G[:n_groups].astype(np.float64))
        found = []
        place = 0
        for weights in resamples.weights():
            rows = rows_R[place : place + len(weights), None]
            place += len(weights)
            for few, few_rows in zip(
                np.array_split(weights, 8), np.array_split(rows, 8), strict=True
            ):
                if len(few):
                    density_RS = few @ self._fired_GS[:n_groups] / np.maximum(few_rows, 1)
                    found.append(np.quantile(density_RS, list(QUANTILES.values()), axis=1))
        quantiles_QR = np.concatenate(found, axis=1)
        return dict(zip(QUANTILES, quantiles_QR, strict=True))


def histogram(density_S: Floats) -> dict[str, Any]:
    """Latents in bins of log10(density): edges (bins + 1), counts (bins), and those at 0."""
    alive = density_S[density_S > 0]
    counts, _ = np.histogram(np.log10(np.clip(alive, 10.0 ** _EDGES[0], 1.0)), bins=_EDGES)
    return {
        "log10_density_edges": _EDGES.tolist(),
        "latents": counts.tolist(),
        "latents_never": int((density_S == 0).sum()),
    }
