"""What latents fire on, as text: from the store alone, without the language model.

# B rows, S latents, N top rows, T positions of a context
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ..storage import ActivationStore
from ..storage.errors import InputError
from .latent_scan import Scan, bin_edges, scan_rows
from .sae.base import Sae
from .tokens import decode_tokens

_CANDIDATES = 4  # rows kept for each context shown: top rows often share a context


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


@dataclass(frozen=True, kw_only=True)
class ShadedContext:
    """One context and a latent's activation at each of its tokens.

    tokens: their texts (T); activation_T: float32, NaN where a position has no row (attention sinks
    are left out of stores); peak: the position at which the latent fires most.
    """

    context: int
    tokens: list[str]
    activation_T: NDArray[np.float32]
    peak: int

    @property
    def largest(self) -> float:
        return float(self.activation_T[self.peak])


@dataclass(frozen=True, kw_only=True)
class LatentView:
    """A latent as a page shows it. rows: on how many of n_rows it fires; edges, counts: histogram of
    its activations above 0, without empty bins at the ends; contexts: strongest first, no two the
    same."""

    index: int
    rows: int
    n_rows: int
    edges: list[float]
    counts: list[int]
    contexts: list[ShadedContext]

    @property
    def density(self) -> float:
        return self.rows / self.n_rows


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Latents of one SAE on the held-out rows of one store; dead: how many never fire on them."""

    n_rows: int
    d_sae: int
    dead: int
    latents: list[LatentView]


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
    n_rows = _rows_to_look_at(sae, store, count=count, examples=examples, max_rows=max_rows)
    scan = scan_rows(sae, store, n_rows, top=examples)
    chosen = _spread(scan.fired_S, count) if latents is None else _existing(latents, scan)
    text = _Text(store)
    found = []
    for latent in chosen:
        fires = scan.values_NS[:, latent] > 0
        values, rows = scan.values_NS[fires, latent], scan.rows_NS[fires, latent]
        shown = [
            text.example(float(value), int(row), around)
            for value, row in zip(values, rows, strict=True)
        ]
        found.append(Latent(latent, float(scan.density_S[latent]), shown))
    return found


def survey_latents(
    sae: Sae,
    store: ActivationStore,
    *,
    count: int = 24,
    also: Iterable[int] = (),
    examples: int = 6,
    max_rows: int | None = None,
) -> Survey:
    """Latents with whole contexts, the latent's activation at every token, and a histogram.

    count: latents spread over those that fire, by density; also: others to show; examples: contexts
    of each; max_rows as above. Raises InputError as `top_activations`.
    """
    n_rows = _rows_to_look_at(sae, store, count=count, examples=examples, max_rows=max_rows)
    scan = scan_rows(sae, store, n_rows, top=_CANDIDATES * examples, with_histogram=True)
    chosen = dict.fromkeys([*_spread(scan.fired_S, count), *_existing(list(also), scan)])
    text = _Text(store)
    contexts = {latent: text.contexts_of(scan, latent)[:examples] for latent in chosen}
    shaded = text.shaded(sae, n_rows, contexts)
    return Survey(
        n_rows=n_rows,
        d_sae=scan.d_sae,
        dead=int((scan.fired_S == 0).sum()),
        latents=[_view(scan, latent, shaded[latent]) for latent in chosen],
    )


def _view(scan: Scan, latent: int, contexts: list[ShadedContext]) -> LatentView:
    assert scan.histogram_SH is not None
    counts_H, edges = scan.histogram_SH[latent], bin_edges()
    filled = np.flatnonzero(counts_H)
    first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)
    return LatentView(
        index=latent,
        rows=int(scan.fired_S[latent]),
        n_rows=scan.n_rows,
        edges=edges[first : last + 1].tolist() if last else [],
        counts=counts_H[first:last].tolist(),
        contexts=contexts,
    )


def _rows_to_look_at(
    sae: Sae, store: ActivationStore, *, count: int, examples: int, max_rows: int | None
) -> int:
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
    return n_rows


