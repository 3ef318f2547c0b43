"""From documents to contexts: joined by EOS and cut, or one document a context.

Counting and writing are one thing here: a `Packer` without a file only counts, so that the rows
that a text holds are known before anything is written, by the same code that writes them.
"""

# N tokens of one document with its EOS, C contexts, W width of a context without a prepended BOS.

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from ..storage.counter import is_drawn, stream_key
from ..storage.errors import InputError
from .token_cache import Batch
from .tokens import TextTokenizer

Tokens = NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class ContextRules:
    """How a context is laid out, and which of its positions yield a row."""

    context_size: int
    pack: bool
    keep_first: bool
    bos_id: int | None
    eos_id: int | None
    prepends_bos: bool

    @classmethod
    def of(
        cls, tokenizer: TextTokenizer, *, context_size: int, pack: bool, keep_first: bool
    ) -> "ContextRules":
        if pack and tokenizer.eos_id is None:
            raise InputError(
                f"The tokenizer of {tokenizer.name} has no end-of-text token to join documents by. "
                "Pass --no-pack for one document a context."
            )
        smallest = 1 + tokenizer.prepends_bos
        if context_size < smallest:
            raise InputError(
                f"Context size {context_size} leaves no place for text. "
                f"Pass --context-size {smallest + 1} or more."
            )
        return cls(
            context_size=context_size,
            pack=pack,
            keep_first=keep_first,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            prepends_bos=tokenizer.prepends_bos,
        )

    @property
    def width(self) -> int:
        """Tokens of text in a context."""
        return self.context_size - self.prepends_bos

    def of_text(self, tokens: Tokens) -> Tokens:
        """What of a document goes into contexts: all and an EOS, or as much as fits in one."""
        if not self.pack:
            return tokens[: self.width]
        assert self.eos_id is not None
        return np.append(tokens, np.uint32(self.eos_id))

    def yields_row(self, text_N: Tokens, filled: int) -> NDArray[np.bool_]:
        """Which tokens yield a row, when the first of them is the filled-th of its context.

        The same rule as storage.corpus.row_positions, which a test holds it to.
        """
        if self.keep_first:
            return np.ones(len(text_N), dtype=np.bool_)
        rows_N = np.ones(len(text_N), np.bool_) if self.bos_id is None else text_N != self.bos_id
        if not self.prepends_bos:
            rows_N[-filled % self.width :: self.width] = False
        return rows_N

    @property
    def rows_of_bos(self) -> int:
        """Rows that the prepended BOS of a context yields."""
        return int(self.prepends_bos and self.keep_first)


class Packer:
    """Contexts of one split, until it has the rows that it wants (None: all the text gives)."""

    def __init__(self, rules: ContextRules, wanted_rows: int | None) -> None:
        self._rules, self._wanted = rules, wanted_rows
        self.contexts = self.rows = self.documents = self.tokens = 0
        self.surplus = 0  # documents that came when the split was full
        self.too_short = 0  # documents of which no position yields a row
        self._filled = self._pending_rows = 0  # of the context that is not complete
        self.is_full = wanted_rows == 0

    @property
    def dropped_tokens(self) -> int:
        """Tokens behind the last context: an incomplete one, or what a full split did not need."""
        return self.tokens - self.contexts * self._rules.width if self._rules.pack else 0

    def add(self, tokens: Tokens) -> Tokens | None:
        """Take a document in; the tokens that go into contexts, or None where none do."""
        if self.is_full:
            self.surplus += 1
            return None
        text_N = self._rules.of_text(tokens)
        yields_N = self._rules.yields_row(text_N, self._filled)
        if self._rules.pack:
            self._add_packed(text_N, yields_N)
        else:
            rows = int(np.count_nonzero(yields_N)) + self._rules.rows_of_bos
            if rows == 0:
                self.too_short += 1
                return None
            self.contexts += 1
            self.rows += rows
        self.documents += 1
        self.tokens += len(text_N)
        self.is_full = self._wanted is not None and self.rows >= self._wanted
        return text_N

    def _add_packed(self, text_N: Tokens, yields_N: NDArray[np.bool_]) -> None:
        rules = self._rules
        rows_before_N = np.cumsum(yields_N)
        ends_C = np.arange(rules.width - self._filled, len(text_N) + 1, rules.width)
        self._filled = (self._filled + len(text_N)) % rules.width
        if not len(ends_C):
            self._pending_rows += int(rows_before_N[-1])
            return
        # Rows of all contexts up to each one that this document completes.
        bos_rows_C = rules.rows_of_bos * np.arange(1, len(ends_C) + 1)
        rows_C = self.rows + self._pending_rows + rows_before_N[ends_C - 1] + bos_rows_C
        self._pending_rows = int(rows_before_N[-1] - rows_before_N[ends_C[-1] - 1])
        completed = len(ends_C)
        if self._wanted is not None:
            # No context more than needed.
            completed = min(completed, int(np.searchsorted(rows_C, self._wanted)) + 1)
        self.contexts += completed
        self.rows = int(rows_C[completed - 1])


