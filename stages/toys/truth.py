"""How an SAE fares against features that are known.

# N rows, D d_in, F features, S latents

Parent-recall gap of a family: P(parent's latent fires | parent, no child) - P(parent's latent
fires | parent, a child); 0 without absorption, 1 where every child takes the parent over. It is
the measure to lead with: cosines do not see absorption, because a latent that is silent too often
may still have exactly its feature's direction.

The parent's latent is the one whose decoder row has the largest cosine with the parent.

Matched cosine: each feature is given a latent of its own, no two the same one, so that the sum of
cosines of decoder rows and features is largest (Hungarian assignment); matched correlation: the
same with the correlation of latents and firing. F1 of a feature: of "the latent fires" as a guess
of "the feature fires", for the latent that it is given by correlation. The median over features of
the largest cosine to any latent is here to be compared with: SAEs that absorb reach 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Family, Toy, ToyRows

if TYPE_CHECKING:
    from ..sae.base import Sae

JUDGED_ROWS = 50_000


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Means over features, or (recall) over families; NaN where rows do not define one."""

    explained_variance: float
    l0: float
    dead_fraction: float
    features_per_row: float
    recall_alone: float
    recall_with_child: float
    recall_gap: float
    matched_cosine: float
    median_max_cosine: float
    matched_correlation: float
    f1: float
    parent_f1: float


def judge(sae: Sae, toy: Toy, rows: ToyRows | None = None) -> Truth:
    """An SAE that takes raw rows of the toy, on rows that it was not fitted on (or those given)."""
    from ..metrics import evaluate

    rows = toy.held_out().draw(JUDGED_ROWS) if rows is None else rows
    found = evaluate(sae, [rows.x_ND], ("explained_variance", "l0", "dead_fraction"))
    with torch.no_grad():
        latents_NS = sae.encode(rows.x_ND)
        cosine_FS = cosines(sae.W_dec, toy.features_FD)
    fires_NF, correlation_FS = rows.fires_NF, correlations(latents_NS, rows.fires_NF)
    recalls = [
        parent_recall(family, latents_NS[:, cosine_FS[family.parent].argmax()] > 0, fires_NF)
        for family in toy.families
    ]
    alone, with_child = (_mean(each) for each in zip(*recalls, strict=True))
    own_F = own_latents(correlation_FS)
    f1_F = f1_scores(latents_NS[:, own_F] > 0, fires_NF)
    parents = [family.parent for family in toy.families]
    return Truth(
        explained_variance=found["explained_variance"],
        l0=found["l0"],
        dead_fraction=found["dead_fraction"],
        features_per_row=float(fires_NF.sum(dim=1).double().mean()),
        recall_alone=alone,
        recall_with_child=with_child,
        recall_gap=alone - with_child,
        matched_cosine=_assigned(cosine_FS, own_latents(cosine_FS)),
        median_max_cosine=float(cosine_FS.amax(dim=1).quantile(0.5)),
        matched_correlation=_assigned(correlation_FS, own_F),
        f1=float(f1_F.nanmean()),
        parent_f1=float(f1_F[parents].nanmean()),
    )


def cosines(decoder_SD: Tensor, features_FD: Tensor) -> Tensor:
    """Cosine of every feature and decoder row (F, S), float64; 0 for a row of length 0."""
    rows_SD, features_FD = decoder_SD.detach().double(), features_FD.double()
    rows_SD = rows_SD / rows_SD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosine_FS: Tensor = features_FD / features_FD.norm(dim=1, keepdim=True) @ rows_SD.T
    return cosine_FS


def correlations(latents_NS: Tensor, fires_NF: Tensor) -> Tensor:
    """Pearson correlation of every feature's firing and latent (F, S), float64; 0 for constants."""
    latents_NS, fires_NF = latents_NS.double(), fires_NF.double()
    latents_NS, fires_NF = latents_NS - latents_NS.mean(dim=0), fires_NF - fires_NF.mean(dim=0)
    norms_FS = fires_NF.norm(dim=0)[:, None] * latents_NS.norm(dim=0)
    correlation_FS: Tensor = (fires_NF.T @ latents_NS) / norms_FS.clamp_min(1e-12)
    return correlation_FS


def own_latents(similarity_FS: Tensor) -> Tensor:
    """The latent of each feature, int64 (F,): an assignment with the largest sum of similarities.

    There must be at least as many latents as features.
    """
    from scipy.optimize import linear_sum_assignment

    assert similarity_FS.shape[0] <= similarity_FS.shape[1], "fewer latents than features"
    _, latent_F = linear_sum_assignment(similarity_FS.numpy(), maximize=True)
    return torch.from_numpy(latent_F)


def matched_cosine(decoder_SD: Tensor, features_FD: Tensor) -> float:
    """Mean cosine of each feature and its own latent.

    No latent counts for two features, as it would in a mean of largest cosines.
    """
    cosine_FS = cosines(decoder_SD, features_FD)
    return _assigned(cosine_FS, own_latents(cosine_FS))


def parent_recall(family: Family, found_N: Tensor, fires_NF: Tensor) -> tuple[float, float]:
    """P(parent's latent fires | parent fires), without and with a child; NaN without such rows.

    found_N: whether the parent's latent fires.
    """
    parent_N = fires_NF[:, family.parent]
    has_child_N = fires_NF[:, list(family.children)].any(dim=1)
    alone_N, with_child_N = parent_N & ~has_child_N, parent_N & has_child_N
    found_N = found_N.double()
    return float(found_N[alone_N].mean()), float(found_N[with_child_N].mean())


def f1_scores(guess_NF: Tensor, truth_NF: Tensor) -> Tensor:
    """2 TP / (2 TP + FP + FN) of each feature (F,), float64; NaN where it neither fires nor is said to."""
    both_F = (guess_NF & truth_NF).sum(dim=0).double()
    return 2 * both_F / (guess_NF.sum(dim=0) + truth_NF.sum(dim=0))


def _assigned(similarity_FS: Tensor, latent_F: Tensor) -> float:
    return float(similarity_FS[torch.arange(len(latent_F)), latent_F].mean())


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmean())
