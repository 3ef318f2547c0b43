"""sae-pipe inspect"""

from pathlib import Path
from typing import Annotated

import typer

from ..storage.address import STORE_HELP, place
from .errors import told_to_the_user
from .say import say


@told_to_the_user
def inspect(
    run: Annotated[Path, typer.Argument(help="The run folder of a fit.")],
    store: Annotated[
        str | None,
        typer.Option(
            help="The store to look rows up in. Default: the one it was fitted from. " + STORE_HELP
        ),
    ] = None,
    latent: Annotated[
        list[int] | None,
        typer.Option(help="A latent to show; several times for several. Default: a spread."),
    ] = None,
    count: Annotated[int, typer.Option(help="Latents to show when none is named.")] = 8,
    examples: Annotated[int, typer.Option(help="Top rows of each.")] = 5,
    rows: Annotated[
        int | None, typer.Option(help="Held-out rows to look at. Default: all.")
    ] = None,
) -> None:
    """Show the tokens in context on which latents of a fitted SAE fire most."""
    from ..stages.latents import top_activations
    from ..stages.sae import load_sae
    from ..stages.sae.weights import read_config
    from ..storage import InputError, open_store
    from .show import show_latents

    sae = load_sae(run)
    if store is None:
        recorded = read_config(run).get("store", {}).get("path")
        if recorded is None:
            raise InputError(f"{run} does not say which store it was fitted from. Pass --store.")
        store = str(recorded)
    opened = open_store(place(store), unfinished=True)
    found = top_activations(sae, opened, latent, count=count, examples=examples, max_rows=rows)
    say(show_latents(found))
