"""A comparison as LaTeX: tabular environments with the rules of booktabs."""

import re
from collections.abc import Iterator

from ....storage.shown import shown
from ..grid import Grid, Text, grids
from ..notes import notes
from ..table import Comparison

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
}
_SPECIAL = re.compile("|".join(map(re.escape, _ESCAPES)))
_SIGNED = re.compile(r"(?<![\w.])-(?=\d)")


def render(comparison: Comparison) -> str:
    """A tabular for each table, then the notes."""
    blocks = ["% needs \\usepackage{booktabs} and, for other letters than ASCII, UTF-8 input"]
    blocks += ["\n".join(_lines(grid)) for grid in grids(comparison)]
    listed = "\n\n".join(rf"\noindent {escaped(note)}" for note in notes(comparison))
    return "\n\n".join([*blocks, rf"{{\footnotesize {listed}}}"]) + "\n"


def _lines(grid: Grid) -> Iterator[str]:
    if grid.title:
        yield rf"\noindent\textbf{{{escaped(grid.title)}}}"
        yield ""
    yield rf"\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}"
    yield r"\toprule"
    yield " & ".join(map(escaped, grid.header)) + r" \\"
    for place, row in enumerate(grid.rows):
        if row.opens:
            yield r"\midrule" if place == 0 else r"\addlinespace"
        yield " & ".join(map(_cell, row.cells)) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _cell(cell: Text) -> str:
    text = escaped(cell.text)
    if cell.is_number:
        text = _SIGNED.sub("$-$", text)
    return rf"\textbf{{{text}}}" if cell.is_bold else text


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return _SPECIAL.sub(lambda found: _ESCAPES[found[0]], shown(text))
