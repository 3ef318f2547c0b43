"""sae-pipe sae: fitted SAEs to the Hub and back."""

from pathlib import Path
from typing import Annotated

import typer

from ..stages.sae_formats import FORMATS
from .errors import told_to_the_user
from .say import say

app = typer.Typer(
    help="Publish a fitted SAE on the Hugging Face Hub, fetch one.", no_args_is_help=True
)


@app.command()
@told_to_the_user
def push(
    run: Annotated[Path, typer.Argument(help="The run folder of a fit.")],
    to: Annotated[
        str, typer.Argument(metavar="HF", help="hf://USER/REPO, which is made if it is not there.")
    ],
    formats: Annotated[
        str | None,
        typer.Option(
            help=f"Folders for other tools beside it, from {', '.join(FORMATS)}, by comma; or none. "
            "Default: saelens,dictionary_learning, those of them that hold it."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is made now: for you alone.")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="Of the weights, for the card: apache-2.0, cc-by-4.0, ... Default: open."
        ),
    ] = None,
) -> None:
    """Publish a fitted SAE with a card: what it is, its recipe, its metrics, how to load it.

    All in one commit. Paths of this machine and the command line stay here. The token is the one of
    `hf auth login` or HF_TOKEN. A README.md of your own in the repository is left alone.
    """
    from ..stages.sae_push import PushConfig, parse_formats, push_sae

    names = parse_formats(formats)
    config = PushConfig(
        run=run,
        address=to,
        formats=None if names is None else tuple(names),
        private=private,
        licence=license,
    )
    push_sae(config, say=say)


@app.command()
@told_to_the_user
def pull(
    source: Annotated[
        str, typer.Argument(metavar="HF", help="hf://USER/REPO[@REVISION][/FOLDER].")
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The run folder to write, which must not be there."),
    ],
) -> None:
    """Fetch a published SAE as a run folder.

    Only JSON, safetensors and the card are fetched, sizes first. (For SAEs of other tools: `sae-pipe
    import`.)
    """
    from ..stages.sae_push import pull_sae

    pull_sae(source, out, say=say)
