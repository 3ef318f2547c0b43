"""sae-pipe inspect"""

from typing import Annotated

import typer

from ..storage.address import STORE_HELP, place
from .errors import told_to_the_user
from .say import say


@told_to_the_user
def inspect(
    run: Annotated[str, typer.Argument(help="The run folder of a fit, or hf://USER/REPO.")],
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
    from ..stages.hub_address import is_hub
    from ..stages.latents import top_activations
    from ..stages.sae import load_sae
    from ..stages.sae.hub import run_folder
    from ..stages.sae.weights import read_config
    from ..storage import InputError, open_store
    from .show import show_latents

    folder = run_folder(run)
    sae = load_sae(folder)
    if store is None:
        entry = read_config(folder).get("store")
        recorded = entry.get("path") if isinstance(entry, dict) else None
        # What a stranger's SAE names is no path of this machine.
        is_taken = isinstance(recorded, str) and (is_hub(recorded) or not is_hub(run))
        if not recorded or not is_taken:
            raise InputError(f"{run} does not say which store it was fitted from. Pass --store.")
        store = str(recorded)
    opened = open_store(place(store), unfinished=True)
    found = top_activations(sae, opened, latent, count=count, examples=examples, max_rows=rows)
    say(show_latents(found))
