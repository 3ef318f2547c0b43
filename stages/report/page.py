"""What a page is made of: sections of figures and tables, which the templates lay out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..compare.choose import Judgement
from .groups import Group


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure. caption: what it shows, as text beside it."""

    caption: str
    svg: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Text that leads to a place of the report; href None: plain text."""

    text: str
    href: str | None = None


Cell = str | Sequence[Link]


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """A table that is folded away until it is asked for."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class LatentPages:
    """Which latents have a place in the report: by name and weights of a run, its page and them."""

    found: dict[tuple[str, str], tuple[str, frozenset[int]]] = field(default_factory=dict)

    def add(self, run: Judgement, page: str, latents: Iterable[int]) -> None:
        self.found[_key(run)] = page, frozenset(latents)

    def link(self, run: Judgement, latent: object) -> Link:
        """The number of a latent, with the place where it is shown if there is one."""
        page, latents = self.found.get(_key(run), ("", frozenset()))
        is_shown = isinstance(latent, int) and latent in latents
        return Link(text=str(latent), href=f"{page}#latent-{latent}" if is_shown else None)


def _key(run: Judgement) -> tuple[str, str]:
    return run.name, str(run.facts.get("sae_sha256"))


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
    tables: Sequence[DataTable] = ()
    tables_title: str = ""
