"""Mean and variance of rows, mergeable, in float64.

# R rows, D d_in

Chan, Golub, LeVeque 1983 ("Algorithms for computing the sample variance"): the pairwise update of
count, mean and sum of squared deviations. Chunks merge in order into shards and shards in order
into the store, so the result does not depend on who computed what.
"""

import base64
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass
class Moments:
    """count rows; mean (D,); deviations (D,): sum of squared deviations from the mean."""

    count: int
    mean: NDArray[np.float64]
    deviations: NDArray[np.float64]

    @classmethod
    def empty(cls, d_in: int) -> Self:
        return cls(0, np.zeros(d_in), np.zeros(d_in))

    @classmethod
    def of(cls, values_RD: NDArray[np.float32]) -> Self:
        """Moments of one chunk, deviations from its own mean.

        Squares are summed in float32 over runs of 256 rows and in float64 over those: within about
        1e-6 of the exact variance, at a third of the time of float64 throughout.
        """
        mean = values_RD.mean(axis=0, dtype=np.float64)
        rounded = mean.astype(np.float32)
        squares = np.zeros(values_RD.shape[1])
        for start in range(0, len(values_RD), 256):
            centred = values_RD[start : start + 256] - rounded
            squares += np.einsum("rd,rd->d", centred, centred)
        # The mean was rounded to float32 before it was taken away: put that right.
        squares -= len(values_RD) * (mean - rounded) ** 2
        return cls(len(values_RD), mean, np.maximum(squares, 0.0))

    def merge(self, other: "Moments") -> None:
        """Add another set of rows."""
        total = self.count + other.count
        if other.count == 0:
            return
        delta = other.mean - self.mean
        self.deviations += other.deviations + delta**2 * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.count = total

    @property
    def variance(self) -> NDArray[np.float64]:
        """Population variance, (D,)."""
        return self.deviations / max(self.count, 1)

    @property
    def mean_squared_norm(self) -> float:
        """E ||x||^2 over the rows."""
        return float((self.mean**2 + self.variance).sum())

    def to_json(self) -> dict[str, Any]:
        def text(a: NDArray[np.float64]) -> str:
            return base64.b64encode(a.astype("<f8").tobytes()).decode()

        return {
            "count": self.count,
            "mean": text(self.mean),
            "deviations": text(self.deviations),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        def array(text: str) -> NDArray[np.float64]:
            return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)

        return cls(int(value["count"]), array(value["mean"]), array(value["deviations"]))
