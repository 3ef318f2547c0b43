"""Tables as cells of text: what all formats for reading have in common."""

from collections.abc import Iterator
from dataclasses import dataclass

from .facts import label, name_of, shown
from .intervals import Difference, Estimate
from .notes import ARROWS, MARKS, source_label
from .table import BASELINES, Comparison, Line, Table

MISSING = "-"


@dataclass(frozen=True, kw_only=True)
class Text:
    """What stands in a cell. is_number: it goes to the right; is_difference: it compares others."""

    text: str
    is_bold: bool = False
    is_number: bool = True
    is_difference: bool = False


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One line; opens: whether a new series begins with it, whose name others leave out."""

    line: Line
    cells: list[Text]
    opens: bool


@dataclass(frozen=True, kw_only=True)
class Grid:
    title: str
    header: list[str]
    rows: list[GridRow]


def grids(comparison: Comparison) -> Iterator[Grid]:
    """A grid for each table."""
    for table in comparison.tables:
        yield Grid(
            title=table.title, header=_header(comparison), rows=list(_rows(comparison, table))
        )


def _header(comparison: Comparison) -> list[str]:
    first, *others = comparison.columns
    header = ["metric", *([name_of(comparison.line_key)] if comparison.line_key else [])]
    header.append(label(comparison.compared, first))
    for column in others:
        name = label(comparison.compared, column)
        header += [name, "difference" if len(others) == 1 else f"difference, {name}"]
    return [*header, *BASELINES]


def _rows(comparison: Comparison, table: Table) -> Iterator[GridRow]:
    before = None
    for line in table.lines:
        opens = line.series != before
        before = line.series
        cells = [Text(text=_name(comparison, line) if opens else "", is_number=False)]
        if comparison.line_key is not None:
            cells.append(Text(text=shown(line.key_value)))
        yield GridRow(line=line, cells=[*cells, *_numbers(comparison, line)], opens=opens)


def _name(comparison: Comparison, line: Line) -> str:
    arrow, data = ARROWS[line.direction], source_label(comparison, line.series)
    return " ".join(part for part in (line.series.name, arrow, data and f"on {data}") if part)


def _numbers(comparison: Comparison, line: Line) -> Iterator[Text]:
    for place, column in enumerate(comparison.columns):
        cell = line.cells.get(column)
        yield _estimate(
            None if cell is None else cell.estimate, line, is_bold=cell is not None and cell.is_bold
        )
        if place > 0:
            yield _difference(line.differences.get(column), line)
    for name in BASELINES:
        yield _estimate(line.baselines.get(name), line)


def _estimate(estimate: Estimate | None, line: Line, *, is_bold: bool = False) -> Text:
    if estimate is None:
        return Text(text=MISSING)
    return Text(text=number(estimate.value, line.decimals), is_bold=is_bold)


def _difference(difference: Difference | None, line: Line) -> Text:
    if difference is None:
        return Text(text=MISSING)
    text = signed(difference.value, line.decimals)
    if difference.low is not None and difference.high is not None:
        low, high = (signed(v, line.decimals) for v in (difference.low, difference.high))
        text += f" [{low}, {high}]"
    return Text(
        text=text + MARKS[difference.how], is_bold=difference.excludes_zero, is_difference=True
    )


def number(value: float, decimals: int) -> str:
    """A number with that many decimals, or with powers of ten where it would be 0 or very long."""
    if value != 0 and (abs(value) <= 0.5 * 10.0**-decimals or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.{decimals}f}"


def signed(value: float, decimals: int) -> str:
    """The same with a sign, which a number that rounds to 0 keeps: -0.0000 is below 0."""
    text = f"{abs(value):,.{decimals}f}" if abs(value) < 1e6 else f"{abs(value):.2e}"
    return ("-" if value < 0 else "+") + text
