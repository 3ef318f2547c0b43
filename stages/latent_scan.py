"""One pass over held-out rows: where each latent fires most, how often, and how strongly.

# B rows of a batch, S latents, N top rows, H bins of the histogram

Sources of the kind of picture: the feature dashboards of Bricken et al. 2023, "Towards
Monosemanticity". Bins are parts of an octave, so that one pass serves latents of any scale.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..storage import ActivationStore
from .sae.base import Sae

_BATCH_ROWS = 8192
_BINS_AN_OCTAVE = 16
_LOWEST, _HIGHEST = -10, 14  # octaves; what is beyond is counted in the outermost bins
N_BINS = (_HIGHEST - _LOWEST) * _BINS_AN_OCTAVE


@dataclass(frozen=True)
class Scan:
    """values_NS, rows_NS: largest activations and their rows, largest first; fired_S: rows on which
    each latent fired; histogram_SH: how many of its activations lie in each bin, or None."""

    n_rows: int
    values_NS: NDArray[np.float32]
    rows_NS: NDArray[np.int64]
    fired_S: NDArray[np.int64]
    histogram_SH: NDArray[np.int32] | None

    @property
    def d_sae(self) -> int:
        return len(self.fired_S)

    @cached_property
    def density_S(self) -> NDArray[np.float64]:
        return self.fired_S / self.n_rows


def bin_edges() -> NDArray[np.float64]:
    """Activations between which the bins lie, (H + 1,)."""
    return 2.0 ** (_LOWEST + np.arange(N_BINS + 1) / _BINS_AN_OCTAVE)


@torch.inference_mode()
def scan_rows(
    sae: Sae, store: ActivationStore, n_rows: int, *, top: int, with_histogram: bool = False
) -> Scan:
    """The first n_rows held-out rows through the encoder. top: rows to keep of each latent."""
    parameter = next(sae.parameters())
    best_NS = torch.empty(0, sae.d_sae, dtype=parameter.dtype, device=parameter.device)
    rows_NS = torch.empty(0, sae.d_sae, dtype=torch.int64, device=parameter.device)
    fired_S = torch.zeros(sae.d_sae, dtype=torch.int64, device=parameter.device)
    histogram_SH = torch.zeros(sae.d_sae, N_BINS, dtype=torch.int32, device=parameter.device)
    for start in range(0, n_rows, _BATCH_ROWS):
        stop = min(start + _BATCH_ROWS, n_rows)
        rows_BD = torch.from_numpy(store.heldout.read(start, stop))
        latents_BS = sae.encode(rows_BD.to(parameter))
        fired_S += (latents_BS > 0).sum(0)
        if with_histogram:
            _count(latents_BS, histogram_SH)
        values, where = latents_BS.topk(min(top, stop - start), dim=0)
        all_values, all_rows = torch.cat([best_NS, values]), torch.cat([rows_NS, where + start])
        best_NS, order = all_values.topk(min(top, len(all_values)), dim=0)
        rows_NS = all_rows.gather(0, order)
    return Scan(
        n_rows=n_rows,
        values_NS=best_NS.float().cpu().numpy(),
        rows_NS=rows_NS.cpu().numpy(),
        fired_S=fired_S.cpu().numpy(),
        histogram_SH=histogram_SH.cpu().numpy() if with_histogram else None,
    )


def _count(latents_BS: Tensor, histogram_SH: Tensor) -> None:
    """Add the activations above 0 to the bins of their latents."""
    latent_BS = torch.arange(latents_BS.shape[1], device=latents_BS.device).expand(latents_BS.shape)
    active = latents_BS > 0
    octaves = torch.log2(latents_BS[active].double()) - _LOWEST
    place = (octaves * _BINS_AN_OCTAVE).floor().long().clamp(0, N_BINS - 1)
    flat = latent_BS[active] * N_BINS + place
    histogram_SH.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
