"""JSON of strangers: what the standard allows, numbers that are numbers, and not nested without end."""

import json
import math
from typing import Any

DEEPEST = 100  # a run's config has about ten levels


def parse_plain_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for NaN, Infinity, 1e999 and deep nesting too."""
    try:
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from error
    level = [found]
    for _ in range(DEEPEST):
        level = [child for each in level for child in _children(each)]
        if not level:
            return found
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")
