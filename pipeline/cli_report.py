"""sae-pipe report"""

from pathlib import Path
from typing import Annotated

import typer

from ..storage.address import place
from .cli_compare import BY, names
from .errors import told_to_the_user
from .say import say


@told_to_the_user
def report(
    results: Annotated[
        list[Path], typer.Argument(help="Folders or files that `sae-pipe eval --out` wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pages.")] = Path("report"),
    by: Annotated[str, typer.Option(help="Of the tables, as in `sae-pipe compare`.")] = BY,
    runs: Annotated[
        list[str] | None,
        typer.Option(
            help="A run folder, a folder of them, or hf://USER/REPO, where they are not where the results say; "
            "several times for several."
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="The store whose held-out rows show what latents fire on. Default: of each run the "
            "one it was fitted from."
        ),
    ] = None,
    latents: Annotated[
        int, typer.Option(help="Latents to show of each SAE, from rare to common; 0 for none.")
    ] = 24,
    examples: Annotated[int, typer.Option(help="Contexts of each latent.")] = 6,
    rows: Annotated[
        int | None, typer.Option(help="Held-out rows to look for them in. Default: 100,000.")
    ] = None,
) -> None:
    """Write results as pages that open from disk: tables, pictures, runs, and what latents fire on.

    The pages need no network and run no script. An existing folder is written over only if it is a
    report.
    """
    from ..stages.evaluation.results import read_results
    from ..stages.report import Options, write_report

    shown = Options(latents=latents, examples=examples)
    if rows is not None:
        shown = Options(latents=latents, examples=examples, rows=rows)
    page = write_report(
        read_results(results),
        out,
        by=names(by),
        runs=runs or [],
        store=None if store is None else place(store),
        options=shown,
        say=say,
    )
    say(f"Open {page}.")
