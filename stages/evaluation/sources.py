"""What SAEs are judged on: held-out rows of a store, rows of an evaluation set, contexts of text.

# N rows, B rows of a batch, D d_in, T positions

Held-out rows are unmasked and from documents that no training row has. Rows are grouped by
document for intervals; many documents are dealt to at most `MOST_UNITS` groups, so that sums by
group stay small whatever the store.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...storage import ActivationStore
from ...storage.corpus import TokenTable
from ...storage.errors import InputError
from ...storage.evalset import EvalSet
from .bootstrap import units_of
from .results import Source

MOST_UNITS = 4096
_CONTEXTS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where activations come from; None is what is not recorded."""

    d_in: int
    model: str | None
    model_revision: str | None
    layer: int | None
    hook: str | None


def check_match(facts: Mapping[str, Any], origin: Origin, where: str) -> None:
    """InputError, with both values, unless an SAE was fitted on what a source holds.

    facts: of the SAE (judged.py); where: the source, as "Store acts.zarr".
    """
    names = {
        "d_in": "d_in",
        "model": "model",
        "model_revision": "model revision",
        "layer": "layer",
        "hook": "hook",
    }
    if facts.get("model_revision") is not None and facts["model_revision"] == origin.model_revision:
        del names["model"]  # a folder that was renamed
    for name, called in names.items():
        wanted, found = facts.get(name), getattr(origin, name)
        if wanted is not None and found is not None and wanted != found:
            raise InputError(
                f"Run {facts['name']} was fitted on {called} {wanted}, but {where} has {called} "
                f"{found}. Pass a --store or an --eval-set of the same model, layer and hook."
            )


class RowSource(ABC):
    """Rows, read once for all SAEs.

    source: what results name; unit: what rows are grouped by, plural; unit_N: the group of each row.
    """

    def __init__(self, source: Source, origin: Origin, n_rows: int, where: str) -> None:
        self.source, self.origin, self.n_rows, self.where = source, origin, n_rows, where

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop."""

    @abstractmethod
    def text(self, most_contexts: int | None, *, most_tokens: int) -> StoreText | EvalSetText:
        """The contexts of its text: so many, or those of so many tokens."""

    @abstractmethod
    def _labels(self) -> tuple[NDArray[np.int64], str]:
        """What each row belongs to (N,), and what that is, plural."""

    @cached_property
    def _units(self) -> tuple[NDArray[np.int64], str]:
        labels_N, unit = self._labels()
        unit_N, n_units = units_of(labels_N)
        if n_units > MOST_UNITS:
            return unit_N % MOST_UNITS, f"{MOST_UNITS} groups of {unit}"
        return unit_N, unit

    @property
    def unit_N(self) -> NDArray[np.int64]:
        return self._units[0]

    @property
    def unit(self) -> str:
        return self._units[1]


class StoreRows(RowSource):
    """The held-out rows of a store, or the first of them."""

    def __init__(self, store: ActivationStore, most_rows: int | None = None) -> None:
        n_rows = store.heldout.n_rows
        if n_rows == 0:
            raise InputError(
                f"Store {store.place} has no held-out rows to judge on. "
                "Harvest one with --heldout-tokens above 0, or pass --eval-set."
            )
        super().__init__(
            Source(kind="store", name=store.name, digest=store.digest),
            store_origin(store),
            n_rows if most_rows is None else min(n_rows, most_rows),
            f"store {store.place}",
        )
        self.store = store

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.store.heldout.read(start, stop)

    def text(self, most_contexts: int | None, *, most_tokens: int) -> StoreText:
        """The contexts of the held-out text: so many, or those of so many tokens."""
        size = self.store.corpus.heldout.context_size
        return StoreText(self.store, most_contexts or max(1, most_tokens // size))

    def _labels(self) -> tuple[NDArray[np.int64], str]:
        source_N = self.store.heldout.source(0, self.n_rows)
        try:
            context_size = self.store.context_size
        except InputError:  # imported without saying how long contexts are
            return source_N, "rows"
        context_N, position_N = np.divmod(source_N, context_size)
        if not self.store.has_corpus:
            return context_N, "contexts"
        table, labels_N = self.store.corpus.heldout, np.empty(len(source_N), np.int64)
        for start in range(0, table.n_contexts, _CONTEXTS_AT_ONCE):
            stop = min(start + _CONTEXTS_AT_ONCE, table.n_contexts)
            here = np.flatnonzero((start <= context_N) & (context_N < stop))
            documents = table.documents(start, stop)
            labels_N[here] = documents[context_N[here] - start, position_N[here]]
        return labels_N, "documents"


class EvalSetRows(RowSource):
    """The rows of an evaluation set without labels (suite core)."""

    def __init__(self, evalset: EvalSet, most_rows: int | None = None) -> None:
        n_rows = evalset.n_rows
        super().__init__(
            evalset_source(evalset),
            evalset_origin(evalset),
            n_rows if most_rows is None else min(n_rows, most_rows),
            f"evaluation set {evalset.path}",
        )
        self.evalset = evalset

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.evalset.read(start, stop)

    def text(self, most_contexts: int | None, *, most_tokens: int) -> EvalSetText:
        """The contexts of the rows: so many, or those of so many tokens."""
        size = int(self.evalset.recipe["context_size"])
        return EvalSetText(self.evalset, most_contexts or max(1, most_tokens // size))

    def _labels(self) -> tuple[NDArray[np.int64], str]:
        item_N = self.evalset.row_item[: self.n_rows]
        return self.evalset.item_document[item_N], "documents"


def evalset_source(evalset: EvalSet) -> Source:
    """An evaluation set, as results name it."""
    return Source(
        kind="evaluation set", name=evalset.name, digest=evalset.digest, suite=evalset.suite
    )


def evalset_origin(evalset: EvalSet) -> Origin:
    """Where the activations of an evaluation set come from."""
    return Origin(
        d_in=evalset.d_in,
        model=evalset.model,
        model_revision=evalset.recipe["model"].get("revision"),
        layer=evalset.layer,
        hook=evalset.hook,
    )


def store_origin(store: ActivationStore) -> Origin:
    """Where the rows of a store come from, as far as it says."""
    recipe, model = store.recipe, store.recipe.get("model")
    model = model if isinstance(model, dict) else {}
    return Origin(
        d_in=store.d_in,
        model=model.get("name"),
        model_revision=model.get("revision"),
        layer=recipe.get("layer"),
        hook=recipe.get("hook"),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Contexts:
    """Some contexts of text; what stands behind a length is padding."""

    tokens_BT: NDArray[np.int64]
    length_B: NDArray[np.int64]
    rows_BT: NDArray[np.bool_]
    document_BT: NDArray[np.int64]
    first: int


class StoreText:
    """The held-out contexts of a store's corpus, the first n of them."""

    def __init__(self, store: ActivationStore, most_contexts: int) -> None:
        self.source = Source(kind="store", name=store.name, digest=store.digest)
        self._table: TokenTable = store.corpus.heldout
        self.context_size = self._table.context_size
        self.n_contexts = min(self._table.n_contexts, most_contexts)
        if self.n_contexts == 0:
            raise InputError(
                f"Store {store.place} has no held-out text for metrics that need the language "
                "model. Harvest one with --heldout-tokens above 0, or leave them out."
            )

    def batches(self, contexts: int) -> Iterator[Contexts]:
        """So many contexts at a time, cut to the longest among them."""
        for start in range(0, self.n_contexts, contexts):
            stop = min(start + contexts, self.n_contexts)
            length_B = self._table.lengths(start, stop).astype(np.int64)
            longest = int(length_B.max(initial=1))
            yield Contexts(
                tokens_BT=self._table.tokens(start, stop)[:, :longest].astype(np.int64),
                length_B=length_B,
                rows_BT=self._table.rows(start, stop)[:, :longest],
                document_BT=self._table.documents(start, stop)[:, :longest].astype(np.int64),
                first=start,
            )


