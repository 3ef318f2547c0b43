"""Dead fraction: the share of latents that are 0 on all N rows.

N is part of the definition (a rare latent is dead on few rows and alive on many), so it is reported
beside the fraction as `dead_fraction_rows`.
"""

from .base import divide
from .density import FiringCounts


class DeadFraction(FiringCounts):
    def result(self) -> dict[str, float]:
        fired_S = self.rows_fired_S
        n_dead, n_latents = (0, 0) if fired_S is None else (int((fired_S == 0).sum()), len(fired_S))
        fraction = divide(n_dead, n_latents if self.n_rows else 0)
        return {"dead_fraction": fraction, "dead_fraction_rows": self.n_rows}
