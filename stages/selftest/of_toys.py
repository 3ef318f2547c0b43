"""Planted cases of the toys: dictionaries written down, on rows whose proportions are exact; and two
small fits, which show what masking does where theory says that it must.

# N rows, D d_in, F features, S latents
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..sae.base import Sae
from ..toys import get_toy
from ..toys.base import Toy
from ..toys.fitting import fit_toy
from ..toys.hier4 import Hier4
from ..toys.masked_tokens import MaskedTokens
from ..toys.tree20 import N_CHILDREN, N_PARENTS, Tree20
from ..toys.truth import Truth, judge
from .base import Check
from .by_hand import relu_sae

# Quicker than the toy's own setting: a larger coefficient absorbs sooner.
FIT: dict[str, Any] = {
    "sparsity": 0.15,
    "lr": 5e-3,
    "resample_steps": None,
    "batch_size": 128,
    "steps": 1200,
}
FIT_SEED = 1
ROUNDING = 1e-5


def _checks(truth: Truth, **expected: float) -> Iterator[Check]:
    for name, value in expected.items():
        yield Check(metric="ground truth", name=name, expected=value, found=getattr(truth, name))


def dictionary(toy: Toy, reads_SF: Tensor, writes_SF: Tensor) -> Sae:
    """Latents that read and write the features (of length 1) with the given weights.

    The bias keeps silent what is 0 but for rounding.
    """
    units_FD = toy.features_FD / toy.features_FD.norm(dim=1, keepdim=True)
    b_enc_S = torch.full((len(reads_SF),), -ROUNDING)
    return relu_sae((reads_SF @ units_FD).T, writes_SF @ units_FD, b_enc_S=b_enc_S)


def hier4() -> Iterator[Check]:
    """The minimum of the L1 loss: each child's latent is c + p / 2, so that the parent's fires with
    one child and is silent with two. All 9 kinds of rows, as often as they are in 32,000 rows."""
    toy = Hier4()
    kinds = [(1, *children) for children in itertools.product((0, 1), repeat=3)]
    count_of = {0: 4913, 1: 867, 2: 153, 3: 27}  # of 8000 with the parent, by number of children
    fires_NF = torch.cat(
        [torch.zeros(24_000, 4)]
        + [torch.tensor([kind]).expand(count_of[sum(kind) - 1], 4) for kind in kinds]
    ).bool()
    writes_SF = torch.eye(4)
    writes_SF[1:, 0] = 0.5
    reads_SF = torch.eye(4)
    reads_SF[0, 1:] = -0.5
    sae = dictionary(toy, reads_SF, writes_SF)
    # With three children the latents bring 3/2 p: 27 rows are wrong by 1/4.
    scatter = 8000 * 0.75 + 3 * 1200 * (1 - 1200 / 32_000)
    yield from _checks(
        judge(sae, toy, toy.rows_of(fires_NF)),
        recall_alone=1.0,
        recall_gap=(3 * 153 + 27) / 3087,
        explained_variance=1 - 27 / 4 / scatter,
        l0=(8000 + 3600 - 486) / 32_000,
        matched_cosine=(1 + 3 / 1.25**0.5) / 4,
    )


def tree20() -> Iterator[Check]:
    """A latent for child and parent, and a parent's latent that children switch off; then one for
    each feature. Of ten rows of a parent four are alone and two have each child."""
    toy = Tree20()
    fires_NF = torch.eye(20, dtype=torch.bool)[N_PARENTS * (1 + N_CHILDREN) :]
    for family in toy.families:
        alone = torch.zeros(4, 20, dtype=torch.bool)
        alone[:, family.parent] = True
        with_child = alone[:1].repeat(2 * N_CHILDREN, 1)
        with_child[torch.arange(2 * N_CHILDREN), torch.tensor(family.children * 2)] = True
        fires_NF = torch.cat([fires_NF, alone, with_child])
    rows = toy.rows_of(fires_NF)
    norm_F = toy.features_FD.norm(dim=1)
    reads_SF, writes_SF = torch.eye(20), torch.eye(20)
    for family in toy.families:
        for child in family.children:
            share = float(norm_F[family.parent] / norm_F[child])
            reads_SF[family.parent, child] = -2 * share
            writes_SF[child, family.parent] = share
    absorbing = judge(dictionary(toy, reads_SF, writes_SF), toy, rows)
    yield from _checks(
        absorbing,
        recall_alone=1.0,
        recall_gap=1.0,
        explained_variance=1.0,
        median_max_cosine=1.0,
        parent_f1=2 * 4 / (4 + 10),
    )
    separate = judge(dictionary(toy, torch.eye(20), torch.eye(20)), toy, rows)
    yield from _checks(separate, recall_gap=0.0, matched_cosine=1.0, f1=1.0)


def masked_tokens() -> Iterator[Check]:
    """Of the rows of a child the share 1 - p has its parent."""
    for p, tolerance in ((0.0, 0.0), (0.3, 0.02)):
        toy = get_toy("masked_tokens", p=p)
        fires_NF = toy.fires(40_000)
        parents, children = zip(*((f.parent, f.children) for f in toy.families), strict=True)
        has_child_NP = torch.stack([fires_NF[:, list(each)].any(dim=1) for each in children], 1)
        both_NP = has_child_NP & fires_NF[:, list(parents)]
        yield Check(
            metric="masking",
            name=f"P(parent | child), p = {p:g}",
            expected=1 - p,
            found=float(both_NP.sum() / has_child_NP.sum()),
            tolerance=tolerance,
        )


def masked_fits() -> Iterator[Check]:
    """An L1 SAE absorbs at p = 0 wholly, and at p = 0.3 not at all (`toys/masked_tokens.py`)."""
    for p, expected in ((0.0, 1.0), (0.3, 0.0)):
        toy = MaskedTokens(seed=FIT_SEED, p=p)
        truth = judge(fit_toy(toy, toy.config("relu", seed=FIT_SEED, **FIT)).sae, toy)
        yield Check(
            metric="ground truth",
            name=f"recall_gap at p = {p:g}",
            expected=expected,
            found=truth.recall_gap,
            tolerance=0.2,
        )
