"""What the recipes of the architectures differ in, apart from the loss. Imports no torch.

Values are those of the reference trainers (docs/recipes.md). A FitConfig field that is None means
the value here.
"""

import math
from dataclasses import dataclass

LONG_STEPS = 244_140  # 500 million tokens in batches of 2048
_MOST_LR = 1e-3
DECODER_NORMS = ("unit", "free")  # of relu
SPARSITY_NORMS = ("lp_p", "lp")  # of p_anneal: sum of f^p, or its p-th root


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The constants of one architecture.

    keeps_k: `k` is what a training pass keeps; otherwise it is a target for the L0 that a
        coefficient of sparsity leads to.
    lr: peak learning rate; None is 2e-4 / sqrt(d_sae / 2**14) (Gao et al. 2024, figure 3).
    betas: Adam's. grad_clip: largest total norm of the gradient; 0 is no clipping.
    sparsity: where the coefficient of the sparsity term starts; None where there is no such term.
    norm_epsilon: added to the norms of decoder rows before dividing by them, in the projection of
        the gradient and (machine epsilon instead) in the renormalisation; 0 adds nothing to both.
    """

    keeps_k: bool
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    sparsity: float | None = None
    norm_epsilon: float = 1e-6

    def learning_rate(self, d_sae: int, steps: int, *, reference: bool = False) -> float:
        """The default peak learning rate for a dictionary of that size and a run of that length.

        Small ones are meant for long runs: with fewer steps they rise by the root of what is
        missing, up to 1e-3, or the SAE would stay near where it began (docs/recipes.md).
        """
        if self.lr is None:
            return 2e-4 / math.sqrt(d_sae / 2**14)
        if reference or self.lr >= _MOST_LR:
            return self.lr
        return min(_MOST_LR, self.lr * math.sqrt(max(1.0, LONG_STEPS / steps)))

    def grad_clip_of(self, decoder_norm: str) -> float:
        """The default of grad_clip; rows of free norm are clipped (ReLU's April variant)."""
        return 1.0 if decoder_norm == "free" else self.grad_clip


TOPK_FAMILY = Recipe(keeps_k=True)
RELU = Recipe(keeps_k=False, lr=1e-3, sparsity=0.1, grad_clip=0.0, norm_epsilon=0.0)
GATED = Recipe(
    keeps_k=False,
    lr=5e-5,
    betas=(0.0, 0.999),
    sparsity=0.1,
    grad_clip=0.0,
    norm_epsilon=0.0,
)
JUMPRELU = Recipe(keeps_k=False, lr=7e-5, betas=(0.0, 0.999), sparsity=1.0)
