"""Held-out text without labels, every position of it pooled: for reconstruction and the like.

A store's own held-out rows are that already, for its model, layer and hook point, and need no
building. For another layer, hook point or model with the same tokenizer, the contexts of the
store's held-out text go through the model; or contexts are made of text files or a dataset as a
harvest makes them: documents joined by the end-of-text token (one a context where the tokenizer has
none), BOS first if the tokenizer puts it there. The rows are those that a harvest would keep.

An item is the part of one document in one context, so that items can be resampled by document.
"""

# T positions of a context

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...storage import ActivationStore, open_store
from ...storage.corpus import row_positions
from ...storage.errors import InputError
from ...storage.evalset import TEST
from ..sources import TextConfig, open_text
from .base import Draft, Labelled, Making, Tokens

DEFAULT_ROWS = 100_000

Context = tuple[Tokens, NDArray[np.int64]]  # token ids, document of each; (T,)


def draft(making: Making) -> Draft:
    """Contexts until they give `--limit` rows."""
    made = Draft(suite="core", pooling="all")
    wanted = making.config.limit or DEFAULT_ROWS
    contexts = (
        _of_store(making, made) if making.config.store is not None else _of_text(making, made)
    )
    n_rows = 0
    for tokens_T, document_T in contexts:
        n_rows += _add(made, making, tokens_T, document_T, wanted - n_rows)
        if n_rows >= wanted:
            break
    if n_rows == 0:
        raise InputError(
            "The text is too short: not one position of it can be a row. Pass more text."
        )
    if n_rows < wanted:
        made.lines.append(f"text      gives {n_rows:,} rows of the {wanted:,} asked for")
    return made


def serves_itself(store: ActivationStore, making: Making) -> bool:
    """Whether a store's held-out rows are of this model, layer and hook point."""
    recipe, config = store.recipe, making.config
    model = recipe.get("model") or {}
    return (
        recipe.get("layer") == config.layer
        and recipe.get("hook") == config.hook
        and model.get("revision") == making.info.revision
    )


def _add(
    made: Draft, making: Making, tokens_T: Tokens, document_T: NDArray[np.int64], most: int
) -> int:
    """Items of one context, up to `most` rows; how many there are."""
    tokenizer = making.tokenizer
    is_row_T = row_positions(
        tokens_T[None],
        np.array([len(tokens_T)], np.uint32),
        bos_id=tokenizer.bos_id,
        keep_first=False,
    )[0]
    positions = np.flatnonzero(is_row_T)[:most].astype(np.int32)
    is_new_context = True
    for part in np.split(positions, np.flatnonzero(np.diff(document_T[positions])) + 1):
        if not len(part):
            continue
        document = int(document_T[part[0]])
        span = np.flatnonzero(document_T == document)
        labelled = Labelled(tokenizer.decode(tokens_T[span]), -1, TEST)
        if is_new_context:
            made.add(tokens_T, part, labelled, document=document)
            is_new_context = False
        else:
            made.add_beside(part, labelled, document=document)
    return len(positions)


def _of_store(making: Making, made: Draft) -> Iterator[Context]:
    config = making.config
    assert config.store is not None
    store = open_store(config.store)
    there = store.corpus.info["recipe"]["tokenizer"]["fingerprint"]
    if there != making.tokenizer.fingerprint:
        raise InputError(
            f"The tokens of store {config.store} are of another tokenizer than that of model "
            f"{making.info.source}. Pass the model that it was harvested from, or --text."
        )
    made.data = {"store_corpus": store.corpus.digest}
    table = store.corpus.heldout
    size = making.context_size if config.context_size is not None else making.info.max_context
    if size is not None and table.context_size > size:
        raise InputError(
            f"The contexts of store {config.store} have {table.context_size} tokens, and {size} is "
            "the most that can be taken. Pass --text instead."
        )
    made.context_size = table.context_size
    for context in range(table.n_contexts):  # as a harvest would: a fair sample comes first
        n = int(table.lengths(context, context + 1)[0])
        document_T = table.documents(context, context + 1)[0, :n].astype(np.int64)
        yield table.context(context), document_T


def _of_text(making: Making, made: Draft) -> Iterator[Context]:
    config, tokenizer = making.config, making.tokenizer
    assert config.text is not None
    source = open_text(TextConfig(dataset=config.text, text_column=config.text_column))
    made.data = {"source": source.identity}
    room = making.room
    tokens_N, document_N = np.empty(0, np.uint32), np.empty(0, np.int64)
    for record in source.records():
        if record.text is None:
            made.dropped[f"text: {record.problem}"] += 1
            continue
        ids_N = tokenizer.encode([record.text])[0]
        if tokenizer.eos_id is None:  # nothing to join documents by
            made.truncated["text"] += len(ids_N) > room
            yield _context(making, ids_N[:room], np.full(min(len(ids_N), room), record.index))
            continue
        ids_N = np.append(ids_N, np.uint32(tokenizer.eos_id))
        tokens_N = np.concatenate([tokens_N, ids_N])
        document_N = np.concatenate([document_N, np.full(len(ids_N), record.index)])
        while len(tokens_N) >= room:
            yield _context(making, tokens_N[:room], document_N[:room])
            tokens_N, document_N = tokens_N[room:], document_N[room:]
    if len(tokens_N):
        yield _context(making, tokens_N, document_N)


def _context(making: Making, tokens_N: Tokens, document_N: NDArray[np.int64]) -> Context:
    bos = making.bos
    first = document_N[: len(bos)]
    return np.concatenate([bos, tokens_N]), np.concatenate([first, document_N])
