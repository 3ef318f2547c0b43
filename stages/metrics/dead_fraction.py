"""Dead fraction: the share of latents that are 0 on all N rows.

# B rows, S d_sae, U units (documents)

No unit. N is part of the definition (a rare latent is dead on few rows and alive on many), so it is
reported beside the fraction as `dead_fraction_rows`.

A bootstrap would not do: a resample has fewer different documents, and so always more dead latents.
The interval is the jackknife's (Efron and Stein 1981), from what the fraction is without each
document in turn: without document u the c_u latents that fire in it alone are dead as well, and the
variance of the number of dead is (U - 1) / U * sum_u (c_u - mean c)^2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from .base import Direction, MetricResult, Value
from .rows import Moments, RowBatch

_NEVER, _SEVERAL = -1, -2
_Z = 1.959964  # of 95 %


class DeadFraction:
    """For each latent: the only unit that it fired in, or none, or several."""

    definition: ClassVar[str] = "share of latents that are 0 on all rows (their number beside it)"
    direction: ClassVar[Direction] = "down"
    version: ClassVar[int] = 1

    def __init__(self) -> None:
        self._unit_S: NDArray[np.int64] | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def observe(self, batch: RowBatch) -> None:
        latents = batch.latents
        if self._unit_S is None:
            self._unit_S = np.full(latents.d_sae, _NEVER)
        unit_B = torch.from_numpy(batch.rows.unit_B).to(latents.latent_N.device)
        unit_N = unit_B[latents.row_N]
        shape = (latents.d_sae,)
        least_S = unit_N.new_full(shape, torch.iinfo(torch.int64).max)
        least_S.scatter_reduce_(0, latents.latent_N, unit_N, "amin")
        most_S = unit_N.new_full(shape, _NEVER).scatter_reduce_(0, latents.latent_N, unit_N, "amax")
        least, most = least_S.cpu().numpy(), most_S.cpu().numpy()
        here = np.where(most == _NEVER, _NEVER, np.where(least == most, most, _SEVERAL))
        before = self._unit_S
        same = (before == here) | (here == _NEVER)
        self._unit_S = np.where(before == _NEVER, here, np.where(same, before, _SEVERAL))

    def values(self, data: Moments) -> dict[str, float]:
        fraction = float("nan")
        if self._unit_S is not None and data.n_rows:
            fraction = float((self._unit_S == _NEVER).mean())
        return {"dead_fraction": fraction, "dead_fraction_rows": data.n_rows}

    def result(self, data: Moments, *, seed: int) -> MetricResult:
        values = self.values(data)
        fraction = values["dead_fraction"]
        n_rows = Value(value=float(data.n_rows))
        if self._unit_S is None or data.n_units < 2:
            point = None if np.isnan(fraction) else fraction
            return MetricResult(
                values={"dead_fraction": Value(value=point), "dead_fraction_rows": n_rows},
                sample=data.sample,
                interval=f"none: fewer than two {data.unit}",
            )
        alone_U = np.bincount(self._unit_S[self._unit_S >= 0], minlength=data.n_units)
        variance = (data.n_units - 1) / data.n_units * np.square(alone_U - alone_U.mean()).sum()
        reach = _Z * float(np.sqrt(variance)) / len(self._unit_S)
        value = Value(
            value=fraction, low=max(fraction - reach, 0.0), high=min(fraction + reach, 1.0)
        )
        return MetricResult(
            values={"dead_fraction": value, "dead_fraction_rows": n_rows},
            sample=data.sample,
            interval=f"95 %, jackknife over {data.unit}",
            details={"dead": int((self._unit_S == _NEVER).sum()), "latents": len(self._unit_S)},
        )
