"""Plain-text tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from ..storage.shown import shown


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = True) -> str:
    """Aligned columns: the first to the left, the others to the right, or to the left too.

    Cells may hold texts from files: they are escaped.
    """
    header, rows = [shown(name) for name in header], [[shown(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = str.rjust if right else str.ljust
        parts = [first[0].ljust(first[1]), *(aligned(cell, width) for cell, width in others)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def run_table(runs: Sequence[tuple[str, Any]]) -> str:
    """Summaries of runs side by side, judged on held-out unmasked rows."""
    header = ("run", "explained variance", "L0", "dead latents", "gamma", "rows/s", "waiting")
    return table(header, [_run_row(name, summary) for name, summary in runs])


def _run_row(name: str, summary: Any) -> tuple[str, ...]:
    dead = summary.dead_fraction
    return (
        name,
        number(summary.explained_variance, ".4f"),
        number(summary.l0, ".1f"),
        "-" if dead is None else f"{round(dead * summary.d_sae)} of {summary.d_sae}",
        number(summary.gamma, ".3f"),
        f"{summary.rows_per_s:,.0f}",
        f"{summary.wait_share:.1%}",
    )


def number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


__all__ = ["number", "run_table", "table"]
