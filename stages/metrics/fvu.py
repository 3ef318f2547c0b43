"""Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2, pooled over all rows.

1 - explained variance, kept apart because papers report either.
"""

from .base import FractionUnexplained


class Fvu(FractionUnexplained):
    def result(self) -> dict[str, float]:
        return {"fvu": self.fraction}
