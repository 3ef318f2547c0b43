"""A draft of an evaluation set: all but the activations, and how texts become tokens for it.

Everything is tokenised before the first forward pass, so that sizes, mistakes and what is left out
are known before anything is written.

Special tokens are as in a harvest: BOS stands before a text if the tokenizer puts it there by
itself (`TextTokenizer.prepends_bos`), and nothing else is added. The first position of a context
and BOS yield no row: they are attention sinks, and an SAE has not seen such rows either
(`storage.corpus.row_positions`).
"""

# I items, C contexts, T positions of a context, P of them with a row

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...storage.errors import InputError
from ...storage.evalset import SPLITS, Task
from ...storage.evalset_writer import Contents
from ..models import ModelInfo
from ..tokens import TextTokenizer
from .config import EvalSetConfig

Tokens = NDArray[np.uint32]
Positions = NDArray[np.int32]

DEFAULT_CONTEXT_SIZE = 1024
EMPTY, ONLY_SINK = "no text", "one token, which is at the attention sink"
_BATCH_TEXTS = 1000  # tokenised at once; the tokenizers library spreads them over the cores


@dataclass(frozen=True, kw_only=True)
class Making:
    """What a suite drafts from."""

    config: EvalSetConfig
    info: ModelInfo
    tokenizer: TextTokenizer
    show_progress: bool = False

    @property
    def seed(self) -> int:
        return self.config.drawn_with

    @property
    def context_size(self) -> int:
        """Tokens of the longest text, BOS included."""
        limit, asked = self.info.max_context, self.config.context_size
        if asked is None:
            return min(DEFAULT_CONTEXT_SIZE, limit or DEFAULT_CONTEXT_SIZE)
        if limit is not None and asked > limit:
            raise InputError(
                f"--context-size {asked} is longer than the {limit} tokens that model "
                f"{self.info.source} can take. Pass {limit} or less."
            )
        return asked

    @property
    def bos(self) -> Tokens:
        """What stands before every text: BOS or nothing, uint32 (0 or 1,)."""
        tokenizer = self.tokenizer
        return np.array([tokenizer.bos_id] if tokenizer.prepends_bos else [], np.uint32)

    @property
    def room(self) -> int:
        """Tokens of text in a context."""
        return self.context_size - len(self.bos)

    def rows_of_text(self, tokens_T: Tokens) -> Positions:
        """Positions of a whole text that may be rows: no first position, no special token."""
        is_row_T = ~np.isin(tokens_T, self.tokenizer.special_ids)
        is_row_T[:1] = False
        return np.flatnonzero(is_row_T).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text to be looked at. label, group: index into the names of its task, -1 for none."""

    text: str
    label: int
    split: int
    group: int = -1


@dataclass(slots=True)
class Draft:
    """Items in the order of the set. Several items may follow one another in one context.

    data: what the texts came from, for the recipe; dropped, truncated: texts by reason and task;
    lines: what to tell the user; context_size: where it is not that of the flags.
    """

    suite: str
    pooling: str
    context_size: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    contexts: list[Tokens] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    _items: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _context_of_item: list[int] = field(default_factory=list)
    _positions: list[Positions] = field(default_factory=list)
    _documents: dict[str, int] = field(default_factory=dict)
    _counts: Counter[tuple[int, int, int]] = field(default_factory=Counter)

    @property
    def n_items(self) -> int:
        return len(self._items)

    def add(
        self,
        tokens_T: Tokens,
        positions_P: Positions,
        labelled: Labelled,
        *,
        document: int | None = None,
    ) -> None:
        """An item of the last task, in a context of its own.

        document: items of one number are resampled together; None: those of equal text.
        """
        self.contexts.append(tokens_T)
        self.add_beside(positions_P, labelled, document=document)

    def add_beside(
        self, positions_P: Positions, labelled: Labelled, *, document: int | None = None
    ) -> None:
        """An item in the context of the one before it, behind its rows."""
        assert len(positions_P)
        if document is None:
            document = self._documents.setdefault(labelled.text, len(self._documents))
        task = len(self.tasks) - 1
        self._items.append((task, labelled.label, labelled.group, labelled.split, document))
        self._counts[task, labelled.split, labelled.label] += 1
        self._texts.append(labelled.text)
        self._context_of_item.append(len(self.contexts) - 1)
        self._positions.append(positions_P)

    def count(self, split: int, label: int) -> int:
        """Items of the last task with this split and label."""
        return self._counts[len(self.tasks) - 1, split, label]

    def positions(self) -> list[Positions]:
        """Of each context the positions with a row, ascending, as the rows are stored."""
        per_context: list[list[Positions]] = [[] for _ in self.contexts]
        for context, positions_P in zip(self._context_of_item, self._positions, strict=True):
            per_context[context].append(positions_P)
        return [np.concatenate(parts) for parts in per_context]

    def contents(self) -> Contents:
        """As it is written."""
        lengths_I = [len(positions_P) for positions_P in self._positions]
        items = np.array(self._items, np.int64).reshape(-1, 5)
        rows = zip(self._context_of_item, self._positions, strict=True)
        return Contents(
            suite=self.suite,
            pooling=self.pooling,
            tasks=self.tasks,
            texts=self._texts,
            item_task=items[:, 0],
            item_label=items[:, 1],
            item_group=items[:, 2],
            item_split=items[:, 3],
            item_document=items[:, 4],
            row_item=np.repeat(np.arange(len(lengths_I)), lengths_I),
            row_token=np.concatenate([self.contexts[c][p] for c, p in rows]),
            row_position=np.concatenate(self._positions),
        )


def add_texts(draft: Draft, making: Making, texts: Iterable[Labelled]) -> None:
    """Texts of the last task, pooled by `last` or `mean`. What is too long loses its beginning.

    Counts what is cut, and what is left out because no position of it can be a row.
    """
    task = draft.tasks[-1].name
    for batch in batches_of(texts, _BATCH_TEXTS):
        found = making.tokenizer.encode([each.text for each in batch])
        for labelled, tokens_T in zip(batch, found, strict=True):
            if len(tokens_T) > making.room:
                draft.truncated[task] += 1
                tokens_T = tokens_T[-making.room :]
            whole_T = np.concatenate([making.bos, tokens_T])
            positions_P = making.rows_of_text(whole_T)
            if draft.pooling == "last":
                positions_P = np.array([len(whole_T) - 1], np.int32)[: len(whole_T) > 1]
            if not len(positions_P):
                draft.dropped[f"{task}: {ONLY_SINK if len(tokens_T) else EMPTY}"] += 1
                continue
            draft.add(whole_T, positions_P, labelled)


def check_classes(draft: Draft, splits: Sequence[int]) -> None:
    """InputError unless every class of the last task has an item in each of the splits."""
    task = draft.tasks[-1]
    for split in splits:
        for label, name in enumerate(task.classes):
            if not draft.count(split, label):
                raise InputError(
                    f"Task {task.name} has no {SPLITS[split]} text of class {name!r} left. Pass a "
                    "larger --limit, or other tasks with --task."
                )


def batches_of(values: Iterable[Labelled], size: int) -> Iterator[list[Labelled]]:
    """Lists of at most `size`, in order."""
    batch: list[Labelled] = []
    for value in values:
        batch.append(value)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