def _existing(latents: list[int], scan: Scan) -> list[int]:
    for latent in latents:
        if not 0 <= latent < scan.d_sae:
            raise InputError(
                f"Latent {latent} does not exist: the SAE has latents 0 to {scan.d_sae - 1}."
            )
    return latents


def _spread(fired_S: NDArray[np.int64], count: int) -> list[int]:
    """Latents from rare to common, among those that fire: a fair look, not a hand-picked one."""
    alive = np.flatnonzero(fired_S)
    by_density = alive[np.argsort(fired_S[alive], kind="stable")]
    places = np.linspace(0, len(by_density) - 1, min(count, len(by_density)) + 2)[1:-1]
    return [int(by_density[int(place)]) for place in places]


class _Text:
    """The tokens behind the held-out rows of a store."""

    def __init__(self, store: ActivationStore) -> None:
        self._store, self._table = store, store.corpus.heldout

    def decode(self, ids: Sequence[int]) -> list[str]:
        return decode_tokens(self._store.file("tokenizer.json"), ids)

    @cached_property
    def _source_N(self) -> NDArray[np.int64]:
        """context * context_size + position of every held-out row."""
        return self._store.heldout.source(0, self._store.heldout.n_rows)

    def place(self, row: int) -> tuple[int, int]:
        """Context and position of a row."""
        return divmod(int(self._store.heldout.source(row, row + 1)[0]), self._table.context_size)

    def example(self, activation: float, row: int, around: int) -> Example:
        context, position = self.place(row)
        tokens = self._table.context(context)
        first = max(position - around, 0)
        texts = self.decode(tokens[first : position + around + 1].tolist())
        here = position - first
        return Example(
            activation=activation,
            before="".join(texts[:here]),
            token=texts[here],
            after="".join(texts[here + 1 :]),
            context=context,
            position=position,
        )

    def contexts_of(self, scan: Scan, latent: int) -> list[int]:
        """Contexts of a latent's top rows, strongest first, each once."""
        fires = scan.values_NS[:, latent] > 0
        rows = scan.rows_NS[fires, latent]
        return list(dict.fromkeys((self._source_N[rows] // self._table.context_size).tolist()))

    @torch.inference_mode()
    def shaded(
        self, sae: Sae, n_rows: int, contexts: dict[int, list[int]]
    ) -> dict[int, list[ShadedContext]]:
        """Of each latent its contexts, strongest first; every context is encoded once.

        Held-out rows are in the order of the text, so that those of a context stand together. Only
        the first n_rows were looked at, and are shaded.
        """
        wanted: dict[int, list[int]] = defaultdict(list)
        for latent, of_latent in contexts.items():
            for context in of_latent:
                wanted[context].append(latent)
        ids_of = {context: self._table.context(context).tolist() for context in sorted(wanted)}
        unique = sorted({token for ids in ids_of.values() for token in ids})
        text_of = dict(zip(unique, self.decode(unique), strict=True))
        context_N, position_N = np.divmod(self._source_N[:n_rows], self._table.context_size)
        parameter = next(sae.parameters())
        found: dict[int, list[ShadedContext]] = {latent: [] for latent in contexts}
        for context, ids in ids_of.items():
            rows = np.flatnonzero(context_N == context)
            first, last = int(rows[0]), int(rows[-1]) + 1
            x_BD = torch.from_numpy(self._store.heldout.read(first, last)[rows - first])
            latents_BS = sae.encode(x_BD.to(parameter)).float().cpu().numpy()
            tokens = [text_of[token] for token in ids]
            for latent in wanted[context]:
                activation_T = np.full(len(ids), np.nan, np.float32)
                activation_T[position_N[rows]] = latents_BS[:, latent]
                shaded = ShadedContext(
                    context=context,
                    tokens=tokens,
                    activation_T=activation_T,
                    peak=int(np.nanargmax(activation_T)),
                )
                found[latent].append(shaded)
        for views in found.values():
            views.sort(key=lambda each: -each.largest)
        return found
