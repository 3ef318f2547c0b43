"""What a page is made of: sections of figures and tables, which the templates lay out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .groups import Group


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure. caption: what it shows, as text beside it."""

    caption: str
    svg: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """A table that is folded away until it is asked for. Cells are texts."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """id: for links; text: paragraphs before the figures; folded: figures behind a summary."""

    id: str
    title: str
    text: Sequence[str] = ()
    legend: Sequence[Group] = ()
    has_oracle_line: bool = False
    pictures: Sequence[Picture] = ()
    folded: Sequence[Picture] = ()
    folded_title: str = ""
    tables: Sequence[DataTable] = field(default_factory=list)
