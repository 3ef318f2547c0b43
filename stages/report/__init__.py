"""A report: results as a folder of pages that open from disk, need no network and run no script."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ...storage.address import Place
from ..compare import compare
from ..evaluation.results import Result
from .build import site
from .folder import INDEX, check_place, write_pages
from .saes import Options, Saes, Surveyed, folders_by_digest

BY = ("mask_p", "arch", "l0")

Say = Callable[[str], object]


def write_report(
    results: Sequence[Result],
    out: Path,
    *,
    by: Sequence[str] = BY,
    runs: Sequence[str | Path] = (),
    store: Place | None = None,
    options: Options | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Write the pages of a report; gives the path of the first.

    by: of the tables, as `compare` takes it; runs: run folders, where they are not where results
    say; store: whose held-out rows show what latents fire on. Raises InputError and StoreError for
    what cannot work, DiskError when pages cannot be written. An SAE whose run or store is not there
    has no page of latents, and the report says why.
    """
    check_place(out)
    comparison = compare(results, by)
    saes = Saes(folders_by_digest(runs), store, options or Options())

    def surveyed() -> "list[Surveyed]":
        found = []
        for number, run in enumerate(comparison.runs, 1):
            each = saes.survey(run)
            found.append(each)
            say(f"{number} of {len(comparison.runs)}  {run.name}  {_said(each)}")
        return found

    write_pages(out, site(comparison, results, surveyed()))
    return out / INDEX


def _said(surveyed: Surveyed) -> str:
    if surveyed.survey is None:
        return f"no page of latents: {surveyed.why_not}"
    return f"{len(surveyed.survey.latents)} latents of {surveyed.survey.d_sae:,}"


__all__ = ["Options", "write_report"]
