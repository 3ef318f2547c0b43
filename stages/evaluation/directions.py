"""A concept's direction as an SAE's decoder sees it.

# D d_in, S d_sae
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .judged import Judged

Floats = NDArray[np.floating[Any]]


def decoder_of(judged: Judged) -> NDArray[np.float64]:
    """W_dec of what is judged, float64 (S, D)."""
    return np.asarray(judged.W_dec.detach().cpu().double().numpy())


@dataclass(frozen=True)
class Direction:
    """along_S: d_i . p, with p the direction of length 1 and d_i a decoder row; cosine_S: of both,
    0 for a decoder row of length 0.
    """

    unit_D: NDArray[np.float64]
    along_S: NDArray[np.float64]
    cosine_S: NDArray[np.float64]

    @classmethod
    def of(cls, weight_D: Floats, W_dec_SD: Floats) -> Self:
        unit_D = np.asarray(weight_D, dtype=np.float64)
        unit_D = unit_D / max(float(np.linalg.norm(unit_D)), np.finfo(np.float64).tiny)
        along_S = W_dec_SD @ unit_D
        length_S = np.sqrt(np.einsum("sd,sd->s", W_dec_SD, W_dec_SD))
        cosine_S = np.divide(along_S, length_S, out=np.zeros_like(along_S), where=length_S > 0)
        return cls(unit_D, along_S, cosine_S)
