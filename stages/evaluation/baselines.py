"""What a number has to be compared with: SAEs that know nothing, judged like the others.

# B rows, D d_in, S d_sae

untrained        the SAE as a fit of it begins, with a threshold on its pre-activations that gives
                 the fitted one's L0 on a sample of rows (TopK keeps its k)
random latents   latents that fire whatever the row: each as often as the SAE's and with its mean
                 activation, drawn for each row by a hash of its bits; the SAE's own decoder
mean             no latents, and the mean of the sample as every reconstruction

SAEs of one shape share them: those of the first stand for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..metrics.base import to_float64
from .judged import Judged, JudgedSae

UNTRAINED, RANDOM, MEAN = BASELINES = ("untrained", "random latents", "mean")
_PRE_VALUES = 1 << 24  # pre-activations that a threshold is found among
_GAMMA = -7046029254386353131  # splitmix64's constants, as signed integers
_M1, _M2 = -4658895280553007687, -7723592293110705685


def baseline_facts(facts: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The `run` section of a baseline of a run."""
    own: dict[str, Any] = {
        "baseline": kind,
        "of": facts["name"],
        "name": f"{facts['name']} ({kind})",
    }
    if kind == MEAN:
        own |= {"arch": None, "k": None, "d_sae": None, "seed": None}
    if kind != RANDOM:
        own |= {"steps": 0, "tokens": 0, "recipe": {}}
    return {**facts, **own}


def shape_of(facts: Mapping[str, Any], kind: str) -> tuple[Any, ...]:
    """What SAEs have in common that share a baseline of a kind."""
    origin = tuple(facts.get(name) for name in ("model", "model_revision", "layer", "hook", "d_in"))
    if kind == MEAN:
        return origin
    recipe = facts.get("recipe") or {}
    return (*origin, facts["arch"], facts["k"], facts["d_sae"], recipe.get("sparsity"))


def make_baseline(kind: str, judged: JudgedSae, sample_BD: Tensor) -> Judged:
    """A baseline of an SAE, calibrated on a sample of rows on its device."""
    facts = baseline_facts(judged.facts, kind)
    if kind == UNTRAINED:
        return untrained(judged, sample_BD, facts)
    if kind == RANDOM:
        return RandomLatents(judged, sample_BD, facts)
    assert kind == MEAN, kind
    return MeanPredictor(judged, sample_BD, facts)


def baselines_of(judged: JudgedSae, sample_BD: Tensor) -> list[Judged]:
    """All of them."""
    return [make_baseline(kind, judged, sample_BD) for kind in BASELINES]


@torch.no_grad()
def untrained(judged: JudgedSae, sample_BD: Tensor, facts: Mapping[str, Any]) -> JudgedSae:
    """An SAE of the same shape as a fit begins it, with the L0 of the fitted one."""
    fitted = judged.sae
    sae = type(fitted)(d_in=fitted.d_in, d_sae=fitted.d_sae, k=fitted.k, **fitted.options)
    sae.initialise_(int(facts.get("seed") or 0))
    sae = sae.to(judged.device)
    sample_BD = sample_BD.to(judged.device, torch.float32)
    sae.start_from(sample_BD)
    few_BD = sample_BD[: max(1, _PRE_VALUES // sae.d_sae)]
    l0 = len(judged.encode(few_BD).values_N) / len(few_BD)
    centred_BD = few_BD - sae.b_dec if sae.subtracts_b_dec else few_BD
    pre = (centred_BD @ sae.W_enc).flatten()
    kept = min(max(round(l0 * len(few_BD)), 1), len(pre))
    sae.set_threshold_(float(pre.topk(kept, sorted=False).values.min()))
    return JudgedSae(sae, facts)


class RandomLatents(Judged):
    """Latents that have nothing to do with the row, at the frequencies of an SAE's."""

    def __init__(self, judged: Judged, sample_BD: Tensor, facts: Mapping[str, Any]) -> None:
        super().__init__(W_dec=judged.W_dec, b_dec=judged.b_dec, facts=facts)
        latents = judged.encode(sample_BD)
        fired_S = latents.fired_S()
        values_N = to_float64(latents.values_N)
        sums_S = values_N.new_zeros(self.d_sae)
        sums_S.index_add_(0, latents.latent_N.to(values_N.device), values_N)
        mean_S = sums_S / to_float64(fired_S.clamp(min=1))
        self._mean_S = mean_S.float().to(self.device)
        # Draws are of 53 bits: a latent fires where its draw is below this.
        below_S = to_float64(fired_S) / max(latents.n_rows, 1) * 2.0**53
        self._below_S = below_S.long().to(self.device)
        generator = torch.Generator().manual_seed(0)
        odd_D = torch.randint(0, 1 << 62, (self.d_in,), generator=generator) * 2 + 1
        self._odd_D = odd_D.to(self.device)
        self._counter_S = torch.arange(self.d_sae, device=self.device) * _GAMMA

    def latents(self, x_BD: Tensor) -> Tensor:
        bits_BD = x_BD.contiguous().view(torch.int32).long()
        key_B = _mixed((bits_BD * self._odd_D).sum(dim=1))
        draw_BS = _shifted(_mixed(key_B[:, None] + self._counter_S), 11)
        return torch.where(draw_BS < self._below_S, self._mean_S, 0)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """The logical right shift of 64-bit integers, of which torch has the arithmetic one."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: Tensor) -> Tensor:
    """splitmix64's output function (Steele, Lea, Flood 2014), element by element."""
    z = z + _GAMMA
    z = (z ^ _shifted(z, 30)) * _M1
    z = (z ^ _shifted(z, 27)) * _M2
    return z ^ _shifted(z, 31)


class MeanPredictor(Judged):
    """Always answers the mean of a sample."""

    has_latents = False

    def __init__(self, judged: Judged, sample_BD: Tensor, facts: Mapping[str, Any]) -> None:
        mean_D = to_float64(sample_BD).mean(dim=0).float().to(judged.device)
        super().__init__(W_dec=torch.zeros_like(judged.W_dec[:1]), b_dec=mean_D, facts=facts)

    def latents(self, x_BD: Tensor) -> Tensor:
        return x_BD.new_zeros(len(x_BD), 1)
