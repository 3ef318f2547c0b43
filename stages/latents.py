"""The rows that a latent fires on most, shown as text: from the store alone.

# B rows of a batch, S latents, N top rows
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..storage import ActivationStore
from ..storage.errors import InputError
from .sae.base import Sae
from .tokens import decode_tokens

_BATCH_ROWS = 8192


@dataclass(frozen=True)
class Example:
    """One row: the activation, and its token between what stands before and after it."""

    activation: float
    before: str
    token: str
    after: str
    context: int
    position: int


@dataclass(frozen=True)
class Latent:
    """One latent: how often it fires on the held-out rows, and where it fires most."""

    index: int
    density: float
    examples: list[Example]


def top_activations(
    sae: Sae,
    store: ActivationStore,
    latents: list[int] | None = None,
    *,
    count: int = 5,
    examples: int = 5,
    max_rows: int | None = None,
    around: int = 12,
) -> list[Latent]:
    """Latents with the held-out rows they fire on most.

    latents: which; None takes `count` of them spread over those that fire, by density. max_rows:
    held-out rows to look at (None: all); around: tokens shown on each side. Raises InputError when
    store and SAE do not fit, a latent does not exist, or nothing is asked for.
    """
    for flag, value in (("--count", count), ("--examples", examples), ("--rows", max_rows)):
        if value is not None and value < 1:
            raise InputError(f"{flag} must be at least 1, not {value}.")
    if sae.d_in != store.d_in:
        raise InputError(
            f"Store {store.place} has d_in={store.d_in}, but the SAE expects {sae.d_in}. "
            "Pass the store that it was fitted from."
        )
    _ = store.corpus  # without tokens there is nothing to show: say so before the rows are read
    n_rows = store.heldout.n_rows
    if max_rows is not None:
        n_rows = min(n_rows, max_rows)
    if n_rows == 0:
        raise InputError(
            f"Store {store.place} has no held-out rows to look at. "
            "Harvest one with --heldout-tokens above 0."
        )
    values_NS, rows_NS, fired_S = _top_rows(sae, store, n_rows, examples)
    chosen = _spread(fired_S, count) if latents is None else latents
    for latent in chosen:
        if not 0 <= latent < len(fired_S):
            raise InputError(
                f"Latent {latent} does not exist: the SAE has latents 0 to {len(fired_S) - 1}."
            )
    found = []
    for latent in chosen:
        fires = values_NS[:, latent] > 0
        shown = [
            _example(store, float(value), int(row), around)
            for value, row in zip(values_NS[fires, latent], rows_NS[fires, latent], strict=True)
        ]
        found.append(Latent(latent, float(fired_S[latent]) / n_rows, shown))
    return found


@torch.inference_mode()
def _top_rows(
    sae: Sae, store: ActivationStore, n_rows: int, examples: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Largest activations and their rows, each (N, S), largest first; times fired, (S,)."""
    parameter = next(sae.parameters())
    best_NS: Tensor | None = None
    rows_NS = torch.empty(0, dtype=torch.int64)
    fired_S = torch.zeros(sae.d_sae, dtype=torch.int64, device=parameter.device)
    for start in range(0, n_rows, _BATCH_ROWS):
        stop = min(start + _BATCH_ROWS, n_rows)
        rows_BD = torch.from_numpy(store.heldout.read(start, stop))
        latents_BS = sae.encode(rows_BD.to(parameter))
        fired_S += (latents_BS > 0).sum(0)
        values, where = latents_BS.topk(min(examples, stop - start), dim=0)
        if best_NS is None:
            best_NS, rows_NS = values, where + start
            continue
        all_values, all_rows = torch.cat([best_NS, values]), torch.cat([rows_NS, where + start])
        best_NS, order = all_values.topk(min(examples, len(all_values)), dim=0)
        rows_NS = all_rows.gather(0, order)
    assert best_NS is not None
    return best_NS.float().cpu().numpy(), rows_NS.cpu().numpy(), fired_S.cpu().numpy()


def _spread(fired_S: NDArray[np.int64], count: int) -> list[int]:
    """Latents from rare to common, among those that fire: a fair look, not a hand-picked one."""
    alive = np.flatnonzero(fired_S)
    by_density = alive[np.argsort(fired_S[alive], kind="stable")]
    places = np.linspace(0, len(by_density) - 1, min(count, len(by_density)) + 2)[1:-1]
    return [int(by_density[int(place)]) for place in places]


def _example(store: ActivationStore, activation: float, row: int, around: int) -> Example:
    source = int(store.heldout.source(row, row + 1)[0])
    context, position = divmod(source, store.corpus.heldout.context_size)
    tokens = store.corpus.heldout.context(context)
    first = max(position - around, 0)
    texts = decode_tokens(
        store.file("tokenizer.json"), tokens[first : position + around + 1].tolist()
    )
    here = position - first
    return Example(
        activation=activation,
        before="".join(texts[:here]),
        token=texts[here],
        after="".join(texts[here + 1 :]),
        context=context,
        position=position,
    )
