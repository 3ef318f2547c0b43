"""From results to the pages of a report, as text; nothing is written here."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from ...storage import provenance
from ...storage.shown import shown
from ..compare import Comparison
from ..compare.choose import Judgement
from ..compare.grid import GridRow, grids
from ..compare.notes import ARROWS, about_l0, notes, source_label
from ..evaluation.results import Result
from . import overview
from .contexts import ContextView, context_views
from .curves import Curves
from .details import density_section, letters_section, ood_section
from .figures import activations
from .folder import INDEX, page_name
from .groups import Groups
from .names import FOREMOST_METRICS, title_of
from .page import LatentPages, Section
from .saes import Surveyed

_TOGETHER = re.compile(r"(?<=\d) (?=%)|(?<=\bL0) (?=\d)|(?<=\bp) (?== \d)|(?<=\bp =) (?=\d)")


@dataclass(frozen=True, kw_only=True)
class GridGroup:
    """Lines of one series: they share what stands at their left. code: as commands name it."""

    title: str
    code: str
    rows: Sequence[GridRow]


@dataclass(frozen=True, kw_only=True)
class GridView:
    title: str
    header: Sequence[str]
    groups: Sequence[GridGroup]


@dataclass(frozen=True, kw_only=True)
class LatentSection:
    """One latent of a page."""

    index: int
    density: str
    rows: str
    picture: str | None
    roles: Sequence[str]
    contexts: Sequence[ContextView]


def site(
    comparison: Comparison, results: Sequence[Result], surveys: Iterable[Surveyed]
) -> dict[str, str]:
    """All pages by their path. surveys: of each run, worked off one after another."""
    groups = Groups.of(comparison.runs)
    title = _title(comparison.runs)
    pages: dict[str, str] = {}
    places = LatentPages()
    rows = []
    for surveyed in surveys:
        run = surveyed.run
        page = None
        if surveyed.survey is not None:
            page = page_name(run.name, str(run.facts.get("sae_sha256")), pages)
            pages[page] = _render(
                "latents.html.j2",
                title=f"Latents of {run.name}",
                report=title,
                run=run,
                group=groups.of_run(run),
                facts=overview.run_row(run, None, ""),
                header=overview.run_header(),
                surveyed=surveyed,
                latents=_latent_sections(surveyed),
            )
            places.add(run, page, (latent.index for latent in surveyed.survey.latents))
        rows.append(overview.run_row(run, page, surveyed.why_not))
    foremost = comparison.of_metrics(FOREMOST_METRICS)
    shown = foremost if foremost.tables else comparison
    verdicts = overview.verdicts(comparison)
    pages[INDEX] = _render(
        "index.html.j2",
        title=title,
        summary=overview.summary(comparison.runs),
        verdicts=[each for each in verdicts if each.is_foremost],
        more_verdicts=[each for each in verdicts if not each.is_foremost],
        cautions=about_l0(comparison),
        grids=_grid_views(shown),
        notes=notes(shown),
        all_grids=_grid_views(comparison) if len(shown.series) < len(comparison.series) else [],
        all_notes=notes(comparison),
        sections=_sections(comparison, groups, places),
        run_header=overview.run_header(),
        runs=rows,
        missing=_missing(rows),
        definitions=overview.definitions(comparison.judgements),
        provenance=overview.provenance([result.provenance for result in results]),
    )
    return pages


def _title(runs: Sequence[Judgement]) -> str:
    models = {(run.facts.get("model"), run.facts.get("layer")) for run in runs}
    if len(models) == 1:
        ((model, layer),) = models
        if model is not None:
            return f"Sparse autoencoders of {model}, layer {layer}"
    return "Sparse autoencoders side by side"


def _missing(rows: Sequence[overview.RunRow]) -> list[tuple[str, list[str]]]:
    """Why runs have no page of latents, with the names of the runs."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.why_no_page:
            found.setdefault(row.why_no_page, []).append(row.name)
    return list(found.items())


def _sections(comparison: Comparison, groups: Groups, places: LatentPages) -> list[Section]:
    curves = Curves(comparison.judgements, groups)
    found = [
        curves.pareto_section(),
        curves.paired_section(),
        letters_section(comparison.runs, groups, places),
        ood_section(comparison.runs, groups),
        density_section(comparison.runs, groups),
    ]
    return [section for section in found if section is not None]


def _grid_views(comparison: Comparison) -> list[GridView]:
    """Tables with the lines of one series together."""
    views = []
    for grid in grids(comparison):
        groups = []
        for series, pairs in groupby(grid.rows, key=lambda row: row.line.series):
            rows = list(pairs)
            arrow, data = ARROWS[rows[0].line.direction], source_label(comparison, series)
            groups.append(
                GridGroup(
                    title=f"{title_of(series.metric, series.value)}\N{NO-BREAK SPACE}{arrow}".strip(),
                    code=f"{series.name} on {data}" if data else series.name,
                    rows=rows,
                )
            )
        views.append(GridView(title=grid.title, header=grid.header, groups=groups))
    return views


def _latent_sections(surveyed: Surveyed) -> list[LatentSection]:
    assert surveyed.survey is not None
    found = []
    for latent in surveyed.survey.latents:
        picture = None
        if latent.counts:
            picture = activations(
                f"latent-{latent.index}-histogram", latent.edges, latent.counts,
                title=f"Activations of latent {latent.index}",
            )  # fmt: skip
        found.append(
            LatentSection(
                index=latent.index,
                density=f"{100 * latent.density:.3g} %",
                rows=f"{latent.rows:,}",
                picture=picture,
                roles=surveyed.roles.get(latent.index, ()),
                contexts=context_views(latent),
            )
        )
    return found


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sae_pipe.stages.report"),
        autoescape=True,  # every text comes from a file
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kept"] = kept_together
    return environment


def _shown(value: Any) -> Any:
    """What a template puts out: control characters of a text from a file are escaped."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    kept = re.split("([\n\N{NO-BREAK SPACE}])", value)
    return "".join(part if place % 2 else shown(part) for place, part in enumerate(kept))


def kept_together(text: str) -> str:
    """Numbers and what belongs to them stay on one line: 95 %, L0 20, p = 0.3."""
    # What is escaped already (a Markup) stays marked so.
    return type(text)(_TOGETHER.sub("\N{NO-BREAK SPACE}", text))


def _render(template: str, **values: Any) -> str:
    shared = {
        "versions": provenance.versions(),
        "written": provenance.now(),
    }
    return str(_environment().get_template(template).render(**shared, **values))
