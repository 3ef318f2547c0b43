"""Contexts of any length through a model, the rows of their wanted positions in order.

Contexts are taken in blocks of consecutive ones; inside a block they are sorted by length into
batches and padded on the right, which changes nothing before the padding, because attention is
causal. Blocks and batches are a function of the contexts' lengths and the batch size alone, so that
rows come out the same wherever a run begins.
"""

# C contexts of a block, B of a batch, T positions, R rows of a block, D d_model

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...storage.errors import NonFiniteError
from ..backoff import TOKENS_PER_BATCH, BatchRunner, find_batch_size
from ..hooks import HookedModel
from .base import Positions, Tokens

# Of a block: enough to sort by length, little enough to lose when the process is killed.
BLOCK_TOKENS = 1 << 16


def batch_tokens(model: HookedModel, longest: int) -> int:
    """Tokens of a batch, padding included: fixed on a CPU, as many as fit on a GPU."""
    if model.device.type in TOKENS_PER_BATCH:
        return max(TOKENS_PER_BATCH[model.device.type], longest)
    return find_batch_size(model, longest) * longest


def blocks(contexts: Sequence[Tokens]) -> list[slice]:
    """Consecutive contexts of about BLOCK_TOKENS tokens, the last block of what is left."""
    lengths_C = np.array([len(tokens_T) for tokens_T in contexts])
    block_C = (np.cumsum(lengths_C) - lengths_C) // BLOCK_TOKENS
    starts = np.flatnonzero(np.diff(block_C, prepend=-1)).tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(contexts)], strict=True)]


def batches(lengths_C: NDArray[np.int64], n_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Contexts of each batch: sorted by length, as many as n_tokens hold when padded."""
    order_C = np.argsort(lengths_C, kind="stable")
    start = 0
    while start < len(order_C):
        stop = start + 1
        while stop < len(order_C) and (stop + 1 - start) * lengths_C[order_C[stop]] <= n_tokens:
            stop += 1
        yield order_C[start:stop]
        start = stop


def rows_from(
    model: HookedModel,
    contexts: Sequence[Tokens],
    positions: Sequence[Positions],
    *,
    first_row: int,
    n_tokens: int,
    advance: Callable[[int], object],
) -> Iterator[NDArray[np.float32]]:
    """Rows from first_row on, float32 (R, D), block by block; the blocks before are not run.

    positions: those of each context that yield a row; n_tokens: of a batch; advance: called with
    the tokens that have gone through the model. Raises NonFiniteError where one is NaN or Inf.
    """
    (layer,), fitting = model.layers, n_tokens
    end_C = np.cumsum([len(positions_P) for positions_P in positions])
    for block in blocks(contexts):
        if end_C[block.stop - 1] <= first_row:
            continue
        start = int(end_C[block.start - 1]) if block.start else 0
        rows_RD = np.empty((int(end_C[block.stop - 1]) - start, model.d_model), np.float32)
        lengths_C = np.array([len(tokens_T) for tokens_T in contexts[block]])
        for batch in batches(lengths_C, n_tokens):
            ids_BT = torch.zeros((len(batch), int(lengths_C[batch].max())), dtype=torch.int64)
            for row, context in enumerate(batch.tolist()):
                tokens_T = contexts[block.start + context]
                ids_BT[row, : len(tokens_T)] = torch.from_numpy(tokens_T.astype(np.int64))
            # What did not fit once would not fit again, and each failure costs a pass.
            most = max(1, min(len(batch), fitting // ids_BT.shape[1]))
            runner = BatchRunner(model, most)
            for part, activations in runner.run(ids_BT):
                _put(
                    activations[layer], batch[part] + block.start, positions, end_C, start, rows_RD
                )
            if runner.n_contexts < most:
                fitting = runner.n_contexts * ids_BT.shape[1]
            advance(int(lengths_C[batch].sum()))
        yield rows_RD[max(first_row - start, 0) :]


def _put(
    acts_BTD: torch.Tensor,
    contexts_B: NDArray[np.int64],
    positions: Sequence[Positions],
    end_C: NDArray[np.int64],
    start: int,
    rows_RD: NDArray[np.float32],
) -> None:
    """Rows of one batch to their places in the block, whose first row is `start`."""
    counts_B = [len(positions[context]) for context in contexts_B.tolist()]
    batch_R = np.repeat(np.arange(len(contexts_B)), counts_B)
    position_R = np.concatenate([positions[context] for context in contexts_B.tolist()])
    place_R = np.concatenate(
        [
            np.arange(end_C[context] - n, end_C[context])
            for context, n in zip(contexts_B.tolist(), counts_B, strict=True)
        ]
    )
    taken = acts_BTD[
        torch.from_numpy(batch_R).to(acts_BTD.device),
        torch.from_numpy(position_R.astype(np.int64)).to(acts_BTD.device),
    ]
    values_RD = taken.to("cpu", torch.float32).numpy()
    is_bad_R = ~np.isfinite(values_RD).all(axis=1)
    if is_bad_R.any():
        bad = int(np.flatnonzero(is_bad_R)[0])
        raise NonFiniteError(
            f"The activation at position {position_R[bad]} of text {contexts_B[batch_R[bad]]} is "
            "NaN or Inf: it overflows in this number format. Pass --dtype float32 (or bfloat16 if "
            "it was float16) with another --out."
        )
    rows_RD[place_R - start] = values_RD
