"""sae-pipe eval"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..storage.address import place
from .errors import told_to_the_user
from .say import say

if TYPE_CHECKING:
    from ..stages.evaluation.engine import Outcome

_ON, _BY, _RUN = "Judged on", "Judged by", "How it runs"


@told_to_the_user
def evaluate(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run folders of fits, folders of run folders, or hf://USER/REPO.",
            metavar="RUN...",
            show_default=False,
        ),
    ],
    store: Annotated[
        str | None,
        typer.Option(
            help="The store whose held-out rows to judge on. Default: the one that the first run "
            "was fitted from, for all runs of the same text, model and layer.",
            rich_help_panel=_ON,
        ),
    ] = None,
    eval_set: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval-set",
            help="An evaluation set to judge on; several times for several.",
            rich_help_panel=_ON,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Metrics, or kinds of them (rows, items, text, all), with commas. Default: "
            "rows,items, all that need no language model.",
            rich_help_panel=_BY,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of a source to judge on. Default: all.", rich_help_panel=_ON),
    ] = None,
    contexts: Annotated[
        int | None,
        typer.Option(
            help="Contexts of text for metrics that need the language model. Default: about 32,768 "
            "tokens of them.",
            rich_help_panel=_ON,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Where the language model lies. Default: as the store names it.",
            rich_help_panel=_ON,
        ),
    ] = None,
    no_baselines: Annotated[
        bool,
        typer.Option(
            "--no-baselines",
            help="Leave out the untrained SAE, random latents and the mean predictor.",
            rich_help_panel=_BY,
        ),
    ] = False,
    ito_k: Annotated[
        str | None,
        typer.Option(
            "--ito-k",
            help="Numbers of latents of inference-time optimisation, with commas. Default: each "
            "SAE's own L0.",
            rich_help_panel=_BY,
        ),
    ] = None,
    compat: Annotated[
        list[str] | None,
        typer.Option(
            help="Add another suite's own variants under names of their own: saebench.",
            rich_help_panel=_BY,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder of result files.", rich_help_panel=_RUN)
    ] = Path("results"),
    seed: Annotated[
        int, typer.Option(help="Of the bootstrap and of whatever is drawn.", rich_help_panel=_RUN)
    ] = 0,
    device: Annotated[
        str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.", rich_help_panel=_RUN)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the language model: auto, float32, bfloat16 or float16.", rich_help_panel=_RUN
        ),
    ] = "float32",
) -> None:
    """Judge fitted SAEs, all on one reading of the data, and write a result file for each.

    Metrics that a result file has already are not computed again.
    """
    from ..stages.evaluation.engine import EvalConfig, evaluate_runs
    from .fit_flags import listed
    from .fitting import say

    config = EvalConfig(
        out=out,
        store=None if store is None else place(store),
        evalsets=tuple(eval_set or ()),
        metrics=None if metrics is None else tuple(listed("metrics", metrics, str)),
        compat=tuple(compat or ()),
        baselines=not no_baselines,
        rows=rows,
        contexts=contexts,
        ito_k=() if ito_k is None else tuple(listed("ito_k", ito_k, int)),
        model=model,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    outcomes = evaluate_runs(runs, config, say=say)
    show(outcomes, out)


def show(outcomes: "list[Outcome]", out: Path) -> None:
    """Tables of what was found; InputError that names what failed, or the error that is ours."""
    from ..storage.errors import InputError, SaePipeError
    from .eval_tables import eval_tables

    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    for line in eval_tables(results):
        say(line)
    computed, kept = sum(o.computed for o in outcomes), sum(o.kept for o in outcomes)
    say(f"\n{computed} results written to {out}; {kept} were there already.")
    errors = {outcome.name: outcome.error for outcome in outcomes if outcome.error is not None}
    for error in errors.values():
        if not isinstance(error, SaePipeError) or len(outcomes) == 1:
            raise error
    if errors:
        what = "; ".join(f"{name}: {error}" for name, error in errors.items())
        raise InputError(f"{len(errors)} of {len(outcomes)} SAEs failed. {what}")
