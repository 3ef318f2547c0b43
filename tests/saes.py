"""SAEs with weights that are nowhere 0, one of every kind there is, for the tests of formats.

# B rows, D d_in, S d_sae
"""

from typing import Any

import torch
from torch import Tensor

from sae_pipe.stages.sae import ARCHITECTURES, get_architecture
from sae_pipe.stages.sae.base import Sae
from sae_pipe.stages.sae.ksparse import KSparse
from sae_pipe.stages.sae_formats.facts import Facts

D_IN, D_SAE, K = 12, 48, 5
NORM_FACTOR = 7.5

FACTS = Facts(
    model="EleutherAI/pythia-70m",
    model_revision="5" * 40,
    family="gpt_neox",
    layer=3,
    hook="resid_post",
    context_size=128,
    prepends_bos=False,
    seed=1,
    steps=1000,
    lr=4e-4,
)

# Every architecture as a fit makes it, and what else a config can ask for.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "relu of April 2024": ("relu", {"decoder_norm": "free", "subtract_b_dec": False}),
    "relu of April 2024, --reference": ("relu", {"decoder_norm": "free"}),
    "topk with MultiTopK": ("topk", {"multi_topk": 0.125}),
    "jumprelu of x - b_dec": ("jumprelu", {"subtract_b_dec": True}),
    "matryoshka, uneven weights": ("matryoshka", {"group_weights": [0.7, 0.2, 0.1]}),
}


def make_sae(variant: str) -> Sae:
    """An SAE on raw activations (norm factor folded), the same each time."""
    arch, options = VARIANTS[variant]
    if arch == "matryoshka":
        options = {"group_sizes": (6, 12, 30)} | options
    generator = torch.Generator().manual_seed(7)
    sae = get_architecture(arch)(d_in=D_IN, d_sae=D_SAE, k=K, **options)
    sae.initialise_(0)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            if name != "W_dec":
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
        if sae.has_unit_rows:
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        else:
            sae.W_dec.mul_(torch.rand(D_SAE, 1, generator=generator) + 5)
        if isinstance(sae, KSparse):
            sae.threshold.fill_(0.0123456)
    sae.fold_norm_factor_(NORM_FACTOR)
    return sae.requires_grad_(False).eval()


def some_x(n_rows: int = 64) -> Tensor:
    """Rows whose mean is not 0, of about the norm that was folded."""
    generator = torch.Generator().manual_seed(3)
    return NORM_FACTOR * (torch.randn(n_rows, D_IN, generator=generator) * 0.3 + 0.2)
