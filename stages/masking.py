"""Input masking: tokens of a context are replaced, each by its own coin, by one mask token.

The coin of a token is a pure function of (seed, context, position), so that it is the same for any
batch size, device, worker or resume, and nested in p: what is masked at p = 0.2 is masked at 0.3.
The masked tokens are cheap enough to make again whenever they are needed; nothing of this is saved
but the seed and p.
"""

# n contexts of a batch, T positions

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..storage.counter import is_drawn, stream_key
from ..storage.errors import InputError

DEFAULT_MASK_STRING = "..."

Ids = TypeVar("Ids", bound=np.integer[Any])


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What is masked: with probability p, by the token mask_id, never at one of special_ids."""

    p: float
    mask_id: int
    seed: int
    special_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:  # also refuses NaN
            raise InputError(
                f"Mask probability {self.p} is outside [0, 1]. "
                "Pass --mask-p a number from 0 to 1, for example 0.3."
            )


def mask_tokens(
    tokens_nT: NDArray[Ids],
    *,
    first_context: int,
    context_size: int,
    config: MaskConfig,
) -> tuple[NDArray[Ids], NDArray[np.bool_]]:
    """The tokens with the mask token in place of those drawn, and where that was.

    Row i is context first_context + i of the corpus, from its position 0 on. A mask token that the
    text itself holds counts as masked only where it was drawn.
    """
    n, n_positions = tokens_nT.shape
    assert n_positions <= context_size, f"{n_positions} positions in a context of {context_size}"
    contexts_n = np.arange(first_context, first_context + n, dtype=np.uint64)
    positions_T = np.arange(n_positions, dtype=np.uint64)
    counters_nT = contexts_n[:, None] * np.uint64(context_size) + positions_T
    is_masked_nT = is_drawn(stream_key(config.seed, "mask"), counters_nT, config.p)
    for special_id in config.special_ids:  # a handful; np.isin sorts and is slower
        is_masked_nT &= tokens_nT != special_id
    masked_nT = tokens_nT.copy()
    masked_nT[is_masked_nT] = config.mask_id
    return masked_nT, is_masked_nT
