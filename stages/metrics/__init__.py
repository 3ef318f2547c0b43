"""What an SAE is judged by: the registry of metrics, and one pass that computes any of them.

To add a metric: one file here that starts with its definition, one line in METRICS. Classes are
named by strings, so that listing the names does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from ...storage.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..sae.base import Sae
    from .base import Metric

METRICS: dict[str, str] = {
    "dead_fraction": "dead_fraction:DeadFraction",
    "density": "density:Density",
    "explained_variance": "explained_variance:ExplainedVariance",
    "fvu": "fvu:Fvu",
    "gamma": "gamma:Gamma",
    "l0": "l0:L0",
    "mse": "mse:Mse",
}


def get_metric(name: str) -> Metric:
    """A fresh accumulator of that name; InputError lists the known ones."""
    if name not in METRICS:
        raise InputError(f"Unknown metric {name!r}: choose one of {', '.join(sorted(METRICS))}.")
    module, _, attribute = METRICS[name].partition(":")
    return cast("Metric", getattr(import_module(f".{module}", __name__), attribute)())


def evaluate(
    sae: Sae, batches: Iterable[Tensor | NDArray[Any]], metrics: Sequence[str]
) -> dict[str, float]:
    """The named metrics over all rows of the batches, with one encode and decode for all.

    Batches are (B, d_in) tensors or arrays of what the SAE takes: raw activations for a loaded one.
    A value that the rows do not define (no rows, no variance) is NaN.
    """
    import torch

    accumulators = [get_metric(name) for name in metrics]
    with torch.no_grad():
        for batch_BD in batches:
            x_BD = torch.as_tensor(batch_BD).to(sae.W_dec.device, sae.W_dec.dtype)
            latents_BS = sae.encode(x_BD)
            x_hat_BD = sae.decode(latents_BS)
            for accumulator in accumulators:
                accumulator.update(x_BD, latents_BS, x_hat_BD)
    return {key: value for metric in accumulators for key, value in metric.result().items()}


__all__ = ["METRICS", "evaluate", "get_metric"]
