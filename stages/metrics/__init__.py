"""What an SAE is judged by: the registry of metrics, and one pass that computes those over rows.

To add a metric: one file here that starts with its definition, one line in METRICS. Classes are
named by strings, so that listing the names does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from ...storage.errors import InputError
from .base import Needs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..sae.base import Sae


class Entry(NamedTuple):
    """where: "module:Class" below this folder; needs: what it judges by; by_default: whether it is
    computed without being asked for by name; of_latents: whether it is about latents, and has
    nothing to say of reconstructions that come without."""

    where: str
    needs: Needs
    by_default: bool = True
    of_latents: bool = False


METRICS: dict[str, Entry] = {
    "ablation_sparsity": Entry("ablation_sparsity:AblationSparsity", "text", of_latents=True),
    "absorption": Entry("absorption:Absorption", "items"),
    "compat_saebench": Entry("compat_saebench:CompatSaebench", "rows", by_default=False),
    "cosine": Entry("cosine:Cosine", "rows"),
    "dead_fraction": Entry("dead_fraction:DeadFraction", "rows", of_latents=True),
    "density": Entry("density:Density", "rows", of_latents=True),
    "downstream": Entry("downstream:Downstream", "text"),
    "explained_variance": Entry("explained_variance:ExplainedVariance", "rows"),
    "fvu": Entry("fvu:Fvu", "rows"),
    "gamma": Entry("gamma:Gamma", "rows"),
    "ito": Entry("ito:Ito", "rows", of_latents=True),
    "l0": Entry("l0:L0", "rows", of_latents=True),
    "l1": Entry("l1:L1", "rows", of_latents=True),
    "mse": Entry("mse:Mse", "rows"),
    "mse_per_token": Entry("mse_per_token:MsePerToken", "rows"),
    "ood_probing": Entry("ood_probing:OodProbing", "items"),
    "probe_loss": Entry("probe_loss:ProbeLoss", "items"),
    "scr": Entry("scr:Scr", "items"),
    "shortcut_control": Entry("shortcut_control:ShortcutControl", "items"),
    "sparse_probing": Entry("sparse_probing:SparseProbing", "items"),
    "tpp": Entry("tpp:Tpp", "items"),
}


def get_metric(name: str, **options: Any) -> Any:
    """A fresh instance of that name (of the kind in base.py that its entry names).

    InputError lists the known ones.
    """
    return metric_class(name)(**options)


def metric_class(name: str) -> Any:
    """The class of that name; InputError lists the known ones."""
    if name not in METRICS:
        raise InputError(f"Unknown metric {name!r}: choose one of {', '.join(sorted(METRICS))}.")
    module, _, attribute = METRICS[name].where.partition(":")
    return getattr(import_module(f".{module}", __name__), attribute)


def names_of(needs: Needs) -> list[str]:
    """The metrics of one kind, in alphabetical order."""
    return sorted(name for name, entry in METRICS.items() if entry.needs == needs)


def evaluate(
    sae: Sae, batches: Iterable[Tensor | NDArray[Any]], metrics: Sequence[str]
) -> dict[str, float]:
    """The named metrics over all rows of the batches, with one encode and decode for all.

    Batches are (B, d_in) tensors or arrays of what the SAE takes: raw activations for a loaded one.
    metrics: of those that need rows; InputError for another. A value that the rows do not define
    (no rows, no variance) is NaN.
    """
    import numpy as np
    import torch

    from ..evaluation.judged import JudgedSae
    from ..evaluation.latents import SparseLatents
    from .rows import Moments, RowBatch, Rows

    for name in metrics:
        if name in METRICS and METRICS[name].needs != "rows":
            raise InputError(
                f"Metric {name} needs {METRICS[name].needs} and not rows alone. Use "
                "`sae-pipe eval` for it."
            )
    judges, data = [get_metric(name) for name in metrics], Moments()
    judged = JudgedSae(sae, {"name": "sae"})
    with torch.no_grad():
        for batch_BD in batches:
            x_BD = torch.as_tensor(batch_BD).to(sae.W_dec.device, sae.W_dec.dtype)
            latents_BS = sae.encode(x_BD)
            rows = Rows(x_BD, np.zeros(len(x_BD), np.int64))
            latents, x_hat_BD = SparseLatents.of(latents_BS), sae.decode(latents_BS)
            batch = RowBatch(rows, latents, x_hat_BD, judged)
            data.observe(rows)
            for judge in judges:
                judge.observe(batch)
    return {key: value for judge in judges for key, value in judge.values(data).items()}


__all__ = ["METRICS", "Entry", "evaluate", "get_metric", "metric_class", "names_of"]
