"""Downstream: what the language model loses when activations are replaced by reconstructions.

# B contexts, T positions, P scored positions of a batch, V vocabulary, D d_model, U units

CE is the mean over scored positions of -log p(next token), in nats a token; it is measured clean,
with the reconstruction in place of the activation, with zeros, and with the mean activation, always
at the positions that yield rows (attention sinks stay).

    delta_ce              CE(sae) - CE(clean)
    loss_recovered_zero   1 - (CE(sae) - CE(clean)) / (CE(zero) - CE(clean))
    loss_recovered_mean   the same with mean ablation
    kl                    mean over positions of KL(clean || sae), in nats
    ce_clean, ce_sae, ce_zero, ce_mean

The ratios are those of Rajamanoharan et al. 2024 (arXiv 2404.16014, appendix B); sums are pooled
before dividing. Where ablation does not raise the loss, CE(zero) <= CE(clean) as on an untrained
model, a ratio would mean nothing: it is null, and details.refused says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..evaluation.bootstrap import Resamples, bootstrapped, described, valued
from ..evaluation.judged import Judged
from ..evaluation.text import TextBatch
from .base import Direction, MetricResult, to_float64
from .rows import Floats, ratio

_LOGIT_BYTES = 1 << 26  # of one float32 matrix of logits; a few stand at once
_ABLATIONS = ("clean", "zero", "mean")


class Downstream:
    """Sums of losses by unit, of the clean and ablated passes and of each SAE."""

    definition: ClassVar[str] = (
        "cross-entropy in nats a token with reconstructions in place of activations, against clean "
        "and ablated; loss recovered is 1 - (CE(sae) - CE(clean)) / (CE(ablated) - CE(clean))"
    )
    direction: ClassVar[Direction] = "none"
    version: ClassVar[int] = 1

    def __init__(self) -> None:
        self._sums: dict[str, Floats] = {}
        self._n_contexts = 0

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def observe(self, text: TextBatch, judged: Sequence[Judged]) -> None:
        clean = text.clean
        finals = {
            "clean": clean.final_BTD,
            "zero": text.model.patched(clean, text.ablated(torch.zeros_like(text.mean_D))),
            "mean": text.model.patched(clean, text.ablated(text.mean_D)),
        }
        for each in judged:
            finals[_key(each)] = text.model.patched(clean, text.reconstructed(each))
        context_P, position_P = np.nonzero(text.scored_BT)
        unit_P = text.unit_BT[context_P, position_P]
        next_P = torch.from_numpy(text.tokens_BT[context_P, position_P + 1]).to(text.model.device)
        flat_P = torch.from_numpy(context_P * text.tokens_BT.shape[1] + position_P)
        flat_P = flat_P.to(text.model.device)
        for name, loss_P in losses(text, finals, flat_P, next_P).items():
            self._add(name, unit_P, loss_P)
        self._add("tokens", unit_P, np.ones(len(unit_P)))
        self._n_contexts += len(text.tokens_BT)

    def _add(self, name: str, unit_P: NDArray[np.int64], values_P: Floats) -> None:
        found = np.bincount(unit_P, weights=values_P)
        before = self._sums.get(name, np.zeros(0))
        sums_U = np.zeros(max(len(found), len(before)))
        sums_U[: len(before)] += before
        sums_U[: len(found)] += found
        self._sums[name] = sums_U

    def result(self, judged: Judged, *, seed: int) -> MetricResult:
        key = _key(judged)
        tokens_U = self._sums.get("tokens", np.zeros(0))
        here = tokens_U > 0  # units are numbered over the whole source
        names = ("tokens", "clean", "zero", "mean")
        by_unit = {name: self._sums.get(name, np.zeros(0))[here] for name in names}
        by_unit |= {"sae": self._sums[key][here], "kl": self._sums[f"{key} kl"][here]}
        point = _values({name: sums_U.sum() for name, sums_U in by_unit.items()})
        resamples = Resamples(int(here.sum()), seed)
        replicates = _values(bootstrapped(by_unit, resamples)) if resamples.is_possible else {}
        return MetricResult(
            values={
                name: valued(float(value), replicates.get(name)) for name, value in point.items()
            },
            sample={
                "tokens": int(tokens_U.sum()),
                "contexts": self._n_contexts,
                "documents": int(here.sum()),
            },
            interval=described("documents", int(here.sum())),
            details=_refusals(point),
        )


def _key(judged: Judged) -> str:
    return f"sae {id(judged)}"


def _values(totals: Mapping[str, Floats]) -> dict[str, Floats]:
    """The values, from totals () or (R,)."""
    tokens = np.asarray(totals["tokens"])
    ce = {name: ratio(np.asarray(totals[name]), tokens) for name in (*_ABLATIONS, "sae")}
    delta = ce["sae"] - ce["clean"]
    recovered = {
        f"loss_recovered_{name}": 1 - ratio(delta, np.where(rise > 0, rise, 0.0))
        for name in ("zero", "mean")
        for rise in [ce[name] - ce["clean"]]
    }
    return {
        **recovered,
        "delta_ce": delta,
        "kl": ratio(np.asarray(totals["kl"]), tokens),
        **{f"ce_{name}": value for name, value in ce.items()},
    }


def _refusals(point: Mapping[str, Floats]) -> dict[str, Any]:
    reasons = {
        f"loss_recovered_{name}": f"CE({name}) = {float(point[f'ce_{name}']):.4f} is not above "
        f"CE(clean) = {float(point['ce_clean']):.4f}: ablation does not raise the loss, so that "
        "the ratio has no meaning"
        for name in ("zero", "mean")
        if not point[f"ce_{name}"] > point["ce_clean"]
    }
    return {"refused": reasons} if reasons else {}


@torch.inference_mode()
def losses(
    text: TextBatch, finals: Mapping[str, Tensor], flat_P: Tensor, next_P: Tensor
) -> dict[str, Floats]:
    """-log p(next token) at the scored positions (P,) of each pass, and of the SAEs' ("NAME kl")
    KL(clean || it); both in float64, logits for some positions at a time.
    """
    found: dict[str, list[Tensor]] = {}
    n_vocabulary: int | None = None
    start = 0
    while start < len(flat_P):
        few = 1 if n_vocabulary is None else max(1, _LOGIT_BYTES // (4 * n_vocabulary))
        where, following = flat_P[start : start + few], next_P[start : start + few]
        clean = _log_p(text, finals["clean"], where)
        n_vocabulary = clean.shape[1]
        for name, final_BTD in finals.items():
            log_p = clean if name == "clean" else _log_p(text, final_BTD, where)
            loss = -to_float64(log_p.gather(1, following[:, None])[:, 0])
            found.setdefault(name, []).append(loss)
            if name not in _ABLATIONS:
                kl = to_float64((clean.exp() * (clean - log_p)).sum(dim=1))
                found.setdefault(f"{name} kl", []).append(kl)
        start += few
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}


def _log_p(text: TextBatch, final_BTD: Tensor, where: Tensor) -> Tensor:
    logits_PV = text.model.logits(final_BTD.flatten(0, 1)[where])
    return torch.log_softmax(logits_PV, dim=1)
