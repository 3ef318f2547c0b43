"""A comparison as CSV, one number a line with all that is known of it: for other programs.

Numbers stand in full. A text that a spreadsheet would take for a formula has an apostrophe before it.
"""

import csv
import io
from collections.abc import Iterator
from typing import Any

from ..table import Comparison, Line, Table

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def render(comparison: Comparison) -> str:
    """Header and lines; a baseline is a line of its own."""
    keys = list(dict.fromkeys(key for table in comparison.tables for key in table.heading))
    keys += [comparison.line_key] if comparison.line_key else []
    header = [
        "metric", "value_name", "direction", "source", "source_digest", "baseline", *keys,
        comparison.compared, "value", "low", "high", "n", "seeds",
        "difference", "difference_low", "difference_high", "interval_of_difference", "excludes_zero",
    ]  # fmt: skip
    file = io.StringIO()
    writer = csv.DictWriter(file, header, lineterminator="\n", restval="")
    writer.writeheader()
    for table in comparison.tables:
        for line in table.lines:
            for row in _rows(comparison, table, line):
                writer.writerow({name: safe(value) for name, value in row.items()})
    return file.getvalue()


def _rows(comparison: Comparison, table: Table, line: Line) -> Iterator[dict[str, Any]]:
    entry = next(e for j in comparison.judgements if (e := j.entry(line.series)) is not None)
    shared: dict[str, Any] = {
        "metric": line.series.metric,
        "value_name": line.series.value,
        "direction": line.direction,
        "source": entry.source.name,
        "source_digest": entry.source.digest,
        **table.heading,
    }
    if comparison.line_key is not None:
        shared[comparison.line_key] = line.key_value
    for column, cell in line.cells.items():
        row = shared | {comparison.compared: column} | _estimate(cell.estimate)
        found = line.differences.get(column)
        if found is not None:
            row |= {
                "difference": found.value,
                "difference_low": found.low,
                "difference_high": found.high,
                "interval_of_difference": found.how,
                "excludes_zero": found.excludes_zero,
            }
        yield row
    for name, estimate in line.baselines.items():
        yield shared | {"baseline": name} | _estimate(estimate)


def _estimate(estimate: Any) -> dict[str, Any]:
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": len(estimate.seeds),
        "seeds": " ".join(str(seed) for seed in estimate.seeds),
    }


def safe(value: Any) -> Any:
    """A value as it goes into a cell."""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value
