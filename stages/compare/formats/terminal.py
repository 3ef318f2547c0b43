"""A comparison as aligned text. What is bold elsewhere has a star here."""

import textwrap
from collections.abc import Iterator, Sequence

from ....storage.shown import shown
from ..grid import Grid, Text, grids
from ..notes import notes
from ..table import Comparison

_WIDTH = 100


def render(comparison: Comparison) -> str:
    """Tables, then the notes."""
    blocks = ["\n".join(_lines(grid)) for grid in grids(comparison)]
    wrapped = [
        textwrap.fill(shown(note), _WIDTH, initial_indent="* ", subsequent_indent="  ")
        for note in _starred(notes(comparison))
    ]
    return "\n\n".join([*blocks, "\n".join(wrapped)]) + "\n"


def _starred(sentences: Sequence[str]) -> list[str]:
    return [
        s.replace("Bold:", "Starred:").replace("a bold number", "a starred number")
        for s in sentences
    ]


def _lines(grid: Grid) -> Iterator[str]:
    rows = [[_plain(cell) for cell in row.cells] for row in grid.rows]
    header = [shown(name) for name in grid.header]
    # A column for stars, so that digits stand below digits.
    header = [name + " " for name in header]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    if grid.title:
        yield shown(grid.title)
    yield _line(header, widths)
    yield "  ".join("-" * (width - 1) + " " for width in widths).rstrip()
    yield from (_line(row, widths) for row in rows)


def _plain(cell: Text) -> str:
    return shown(cell.text) + ("*" if cell.is_bold else " ")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    parts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "  ".join(parts).rstrip()
