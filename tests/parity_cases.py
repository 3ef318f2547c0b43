"""Fits of 100 updates, small enough for float64 and wild enough that every part of a recipe counts.

A case says what FitConfig and the textbook are told, where parameters start and which batches come;
tests and checks against other implementations run the same ones.
"""

# B rows, D d_in, S d_sae, F directions

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .textbook import TOPK_FAMILY, Recipe

D_IN, D_SAE, BATCH, STEPS = 16, 64, 48, 100


def disagreement(ours: Any, theirs: Any) -> float:
    """max |difference| over the root mean square of what is expected."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    scale = np.sqrt((theirs**2).mean())
    return float(np.abs(ours - theirs).max() / (scale if scale > 0 else 1))


@dataclass(frozen=True)
class Case:
    """One architecture with its constants; `options` are FitConfig's, by FitConfig's names."""

    arch: str
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1 / 7  # of the rows; total gradient norms are to lie around 1
    mute_from: int = 40  # latents from there on start with a bias that keeps them silent
    mean: float = 1.5

    @property
    def fit_options(self) -> dict[str, Any]:
        """FitConfig(**fit_options) is this case."""
        run = {"tokens": STEPS * BATCH, "batch_size": BATCH, "dtype": "float64", "device": "cpu"}
        return {"arch": self.arch, "d_sae": D_SAE, **run, **COMMON, **self.options}

    @property
    def recipe(self) -> Recipe:
        """The same for the textbook."""
        known = {one.name for one in fields(Recipe)}
        options = {n: v for n, v in self.fit_options.items() if n in known}
        if self.arch == "matryoshka":
            sizes = [int(fraction * D_SAE) for fraction in self.options["group_fractions"][:-1]]
            sizes.append(D_SAE - sum(sizes))
            weights = self.options.get("group_weights", [1 / len(sizes)] * len(sizes))
            options |= {"group_sizes": tuple(sizes), "group_weights": tuple(weights)}
        if self.arch in TOPK_FAMILY:
            options |= {"k_aux": D_IN // 2}
        return Recipe(steps=STEPS, **options)

    def start(self) -> dict[str, Tensor]:
        """Where parameters start: the encoder tied to the decoder, as in the recipe; biases not 0."""
        random = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        rows_SD = normal(D_SAE, D_IN)
        rows_SD = rows_SD / rows_SD.norm(dim=1, keepdim=True)
        if self.arch in ("relu", "p_anneal"):
            rows_SD = 0.1 * rows_SD  # becomes 1 in the first update, or stays with free norms
        bias_S = 0.02 * normal(D_SAE)
        bias_S[self.mute_from :] = -0.3 * 7 * self.scale
        start = {"W_enc": rows_SD.T.clone(), "W_dec": rows_SD}
        if self.arch == "gated":
            gate = {"b_gate": bias_S, "b_mag": 0.05 * normal(D_SAE), "r_mag": 0.1 * normal(D_SAE)}
            return start | gate | {"b_dec": 0.01 * normal(D_IN)}
        start |= {"b_enc": bias_S, "b_dec": 0.01 * normal(D_IN)}
        if self.arch == "jumprelu":
            uniform_S = torch.rand(D_SAE, generator=random, dtype=torch.float64)
            start["threshold"] = 0.01 + 0.2 * uniform_S
        return start

    def batches(self) -> list[Tensor]:
        """Sparse sums of 40 directions around a mean that is not 0.

        Every resample_steps-th batch is one row repeated: which row a latent restarts from is drawn
        at random, and then it does not matter.
        """
        random = np.random.default_rng(1)
        directions_FD = random.standard_normal((40, D_IN))
        batches = []
        every = self.options.get("resample_steps") or STEPS
        for step in range(STEPS):
            active_BF = (random.random((BATCH, 40)) < 0.1) * random.exponential(1, (BATCH, 40))
            rows_BD = torch.from_numpy((active_BF @ directions_FD + self.mean) * self.scale)
            batches.append(rows_BD[:1].repeat(BATCH, 1) if step % every == 0 and step else rows_BD)
        return batches


COMMON: dict[str, Any] = {"lr": 3e-3, "warmup_steps": 10, "decay_start": 0.8}
_TOPK: dict[str, Any] = {
    "k": 3,
    "grad_clip": 1.0,
    "threshold_start": 15,
    "threshold_beta": 0.9,
    "dead_after_tokens": 96,
    "auxk_coefficient": 1 / 32,
}
_GROUPS = {"group_fractions": (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)}
_PENALTY: dict[str, Any] = {"sparsity": 0.1, "sparsity_warmup_steps": 20}
_GATED = {"betas": (0.0, 0.999)}
_JUMP = {"k": 6, "sparsity": 0.5, "sparsity_warmup_steps": 20, "bandwidth": 0.1, "grad_clip": 1.0}
# Gradients of an Lp norm grow without bound towards 0, and with them any rounding: with p_end 0.3 two
# textbooks whose parameters start 1e-15 apart end 1e-7 apart. With these values it is 1e-13. All p on the
# way are exact in float32, in which some trainers keep them.
_ANNEAL: dict[str, Any] = {
    "lr": 1e-3,
    "p_start": 1.0,
    "p_end": 0.75,
    "anneal_start": 25,
    "anneal_end": 90,
    "sparsity_updates": 5,
    "sparsity_queue": 8,
    "sparsity_norm": "lp",
}
# The queue is longer than the way between updates, so that it holds norms of two pairs of p.
_ANNEAL_FAST = _ANNEAL | {
    "p_end": 0.625,
    "anneal_end": 60,
    "sparsity_updates": 7,
    "sparsity_norm": "lp_p",
}

CASES: dict[str, Case] = {
    "topk": Case("topk", _TOPK),
    "topk reference": Case("topk", _TOPK | {"k": 14, "reference": True}, mute_from=24),
    "batch_topk": Case("batch_topk", _TOPK),
    "batch_topk reference": Case("batch_topk", _TOPK | {"reference": True}),
    "matryoshka": Case("matryoshka", _TOPK | _GROUPS, scale=0.35),
    "matryoshka weights": Case(
        "matryoshka",
        _TOPK | {"group_fractions": (0.1, 0.3, 0.6), "group_weights": (0.5, 0.2, 0.3)},
        scale=0.35,
    ),
    "matryoshka reference": Case("matryoshka", _TOPK | _GROUPS | {"reference": True}, scale=0.35),
    "relu unit": Case("relu", _PENALTY | {"decoder_norm": "unit"}),
    "relu resampled": Case(
        "relu",
        _PENALTY
        | {"decoder_norm": "unit", "resample_steps": 25, "warmup_steps": 5, "decay_start": 1.0},
    ),
    "relu free": Case("relu", _PENALTY | {"decoder_norm": "free", "grad_clip": 1.0}),
    "relu free reference": Case(
        "relu", _PENALTY | {"decoder_norm": "free", "grad_clip": 1.0, "reference": True}
    ),
    "p_anneal": Case("p_anneal", _PENALTY | _ANNEAL),
    "p_anneal lp_p": Case("p_anneal", _PENALTY | _ANNEAL_FAST | {"sparsity": 0.02}),
    "gated": Case("gated", _PENALTY | _GATED),
    "jumprelu": Case("jumprelu", _JUMP | _GATED),
    "jumprelu reference": Case("jumprelu", _JUMP | _GATED | {"reference": True}),
}
