"""What a text source is: rows from readers, turned into numbered records with a text or a problem.

A reader (one file each in this folder) knows one kind of place that text lies in and yields its raw
rows with a position to go on from. `TextSource` strings readers together and does once, for every
kind, what all of them need: ordinals, the text column, the filter, and the names of what is wrong.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ...storage.errors import InputError
from .fields import MISSING, Filter, field, field_names

# What a position or an identity is made of.
Json = dict[str, Any]

_LOOK_AHEAD = 100  # records in which the text column and the filter's field must turn up


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where text comes from. A None is filled in from RECIPES or by the defaults of the source."""

    dataset: str = "pile-cc"
    text_column: str | None = None
    split: str | None = None
    filter: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row: a mapping of columns, or a bare text, or what is wrong with it."""

    value: Any
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the whole source; either `text` or `problem` is None."""

    index: int  # ordinal in the whole source; rows with a problem count
    text: str | None
    problem: str | None


class RowStream(Iterator[Row], Protocol):
    """Rows of one reader, and where they stand."""

    def position(self) -> Any:
        """JSON to go on with right after the last row that was taken."""


class Reader(Protocol):
    """One place with text. `suffixes`: those of the files it reads; none for other places."""

    suffixes: ClassVar[tuple[str, ...]]

    def identity(self) -> Json:
        """What the rows depend on, for hashing: equal identities give equal rows."""

    def columns(self) -> list[str] | None:
        """Names of the columns where a schema tells them; None where only the rows can."""

    def rows(self, position: Any) -> RowStream:
        """The rows from a position on; from the beginning for None."""


class TextSource:
    """Records of one or more readers in order.

    identity: JSON that says what the records are, for the recipe of whatever is made of them.
    """

    def __init__(
        self, name: str, kind: str, readers: Sequence[Reader], column: str, row_filter: str | None
    ) -> None:
        self.name = name
        self._readers = readers
        self._column = column
        self._filter = Filter.parse(row_filter) if row_filter else None
        self._check_fields()
        self.identity: Json = {
            "kind": kind,
            "parts": [reader.identity() for reader in readers],
            "text_column": column,
            "filter": row_filter or None,
        }

    def records(self, position: Json | None = None) -> "RecordStream":
        """Records from a position of an earlier stream on; from the beginning for None."""
        return RecordStream(self, position)

    def record(self, index: int, row: Row) -> Record:
        """Find the text of a row, or name the problem."""
        problem, text = row.problem, None
        if problem is None:
            problem, text = self._text_of(row.value)
        return Record(index, text, problem)

    def _text_of(self, value: Any) -> tuple[str | None, str | None]:
        """(problem, None) or (None, text)."""
        if self._filter is not None and not self._filter.accepts(value):
            return "filtered out", None
        if isinstance(value, dict):
            value = field(value, self._column)
            if value is MISSING:
                return "no text column", None
        if not isinstance(value, str):
            return "not text", None
        if not value or value.isspace():
            return "empty", None
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            return "not Unicode", None
        return None, value

    def _check_fields(self) -> None:
        """A column or a filter that no early record has is a mistake; say it before reading all."""
        known: set[str] = set()
        for reader in self._readers:
            known |= set(reader.columns() or ())
        values = [row.value for row in self._first_rows() if row.problem is None]
        known |= {name for value in values for name in field_names(value)}
        has_column = self._column in known or any(isinstance(value, str) for value in values)
        if not values and not known:
            return  # nothing but problems, which are counted and reported later
        if not has_column:
            raise InputError(
                f"Text column {self._column!r} is not in {self.name}, whose columns are "
                f"{', '.join(sorted(known)) or '(none)'}. Pass one of them as --text-column."
            )
        if self._filter is not None and not any(self._filter.has_field(value) for value in values):
            raise InputError(
                f"Filter field {self._filter.path!r} is not in {self.name}, whose fields are "
                f"{', '.join(sorted(known)) or '(none)'}. Pass --filter FIELD=VALUE with one of "
                "them."
            )

    def _first_rows(self) -> list[Row]:
        rows = itertools.chain.from_iterable(reader.rows(None) for reader in self._readers)
        return list(itertools.islice(rows, _LOOK_AHEAD))

    @property
    def readers(self) -> Sequence[Reader]:
        """The readers, in the order of their records."""
        return self._readers


class RecordStream(Iterator[Record]):
    """Records one by one; `position()` says where to go on, at any time."""

    def __init__(self, source: TextSource, position: Json | None) -> None:
        position = position or {"reader": 0, "index": 0, "inner": None}
        self._source = source
        self._reader: int = position["reader"]
        self._index: int = position["index"]
        self._inner: Any = position["inner"]
        self._rows: RowStream | None = None

    def __next__(self) -> Record:
        while self._reader < len(self._source.readers):
            if self._rows is None:
                self._rows = self._source.readers[self._reader].rows(self._inner)
            row = next(self._rows, None)
            if row is not None:
                record = self._source.record(self._index, row)
                self._index += 1
                return record
            self._reader, self._inner, self._rows = self._reader + 1, None, None
        raise StopIteration

    def position(self) -> Json:
        """JSON that `TextSource.records` takes to go on right after the last record taken."""
        inner = self._inner if self._rows is None else self._rows.position()
        return {"reader": self._reader, "index": self._index, "inner": inner}
