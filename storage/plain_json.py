"""JSON of strangers: what the standard allows, numbers that are numbers, bounded in depth and count.

A short text can become a thousand times as many bytes of objects, or nest deeper than what writes it
again can follow; two readers of one text may take different ones of two equal keys. All of that is
refused before or while it is parsed.
"""

import json
import math
import re
from collections import Counter
from typing import Any

DEEPEST = 100  # a run's config has about ten levels
MOST_VALUES = 4_000_000  # a manifest of 10 billion rows has half a million

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def parse_plain_json(text: str | bytes, most_values: int = MOST_VALUES) -> Any:
    """The value of a JSON text.

    Raises ValueError for NaN, Infinity and 1e999, deep nesting, more than so many values, a key that
    stands twice, and halves of surrogate pairs, as well as for what is no JSON.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")  # strictly: json.loads would let surrogates pass
    if sum(text.count(sign) for sign in ",[{") > most_values:
        raise ValueError(f"it has more than {most_values:,} values")
    try:
        found = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique
        )
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from error
    _check_depth(found)
    if _HALF_PAIR.search(text):
        _check_characters(found)
    return found


def _check_depth(found: Any) -> None:
    level = [found] if isinstance(found, dict | list) else []
    for _ in range(DEEPEST):
        level = [child for each in level for child in _children(each)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _check_characters(found: Any) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text in it has half of a surrogate pair") from error


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [child for child in value.values() if isinstance(child, dict | list)]
    return [child for child in value if isinstance(child, dict | list)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> float:
    raise ValueError(f"{text[:40]} is not a number of JSON")
