"""Contexts for metrics that need the language model: a batch, with its clean pass.

# B contexts, T positions, D d_model
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .judged import Judged
from .patched import CleanPass, PatchedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class TextBatch:
    """A batch of contexts, shared by all SAEs.

    tokens_BT: token ids; what stands behind a context's length is padding
    rows_BT: positions that yield rows in a store: they are reconstructed, the others (attention
    sinks at first positions) stay as they are, as no SAE was fitted on them
    unit_BT: unit (document) of each token; first_context: number of the first context
    mean_D: mean activation, for ablation
    """

    model: PatchedModel
    tokens_BT: NDArray[np.int64]
    length_B: NDArray[np.int64]
    rows_BT: NDArray[np.bool_]
    unit_BT: NDArray[np.int64]
    first_context: int
    mean_D: Tensor

    @cached_property
    def clean(self) -> CleanPass:
        """The unpatched pass, run once for all metrics."""
        return self.model.clean(torch.from_numpy(self.tokens_BT))

    @cached_property
    def scored_BT(self) -> NDArray[np.bool_]:
        """Positions whose prediction is scored: reconstructed, with a next token in the context."""
        positions_T = np.arange(self.tokens_BT.shape[1])
        return np.asarray(self.rows_BT & (positions_T + 1 < self.length_B[:, None]))

    @cached_property
    def _rows_BT(self) -> Tensor:
        return torch.from_numpy(self.rows_BT).to(self.clean.x_BTD.device)

    def reconstructed(self, judged: Judged) -> Tensor:
        """Activations with the rows replaced by their reconstructions (B, T, D)."""
        rows_BT = self._rows_BT
        x_hat = judged.decode(judged.encode(self.clean.x_BTD[rows_BT]))
        return self._with_rows(x_hat)

    def ablated(self, value_D: Tensor) -> Tensor:
        """Activations with the rows replaced by one vector (B, T, D)."""
        return self._with_rows(value_D.expand(int(self.rows_BT.sum()), -1))

    def _with_rows(self, values: Tensor) -> Tensor:
        x_BTD = self.clean.x_BTD.clone()
        x_BTD[self._rows_BT] = values.to(x_BTD)
        return x_BTD
