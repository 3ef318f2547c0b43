"""Results of an evaluation as tables for the terminal: one for each source, an SAE a line."""

from collections.abc import Sequence

from ..stages.evaluation.results import Measured, Result, Source
from ..stages.metrics import names_of
from .tables import number, table

# Values of metrics over rows and text that are shown: name, heading, form.
_COLUMNS = (
    ("explained_variance", "explained variance", ".4f"),
    ("l0", "L0", ".1f"),
    ("dead_fraction", "dead", ".1%"),
    ("gamma", "gamma", ".3f"),
    ("ito_gain", "ITO gain", "+.4f"),
    ("delta_ce", "delta CE", "+.4f"),
    ("loss_recovered_zero", "loss recovered", ".4f"),
    ("kl", "KL", ".4f"),
    ("ablation_sparsity", "ablation sparsity", ".4f"),
)
_ARROWS = {"up": " ↑", "down": " ↓", "none": ""}


def eval_tables(results: Sequence[Result]) -> list[str]:
    """A heading and a table for each source that there are values of."""
    sources = {entry.source.digest: entry.source for each in results for entry in each.metrics}
    lines: list[str] = []
    for source in sources.values():
        lines += [("\n" if lines else "") + _heading(source), _table(source, results)]
    return lines


def _heading(source: Source) -> str:
    if source.kind == "store":
        return f"Held-out rows and text of {source.name}"
    return f"Evaluation set {source.name} ({source.suite})"


def _table(source: Source, results: Sequence[Result]) -> str:
    rows = [(each.name, _entries(each, source)) for each in results]
    rows = [(name, entries) for name, entries in rows if entries]
    of_all = [entry for _, entries in rows for entry in entries]
    columns = [column for column in _COLUMNS if any(column[0] in entry.values for entry in of_all)]
    for entry in of_all:
        # Of a metric over items its first value is the one that it is about.
        if entry.metric in names_of("items") and entry.values:
            first = next(iter(entry.values))
            heading = first.replace("_", " ") + _ARROWS[entry.direction]
            if (first, heading, ".4f") not in columns:
                columns.append((first, heading, ".4f"))
    header = ("SAE", *(heading for _, heading, _ in columns))
    cells = [
        (name, *(number(_value(entries, key), form) for key, _, form in columns))
        for name, entries in rows
    ]
    return table(header, cells)


def _entries(result: Result, source: Source) -> list[Measured]:
    return [entry for entry in result.metrics if entry.source.digest == source.digest]


def _value(entries: Sequence[Measured], key: str) -> float | None:
    return next((entry.values[key].value for entry in entries if key in entry.values), None)
