"""A comparison as Markdown tables."""

import re
from collections.abc import Iterator

from ....storage.shown import shown
from ..grid import Grid, Text, grids
from ..notes import notes
from ..table import Comparison

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")


def render(comparison: Comparison) -> str:
    """Tables, then the notes as a list."""
    blocks = ["\n".join(_lines(grid)) for grid in grids(comparison)]
    listed = "\n".join(f"- {escaped(note)}" for note in notes(comparison))
    return "\n\n".join([*blocks, listed]) + "\n"


def _lines(grid: Grid) -> Iterator[str]:
    if grid.title:
        yield f"**{escaped(grid.title)}**"
        yield ""
    yield "| " + " | ".join(map(escaped, grid.header)) + " |"
    yield "|" + "|".join(["---", *["---:"] * (len(grid.header) - 1)]) + "|"
    for row in grid.rows:
        yield "| " + " | ".join(map(_cell, row.cells)) + " |"


def _cell(cell: Text) -> str:
    text = escaped(cell.text)
    return f"**{text}**" if cell.is_bold else text


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    return _SPECIAL.sub(r"\\\1", shown(text))
