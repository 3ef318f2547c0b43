"""The rows that a codec with parameters is fitted to before a store is laid out.

# R rows, D d_model
"""

from dataclasses import replace

import numpy as np

from ..storage.layout import Layout
from ..storage.recode import CALIBRATION_ROWS
from ..storage.values import Floats, ValueType
from .backoff import BatchRunner
from .block_buffer import BlockBuffer
from .forward import HostCopier, fill_block
from .hooks import HookedModel
from .row_map import RowMap


def first_rows(
    model: HookedModel,
    rows: RowMap,
    layers: tuple[int, ...],
    batch_contexts: int,
    values: ValueType,
) -> dict[int, Floats]:
    """The first rows of a split in text order, as they will be before encoding: layer -> (R, D).

    The corpus is permuted, so they are a fair sample of the text; and they are the same whoever
    computes them and whenever.
    """
    model = replace(model, layers=layers)
    n_rows = min(CALIBRATION_ROWS, rows.available_rows)
    sizes = {"chunk_rows": 1, "shard_rows": n_rows, "block_rows": n_rows}
    block = rows.block(Layout(n_rows=n_rows, d_in=model.d_model, **sizes), 0)
    memory = {layer: np.empty((n_rows, model.d_model), values.memory) for layer in layers}
    copier = HostCopier(model.device)
    try:
        fill_block(
            BatchRunner(model, batch_contexts),
            block,
            BlockBuffer.in_memory(memory),
            batch_contexts=batch_contexts,
            copier=copier,
            note_every_s=float("inf"),
            advance=lambda _: None,
            values=values,
        )
    finally:
        copier.close()
    samples = {layer: np.empty(part.shape, np.float32) for layer, part in memory.items()}
    for layer, part in memory.items():
        values.to_floats(part, samples[layer])
    return samples