class FlatFiles:
    """Contexts of one split in the order of the text: plain uint32 files to gather from."""

    def __init__(self, folder: Path, split: str, rules: ContextRules) -> None:
        self._rules = rules
        self._paths = {
            name: folder / f"{split}.{name}" for name in ("tokens", "document", "length")
        }
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, text_N: Tokens, record: int) -> None:
        """Append what `Packer.add` gave for a record."""
        if not self._rules.pack:
            length = len(text_N) + self._rules.prepends_bos
            self._files["length"].write(np.uint32(length).tobytes())
            padding = np.full(self._rules.width - len(text_N), self._rules.eos_id or 0, np.uint32)
            text_N = np.concatenate([text_N, padding])
        self._files["tokens"].write(text_N.tobytes())
        self._files["document"].write(np.full(len(text_N), record, dtype=np.uint32).tobytes())

    def gather(self, origins_C: NDArray[np.int64]) -> dict[str, Tokens]:
        """Contexts by their index in the order of the text, as they are stored."""
        rules, n = self._rules, len(origins_C)
        tokens_CW = self._read("tokens", origins_C, rules.width)
        document_CW = self._read("document", origins_C, rules.width)
        if rules.prepends_bos:
            bos_C1 = np.full((n, 1), rules.bos_id, dtype=np.uint32)
            tokens_CW = np.concatenate([bos_C1, tokens_CW], axis=1)
            document_CW = np.concatenate([document_CW[:, :1], document_CW], axis=1)
        length_C = np.full(n, rules.context_size, dtype=np.uint32)
        if not rules.pack:
            length_C = self._read("length", origins_C, 1)[:, 0]
        return {
            "tokens": tokens_CW,
            "document": document_CW,
            "length": length_C,
            "origin": origins_C.astype(np.uint32),
        }

    def _read(self, name: str, origins_C: NDArray[np.int64], width: int) -> Tokens:
        """Rows of a file. Read and not mapped: mapped pages would count as this process's memory."""
        rows_CW = np.empty((len(origins_C), width), dtype=np.uint32)
        with self._paths[name].open("rb", buffering=0) as file:
            for row_W, origin in zip(rows_CW, origins_C.tolist(), strict=True):
                n_bytes = os.preadv(file.fileno(), [row_W.data], origin * row_W.nbytes)
                assert n_bytes == row_W.nbytes
        return rows_CW


class Split:
    """Documents dealt to the training and the held-out side, both packed.

    A document's side is a draw keyed by its normalised text: equal texts are never on two sides.
    """

    def __init__(
        self,
        rules: ContextRules,
        *,
        seed: int,
        train_rows: int | None,
        heldout_rows: int,
        heldout_probability: float,
    ) -> None:
        self.train = Packer(rules, train_rows)
        self.heldout = Packer(rules, heldout_rows)
        self.records = 0
        self.left_out: dict[str, int] = {}
        self.heldout_probability = heldout_probability
        self._key = stream_key(seed, "heldout")

    @property
    def is_full(self) -> bool:
        return self.train.is_full and self.heldout.is_full

    def add(
        self,
        batch: Batch,
        *,
        train_to: FlatFiles | None = None,
        heldout_to: FlatFiles | None = None,
    ) -> None:
        """Deal the documents of a batch; those behind the last one that is needed are not taken.

        `records` and `left_out` count whole batches, whose bounds depend on the text alone.
        """
        self.records += batch.n_records
        for reason, n in batch.left_out.items():
            self.left_out[reason] = self.left_out.get(reason, 0) + n
        is_heldout = is_drawn(self._key, batch.keys, self.heldout_probability)
        for document, tokens in enumerate(batch.tokens):
            if self.is_full:
                return
            to_heldout = bool(is_heldout[document])
            text_N = (self.heldout if to_heldout else self.train).add(tokens)
            sink = heldout_to if to_heldout else train_to
            if text_N is not None and sink is not None:
                sink.write(text_N, int(batch.records[document]))