class EvalSetText:
    """The contexts of an evaluation set without labels (suite core), the first n of them.

    A set holds the tokens of rows only, so that a context comes without its first token: BOS where
    the tokenizer puts it there, and else lost; then the next one stands first, and is no row.
    """

    def __init__(self, evalset: EvalSet, most_contexts: int) -> None:
        self.source = evalset_source(evalset)
        tokenizer = evalset.recipe.get("tokenizer", {})
        bos = tokenizer.get("bos_id") if tokenizer.get("prepends_bos") else None
        self._evalset, self._bos = evalset, [] if bos is None else [int(bos)]
        # Positions ascend inside a context.
        begins = np.flatnonzero(np.diff(evalset.row_position, prepend=np.iinfo(np.int32).max) <= 0)
        self._starts = np.append(begins, evalset.n_rows)[: most_contexts + 1]
        self.n_contexts = len(self._starts) - 1
        self.context_size = int(np.diff(self._starts).max()) + len(self._bos)

    def batches(self, contexts: int) -> Iterator[Contexts]:
        """So many contexts at a time, padded to the longest among them."""
        evalset, n_bos = self._evalset, len(self._bos)
        for start in range(0, self.n_contexts, contexts):
            starts = self._starts[start : start + contexts + 1]
            length_B = np.diff(starts) + n_bos
            tokens_BT = np.zeros((len(length_B), int(length_B.max())), np.int64)
            document_BT = np.zeros_like(tokens_BT)
            for context, (first, last) in enumerate(pairwise(starts)):
                rows = slice(int(first), int(last))
                tokens_BT[context, : length_B[context]] = [*self._bos, *evalset.row_token[rows]]
                documents = evalset.item_document[evalset.row_item[rows]]
                document_BT[context, n_bos : length_B[context]] = documents
            positions_T = np.arange(tokens_BT.shape[1])
            yield Contexts(
                tokens_BT=tokens_BT,
                length_B=length_B,
                rows_BT=(positions_T >= 1) & (positions_T < length_B[:, None]),
                document_BT=document_BT,
                first=start,
            )
