"""Fields of a raw row by dotted path, and filters on them: meta.pile_set_name=Pile-CC."""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...storage.errors import InputError

MISSING = object()


@dataclass(frozen=True)
class Filter:
    """Keeps the rows whose field at a dotted path has a value, compared as text."""

    path: str
    wanted: str

    @classmethod
    def parse(cls, text: str) -> "Filter":
        path, equals, wanted = text.partition("=")
        if not equals or not all(part.strip() for part in path.split(".")):
            raise InputError(
                f"Filter {text!r} is not of the form FIELD=VALUE. "
                "Pass for example --filter meta.pile_set_name=Pile-CC."
            )
        return cls(path.strip(), wanted.strip())

    def accepts(self, row: Any) -> bool:
        """Whether the row's field has the value; true and null are spelt as in JSON."""
        found = field(row, self.path)
        if found is MISSING:
            return False
        if isinstance(found, str):
            return found == self.wanted
        try:
            return json.dumps(found) == self.wanted
        except (TypeError, ValueError):  # dates and bytes, which Parquet has and JSON has not
            return str(found) == self.wanted

    def has_field(self, row: Any) -> bool:
        return field(row, self.path) is not MISSING


def field_names(row: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of a row's fields, those of nested mappings too."""
    inner = _as_mapping(row)
    if inner is None:
        return
    for name, value in inner.items():
        yield f"{prefix}{name}"
        yield from field_names(value, f"{prefix}{name}.")


def field(row: Any, path: str) -> Any:
    """The value at a path. A name that itself has dots is found before the path is split."""
    inner = _as_mapping(row)
    if inner is None:
        return MISSING
    if path in inner:
        return inner[path]
    name, dot, rest = path.partition(".")
    return field(inner[name], rest) if dot and name in inner else MISSING


def _as_mapping(value: Any) -> dict[str, Any] | None:
    """A mapping, or one written as JSON or as a Python literal: copies of the Pile have both."""
    if isinstance(value, dict):
        return value
    if not (isinstance(value, str) and value.startswith("{") and value.rstrip().endswith("}")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, dict):
            return parsed
    return None
