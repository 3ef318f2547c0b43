"""Ablation sparsity: how few logits a latent's ablation changes.

# A ablations (active latents of one token), H horizon, V vocabulary, D d_model

Definition of Gao et al. 2024 (arXiv 2406.04093, "Sparsity of ablation effects"), written down from
memory of the paper and not checked against it: one active latent f_i of one token is set to 0; the
differences of the logits at that token and the H - 1 after it, less their median at each position
(a constant changes no probability), are one vector d of H * V numbers, whose effective number of
entries is (||d||_1 / ||d||_2)^2.

    ablation_sparsity    its mean over ablations, divided by H * V: 0 to 1, smaller is sparser
    effective_logits     the mean itself, in logits

Here the reconstruction's error stays: x becomes x - f_i W_dec,i and not x_hat - f_i W_dec,i. Tokens
are one of each context, drawn by its number; of its active latents `latents` are drawn. An ablation
that changes nothing at all (a decoder row of 0) does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...storage.counter import draw, permutation, stream_key
from ..evaluation.bootstrap import Resamples, bootstrapped, described, units_of, valued
from ..evaluation.judged import Judged
from ..evaluation.text import TextBatch
from .base import Direction, MetricResult, to_float64
from .rows import ratio


class AblationSparsity:
    """Effective numbers of each SAE's ablations, with the unit (document) of their token."""

    definition: ClassVar[str] = (
        "mean over ablated active latents of (L1 / L2)^2 of the logit differences, divided by their "
        "number"
    )
    direction: ClassVar[Direction] = "down"
    version: ClassVar[int] = 1

    def __init__(self, tokens: int = 32, latents: int = 4, horizon: int = 16) -> None:
        """tokens: of the sample, one a context; latents: ablated at each; horizon: H above."""
        self.tokens, self.latents, self.horizon = tokens, latents, horizon
        self._n_tokens = 0
        self._found: dict[int, list[tuple[int, float, float]]] = {}

    @property
    def options(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "latents": self.latents, "horizon": self.horizon}

    def observe(self, text: TextBatch, judged: Sequence[Judged]) -> None:
        for context in range(len(text.tokens_BT)):
            if self._n_tokens == self.tokens:
                return
            ends = int(text.length_B[context]) - self.horizon
            eligible = np.flatnonzero(text.rows_BT[context, : max(ends + 1, 0)])
            if len(eligible) == 0:
                continue
            number = text.first_context + context
            key = stream_key(0, "ablated token", number)
            position = int(eligible[int(draw(key, 0)) % len(eligible)])
            self._n_tokens += 1
            for each in judged:
                self._ablate(text, each, context, position)

    @torch.inference_mode()
    def _ablate(self, text: TextBatch, judged: Judged, context: int, position: int) -> None:
        x_D = text.clean.x_BTD[context, position]
        latents = judged.encode(x_D[None])
        n_active = len(latents.values_N)
        found = self._found.setdefault(id(judged), [])
        if n_active == 0:
            return
        key = stream_key(0, "ablated latents", text.first_context + context)
        chosen = torch.from_numpy(permutation(key, n_active)[: self.latents].copy())
        chosen = chosen.to(latents.latent_N.device)
        parts_AD = latents.values_N[chosen, None] * judged.W_dec[latents.latent_N[chosen]]
        stop = position + self.horizon
        one = text.clean.part(slice(context, context + 1), stop, copies=len(chosen))
        x_ATD = one.x_BTD.clone()
        x_ATD[:, position] -= parts_AD.to(x_ATD)
        after_AHD = text.model.patched(one, x_ATD)[:, position:stop]
        before_HV = text.model.logits(one.final_BTD[0, position:stop])
        unit = int(text.unit_BT[context, position])
        for after_HD in after_AHD:
            number, share = effective_number(text.model.logits(after_HD) - before_HV)
            if np.isfinite(number):
                found.append((unit, number, share))

    def result(self, judged: Judged, *, seed: int) -> MetricResult:
        found = self._found.get(id(judged), [])
        unit_A, n_units = units_of([unit for unit, _, _ in found])
        weights = {
            "ablations": [1.0] * len(found),
            "number": [number for _, number, _ in found],
            "share": [share for _, _, share in found],
        }
        by_unit = {
            name: np.bincount(unit_A, each, minlength=n_units).astype(np.float64)
            for name, each in weights.items()
        }
        resamples = Resamples(n_units, seed)
        totals_R = bootstrapped(by_unit, resamples) if resamples.is_possible else None
        values = {}
        for name, key in (("ablation_sparsity", "share"), ("effective_logits", "number")):
            point = float(ratio(by_unit[key].sum(), by_unit["ablations"].sum()))
            replicates = None
            if totals_R is not None:
                replicates = ratio(totals_R[key], totals_R["ablations"])
            values[name] = valued(point, replicates)
        return MetricResult(
            values=values,
            sample={"tokens": self._n_tokens, "ablations": len(found), "documents": n_units},
            interval=described("documents", n_units),
        )


def effective_number(difference_HV: Tensor) -> tuple[float, float]:
    """(L1 / L2)^2 of logit differences less their median at each position, and its share of H V.

    NaN where nothing differs.
    """
    d_HV = to_float64(difference_HV)
    d_HV = d_HV - d_HV.median(dim=1, keepdim=True).values
    norm = float(d_HV.norm())
    if norm == 0:
        return float("nan"), float("nan")
    number = (float(d_HV.abs().sum()) / norm) ** 2
    return number, number / d_HV.numel()
