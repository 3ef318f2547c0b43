"""Explained variance: 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, pooled over all rows.

mean is that of all rows, per dimension; both sums run over rows and dimensions. At most 1; 0 for an
SAE that always answers the mean; negative for a worse one.
"""

from .base import FractionUnexplained


class ExplainedVariance(FractionUnexplained):
    def result(self) -> dict[str, float]:
        return {"explained_variance": 1 - self.fraction}
