"""Fit an SAE on a toy as one is fitted from a store: rows are divided by the root of their mean
squared norm, unless the config says otherwise, and the factor is folded into the weights.

# N rows, D d_in
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..fit import build_trainer
from ..fitconfig import FitConfig
from ..sae.base import Sae
from .base import Toy

NORM_ROWS = 16_384
_LAST_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Fitted:
    """An SAE that takes raw rows; loss: mean of the last tenth of its steps."""

    sae: Sae
    loss: float


def fit_toy(toy: Toy, config: FitConfig) -> Fitted:
    """Steps the trainer through rows of the toy."""
    factor = 1.0
    if config.normalise:
        factor = float(toy.draw(NORM_ROWS).x_ND.square().sum(dim=1).mean().sqrt())
    trainer = build_trainer(config, toy.d_in)
    losses: list[torch.Tensor] = []
    for _ in range(trainer.schedule.steps):
        values = trainer.step(toy.draw(config.batch_size).x_ND / factor)
        losses.append(torch.as_tensor(values["loss"]))
    trainer.sae.fold_norm_factor_(factor)
    last = max(1, int(len(losses) * _LAST_SHARE))
    return Fitted(trainer.sae, float(torch.stack(losses[-last:]).mean()))


def best_of(toy: Toy, config: FitConfig, seeds: Sequence[int]) -> Fitted:
    """The SAE with the smallest loss of several starts.

    With exactly as many latents as features one that is never active at the start leaves a feature
    without any; the loss tells that without looking at the truth.
    """
    starts = [fit_toy(toy, replace(config, seed=seed)) for seed in seeds]
    return min(starts, key=lambda fitted: fitted.loss)
