"""sae-pipe compare"""

from pathlib import Path
from typing import Annotated

import typer

from ..stages.compare.formats import FORMATS
from .errors import told_to_the_user
from .say import say

BY = "mask_p,arch,l0"


@told_to_the_user
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(help="Folders or files that `sae-pipe eval --out` wrote."),
    ],
    by: Annotated[
        str,
        typer.Option(
            help="Keys of runs: the first is compared side by side, the last makes the lines of a "
            "metric, those between make tables of their own. mask_p, arch, l0, seed, model, layer, "
            "hook, d_sae, store, recipe.NAME, ..."
        ),
    ] = BY,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Metrics to show, separated by commas: a name, NAME.VALUE, NAME.* for all values "
            "of one, or all. Default: the first value of each."
        ),
    ] = None,
    form: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = next(
        iter(FORMATS)
    ),
    out: Annotated[
        Path | None, typer.Option(help="File to write the table to. Default: standard output.")
    ] = None,
) -> None:
    """Show results side by side: means over seeds, paired differences with 95 % intervals, baselines.

    A difference is bold (starred on the terminal) only where its interval excludes 0. Numbers that
    were judged on different data are listed apart.
    """
    from ..stages.compare import compare as compare_results
    from ..stages.compare import render
    from ..stages.evaluation.results import read_results
    from ..storage.files import write_whole

    comparison = compare_results(
        read_results(results), names(by), metrics=None if metrics is None else names(metrics)
    )
    text = render(comparison, form)
    if out is None:
        say(text, nl=False)
        return
    write_whole(out, text.encode())
    say(f"Wrote {out}.")


def names(text: str) -> list[str]:
    """A list given with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
