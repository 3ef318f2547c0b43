"""What metrics over rows share: a batch, sums by document, moments of the data.

# B rows of a batch, D d_in, S d_sae, U units (documents), R resamples

Most metrics over rows are functions of a few sums over rows. A `SumMetric` says what is summed and
what the values are, given the totals; the totals are kept by unit, in float64, so that one
bootstrap over units gives every interval, and the batch size cannot matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..evaluation.bootstrap import Resamples, bootstrapped, described, valued
from ..evaluation.judged import Judged
from ..evaluation.latents import SparseLatents
from .base import Direction, MetricResult, to_float64

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations of one batch, shared by all SAEs.

    unit_B: which unit (document) each row belongs to, from 0; first_row: number of the first row.
    """

    x_BD: Tensor
    unit_B: NDArray[np.int64]
    first_row: int = 0

    @cached_property
    def x64_BD(self) -> Tensor:
        """In float64."""
        return to_float64(self.x_BD)

    @cached_property
    def here(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The units in this batch, ascending, and for each row its place among them."""
        units, place_B = np.unique(self.unit_B, return_inverse=True)
        return units, place_B.reshape(-1)


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Rows with the latents and the reconstruction of one SAE.

    judged: that SAE, for metrics that ask more of it (not in the judgement of a fit).
    """

    rows: Rows
    latents: SparseLatents
    x_hat_BD: Tensor
    judged: Judged | None = None

    @cached_property
    def x_hat64_BD(self) -> Tensor:
        """In float64."""
        return to_float64(self.x_hat_BD)

    @cached_property
    def error_B(self) -> Tensor:
        """||x - x_hat||^2 of each row, float64."""
        return (self.rows.x64_BD - self.x_hat64_BD).square().sum(dim=1)

    @cached_property
    def overlap_B(self) -> Tensor:
        """x . x_hat of each row, float64."""
        return (self.rows.x64_BD * self.x_hat64_BD).sum(dim=1)

    @cached_property
    def power_B(self) -> Tensor:
        """||x_hat||^2 of each row, float64."""
        return self.x_hat64_BD.square().sum(dim=1)


class UnitSums:
    """Sums by unit, of scalars (U,) or vectors (U, D); grows with the units that it meets."""

    def __init__(self) -> None:
        self._sums: dict[str, Floats] = {}

    def add(self, rows: Rows, values: Mapping[str, Tensor]) -> None:
        """Add values of each row, float64 (B,) or (B, D)."""
        units, place_B = rows.here
        if len(units) == 0:
            return
        for name, value in values.items():
            own = value.new_zeros(len(units), *value.shape[1:])
            own.index_add_(0, torch.from_numpy(place_B).to(value.device), value)
            sums_U = self._room(name, int(units[-1]) + 1, own.shape[1:])
            sums_U[units] += own.cpu().numpy()

    def _room(self, name: str, n_units: int, shape: torch.Size) -> Floats:
        found = self._sums.get(name)
        if found is None or len(found) < n_units:
            more = np.zeros((max(n_units, 2 * len(found) if found is not None else 1), *shape))
            if found is not None:
                more[: len(found)] = found
            found = self._sums[name] = more
        return found

    def of(self, name: str, n_units: int) -> Floats:
        """One sum (n_units, ...); zeros where nothing was added."""
        found = self._sums.get(name)
        if found is None:
            return np.zeros(n_units)
        out = np.zeros((n_units, *found.shape[1:]))
        out[: min(n_units, len(found))] = found[:n_units]
        return np.asarray(out)

    @property
    def names(self) -> list[str]:
        return list(self._sums)


class Moments:
    """Number of rows, and sum ||x - mean||^2, of all rows or of any resample of units.

    From sums of x - c and ||x - c||^2 by unit, with c the mean of the first batch: sums of x and
    ||x||^2 themselves would cancel where the mean is large. unit: what rows are grouped by, plural.
    """

    def __init__(self, unit: str = "documents") -> None:
        self.unit = unit
        self.n_units = self.n_rows = 0
        self._centre_D: Tensor | None = None
        self._sums = UnitSums()
        self._resampled: tuple[Resamples, Floats, Floats] | None = None

    def observe(self, rows: Rows) -> None:
        """Count one batch."""
        if len(rows.x_BD) == 0:
            return
        if self._centre_D is None:
            self._centre_D = rows.x64_BD.mean(dim=0)
        shifted_BD = rows.x64_BD - self._centre_D
        ones_B = torch.ones(len(shifted_BD), dtype=torch.float64)
        squares_B = shifted_BD.square().sum(dim=1)
        self._sums.add(rows, {"rows": ones_B, "shifted": shifted_BD, "squares": squares_B})
        self.n_rows += len(rows.x_BD)
        self.n_units = max(self.n_units, int(rows.unit_B.max()) + 1)
        self._resampled = None

    def totals(self) -> dict[str, Floats]:
        """n_rows and scatter, each (), over all rows."""
        rows, scatter = self._from_sums(*(sums_U.sum(axis=0) for sums_U in self._by_unit()))
        return {"n_rows": rows, "scatter": scatter}

    def resampled(self, resamples: Resamples) -> dict[str, Floats]:
        """The same in each resample: (R,)."""
        if self._resampled is None or self._resampled[0] != resamples:
            parts = (resamples.totals(sums_U) for sums_U in self._by_unit())
            self._resampled = (resamples, *self._from_sums(*parts))
        return {"n_rows": self._resampled[1], "scatter": self._resampled[2]}

    def mean(self) -> Floats:
        """Mean of all rows (D,)."""
        assert self._centre_D is not None, "no rows yet"
        _, shifted_UD, _ = self._by_unit()
        mean_D: Floats = self._centre_D.cpu().numpy() + shifted_UD.sum(axis=0) / self.n_rows
        return mean_D

    def resamples(self, seed: int) -> Resamples:
        return Resamples(self.n_units, seed)

    @property
    def sample(self) -> dict[str, int]:
        """The sample of a metric over all rows."""
        return {"rows": self.n_rows, self.unit.replace(" ", "_"): self.n_units}

    @property
    def interval(self) -> str:
        return described(self.unit, self.n_units)

    def _by_unit(self) -> tuple[Floats, Floats, Floats]:
        rows, shifted, squares = (
            self._sums.of(name, self.n_units) for name in ("rows", "shifted", "squares")
        )
        return rows, shifted, squares

    @staticmethod
    def _from_sums(n_rows: Floats, shifted: Floats, squares: Floats) -> tuple[Floats, Floats]:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_part = np.square(shifted).sum(axis=-1) / n_rows
        scatter = np.maximum(squares - np.where(n_rows > 0, mean_part, 0.0), 0.0)
        return np.asarray(n_rows), np.asarray(scatter)


class SumMetric(ABC):
    """A metric that is a function of sums over rows."""

    definition: ClassVar[str]
    direction: ClassVar[Direction] = "none"
    version: ClassVar[int] = 1

    def __init__(self) -> None:
        self._sums = UnitSums()

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def sums(self, batch: RowBatch) -> dict[str, Tensor]:
        """What is summed: a number of each row, float64 (B,)."""

    @abstractmethod
    def of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        """The values, from totals of the sums, `n_rows` and `scatter` = sum ||x - mean||^2.

        Element by element: totals are () over all rows, or (R,), one for each resample.
        """

    def observe(self, batch: RowBatch) -> None:
        self._sums.add(batch.rows, self.sums(batch))

    def values(self, data: Moments) -> dict[str, float]:
        if data.n_rows == 0:
            return dict.fromkeys(self.names, float("nan"))
        totals = {name: sums_U.sum(axis=0) for name, sums_U in self._by_unit(data).items()}
        return {name: float(value) for name, value in self._of(totals | data.totals()).items()}

    def result(self, data: Moments, *, seed: int) -> MetricResult:
        values = self.values(data)
        replicates: dict[str, Floats] = {}
        resamples = data.resamples(seed)
        if resamples.is_possible:
            totals_R = bootstrapped(self._by_unit(data), resamples)
            replicates = self._of(totals_R | data.resampled(resamples))
        return MetricResult(
            values={name: valued(value, replicates.get(name)) for name, value in values.items()},
            sample=data.sample,
            interval=data.interval,
        )

    @property
    def names(self) -> list[str]:
        """Names of the values."""
        one = {name: np.ones(()) for name in (*self.summed, "n_rows", "scatter")}
        return list(self.of(one))

    summed: ClassVar[tuple[str, ...]]  # names of the sums

    def _by_unit(self, data: Moments) -> dict[str, Floats]:
        return {name: self._sums.of(name, data.n_units) for name in self.summed}

    def _of(self, totals: Mapping[str, Floats]) -> dict[str, Floats]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.of(totals)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient, NaN where the denominator is 0."""
    return np.where(
        denominator == 0, np.nan, numerator / np.where(denominator == 0, 1, denominator)
    )
