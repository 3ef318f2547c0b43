"""sae-pipe export and import: a fitted SAE for other tools, and one of theirs as a run."""

from pathlib import Path
from typing import Annotated

import typer

from ..stages.sae_formats import FORMATS
from ..stages.taps import HOOKS
from .errors import told_to_the_user
from .say import say

_FORMATS_HELP = "; ".join(f"{name}: {entry.about}" for name, entry in FORMATS.items()) + "."
_MODEL = Annotated[
    str | None, typer.Option(help="The model's name on the Hub, where it is not said.")
]
_LAYER = Annotated[int | None, typer.Option(help="The block, from 0, where it is not said.")]
_HOOK = Annotated[str | None, typer.Option(help=f"{', '.join(HOOKS)}; where it is not said.")]


@told_to_the_user
def export(
    run: Annotated[
        str,
        typer.Argument(
            help="The run folder of a fit, or hf://USER/REPO. (For the rows of a "
            "store: `sae-pipe store export`.)"
        ),
    ],
    format: Annotated[str, typer.Option(help=_FORMATS_HELP)],
    out: Annotated[Path, typer.Option(help="The folder to write, which must not be there.")],
    model: _MODEL = None,
    layer: _LAYER = None,
    hook: _HOOK = None,
) -> None:
    """Write a fitted SAE as a folder that another tool loads.

    Nothing is lost: what the tool has no place for is kept beside, so that `sae-pipe import` gives
    the same SAE back; an SAE that the tool would compute differently is refused.
    """
    from ..stages.sae_export import export_sae

    place = export_sae(run, format, out, model=model, layer=layer, hook=hook)
    say(f"{place} holds the SAE of {run} for {format}.")


@told_to_the_user
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SAE",
            help="A folder of one of the formats, or hf://USER/REPO[@REVISION][/FOLDER]. (For "
            "activations: `sae-pipe store import`.)",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write, which must not be there.")],
    format: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(FORMATS)}. Default: known by the files."),
    ] = None,
    model: _MODEL = None,
    layer: _LAYER = None,
    hook: _HOOK = None,
) -> None:
    """Make a run folder of an SAE that another tool has fitted or published.

    Of the Hub only the two files of the SAE are fetched. An SAE that would be computed differently
    here is refused. Nothing runs that the folder brings along.
    """
    from ..stages.sae_import import import_sae

    import_sae(source, out, format=format, model=model, layer=layer, hook=hook, say=say)
