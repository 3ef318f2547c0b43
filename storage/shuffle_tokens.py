"""The contexts that a store's rows come from, and what its tokens say about the rows.

Which rows should be there, and the documents that they are of: one pass over the corpus.
"""

# B rows of a batch, N batches, C contexts, T positions of a context

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .corpus import Corpus, TokenTable, chunk_contexts
from .errors import InputError, StoreError
from .shuffle_statistics import Ints, SeenPositions, pair_probability
from .store import ActivationStore

POSITIONS_A_ROW = 64  # without tokens: source indices may reach this many times the rows


@dataclass(frozen=True)
class Contexts:
    """n contexts of `size` positions; order_C: in the order of the text; table: their tokens."""

    n: int
    size: int
    order_C: Ints
    table: TokenTable | None

    @classmethod
    def of(cls, store: ActivationStore) -> "Contexts":
        corpus = store.recipe.get("corpus", {})
        if not isinstance(corpus, dict) or "context_size" not in corpus.get("config", {}):
            raise InputError(
                f"Store {store.place} does not record its context size, so its rows' contexts are "
                "unknown and its shuffle cannot be measured."
            )
        size = store.context_size
        if corpus.get("source"):
            table = store.corpus.train
            _check_reach(store, table.n_contexts, size)
            order_C = _text_order(store.corpus, table)
            return cls(table.n_contexts, size, order_C, table)
        # Without tokens the numbers of the contexts stand for the order of the text.
        n = _largest_source(store) // size + 1
        _check_reach(store, n, size)
        return cls(n, size, np.arange(n), None)

    def of_source(self, source: Ints) -> Ints:
        """The contexts of rows; impossible ones, which `SeenPositions` counts, are bent inside."""
        contexts: Ints = np.clip(source // self.size, 0, max(self.n - 1, 0))
        return contexts


def _text_order(corpus: Corpus, table: TokenTable) -> Ints:
    """Contexts in the order of the text.

    An extended corpus has parts, of which each is in an order of its own and comes from text behind
    that of the part before: they are laid over one another, the first tenth of one beside the first
    tenth of the other, since it is the order inside them that was to be shuffled.
    """
    origin_C = table.origins(0, table.n_contexts)
    extensions = corpus.info["recipe"].get("extensions", ())
    bounds = [0, *(int(each["contexts"]) for each in extensions), table.n_contexts]
    share_C = np.empty(table.n_contexts)
    for first, last in itertools.pairwise(bounds):
        share_C[first:last] = (origin_C[first:last] - first + 0.5) / max(last - first, 1)
    order_C: Ints = np.argsort(share_C, kind="stable")
    return order_C


def _check_reach(store: ActivationStore, n: int, size: int) -> None:
    """StoreError when n contexts are more than rows can come from: a bit is kept of each position."""
    if n * size > POSITIONS_A_ROW * max(store.n_rows, 1 << 20):
        raise StoreError(
            f"The source indices of {store.place} reach {n * size:,}, and it has "
            f"{store.n_rows:,} rows: they are no positions of contexts of {size}. "
            "Fetch or import the store again."
        )


def _largest_source(store: ActivationStore) -> int:
    layout, largest = store._train.layout, 0
    for shard in range(layout.n_shards):
        source = store._train.read_source(slice(*layout.rows_of_shard(shard)))
        largest = max(largest, int(source.max()))
    return largest


class Tokens:
    """One pass over the tokens, where there are any.

    missing: rows that should be there and are not; foreign: rows that should not be;
    rows_C: rows of each context, where not all were read; documents_NB and same_document: of the
    rows of batches, and the probability that two rows of the store are of one document.
    """

    missing: int | None = None
    foreign = 0
    rows_C: Ints | None = None
    documents_NB: Ints | None = None
    same_document = math.nan

    def __init__(
        self,
        store: ActivationStore,
        contexts: Contexts,
        seen: SeenPositions,
        source_NB: Ints,
        advance: Callable[[int], object],
        *,
        is_full: bool,
    ) -> None:
        """seen: the positions of stored rows; is_full: of all of them."""
        self._contexts, self._seen, self._advance = contexts, seen, advance
        # The draw of the masks is not known here: which positions were left out for it is not.
        drops = bool(store.recipe.get("drop_masked"))
        # Nor which rows of the whole store a part of it was left without.
        drops |= "sampled" in store.manifest.get("provenance", {})
        self._rows_left = contexts.n * contexts.size if drops else store.n_rows
        if contexts.table is None:
            return
        self.missing = 0 if is_full and not drops else None
        self.rows_C = None if is_full else np.zeros(contexts.n, np.int64)
        wanted = source_NB.reshape(-1)
        self._turn = np.argsort(wanted, kind="stable")
        self._wanted = wanted[self._turn]
        documents = np.empty(len(wanted), np.int64)
        ids, counts = np.empty(0, np.uint32), np.empty(0, np.int64)
        step = chunk_contexts(contexts.size)
        for start in range(0, contexts.n, step):
            found = self._slice(contexts.table, start, min(start + step, contexts.n), documents)
            ids, counts = _merged(ids, counts, *found)
        self.documents_NB = documents.reshape(source_NB.shape)
        self.same_document = pair_probability(counts)

    def _slice(
        self, table: TokenTable, start: int, stop: int, documents: Ints
    ) -> tuple[NDArray[np.uint32], Ints]:
        """Look at some contexts; returns documents and their numbers of rows."""
        size = self._contexts.size
        is_row = table.rows(start, stop).reshape(-1)
        if (surplus := int(is_row.sum()) - self._rows_left) > 0:
            is_row[np.flatnonzero(is_row)[-surplus:]] = False
        self._rows_left -= int(is_row.sum())
        found = self._seen.between(start * size, stop * size)
        self.foreign += int((found & ~is_row).sum())
        if self.missing is not None:
            self.missing += int((is_row & ~found).sum())
        if self.rows_C is not None:
            self.rows_C[start:stop] = is_row.reshape(-1, size).sum(axis=1)
        of_position = table.documents(start, stop).reshape(-1)
        here = slice(*np.searchsorted(self._wanted, [start * size, stop * size]).tolist())
        documents[self._turn[here]] = of_position[self._wanted[here] - start * size]
        self._advance((stop - start) * size)
        return np.unique(
            of_position[is_row if self.rows_C is not None else found], return_counts=True
        )


def _merged(
    ids: NDArray[np.uint32], counts: Ints, more_ids: NDArray[np.uint32], more_counts: Ints
) -> tuple[NDArray[np.uint32], Ints]:
    together, place = np.unique(np.concatenate([ids, more_ids]), return_inverse=True)
    summed = np.bincount(place, np.concatenate([counts, more_counts]), minlength=len(together))
    return together, summed.astype(np.int64)
