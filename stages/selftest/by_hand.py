"""SAEs whose weights are written down, and metrics over rows for them.

# B rows, D d_in, S d_sae
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.judged import JudgedSae
from ..metrics import get_metric
from ..metrics.base import MetricResult
from ..metrics.rows import Moments, RowBatch, Rows
from ..sae import get_architecture
from ..sae.base import Sae


@torch.no_grad()
def relu_sae(
    W_enc_DS: Tensor, W_dec_SD: Tensor, b_dec_D: Tensor | None = None, b_enc_S: Tensor | None = None
) -> Sae:
    """f = relu((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec; biases are 0 if not given."""
    d_sae, d_in = W_dec_SD.shape
    sae = get_architecture("relu")(d_in=d_in, d_sae=d_sae, k=None)
    sae.W_enc.copy_(W_enc_DS)
    sae.W_dec.copy_(W_dec_SD)
    if b_dec_D is not None:
        sae.b_dec.copy_(b_dec_D)
    if b_enc_S is not None:
        sae.get_parameter("b_enc").copy_(b_enc_S)
    return sae


def judge_rows(
    sae: Sae, x_BD: Tensor, metrics: dict[str, dict[str, Any]], *, rows_a_document: int
) -> dict[str, MetricResult]:
    """Metrics (name -> options) of an SAE, from batches of several sizes."""
    judged, data = JudgedSae(sae, {"name": "by hand"}), Moments()
    judges = {name: get_metric(name, **options) for name, options in metrics.items()}
    start = 0
    while start < len(x_BD):
        stop = min(start + 3 + start, len(x_BD))
        unit_B = np.arange(start, stop) // rows_a_document
        rows = Rows(x_BD[start:stop], unit_B, start)
        latents = judged.encode(rows.x_BD)
        batch = RowBatch(rows, latents, judged.decode(latents), judged)
        data.observe(rows)
        for judge in judges.values():
            judge.observe(batch)
        start = stop
    return {name: judge.result(data, seed=0) for name, judge in judges.items()}
