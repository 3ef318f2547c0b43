"""sae-pipe store: look at a store, check it."""

import json
from typing import Annotated

import typer

from ..storage.address import STORE_HELP, Place, place
from .cli_store_card import register as register_card
from .cli_store_copies import register as register_copies
from .cli_store_ls import register as register_ls
from .cli_store_repair import register as register_repair
from .cli_store_repair import verify_files
from .cli_store_sign import KEY_HELP
from .cli_store_sign import register as register_sign
from .cli_store_transfer import register as register_transfer
from .errors import told_to_the_user
from .say import say

app = typer.Typer(help="Look at an activation store, check it.", no_args_is_help=True)
register_ls(app)
register_copies(app)
register_repair(app)
register_transfer(app)
register_card(app)
register_sign(app)

_PATH = Annotated[str, typer.Argument(help=STORE_HELP)]


@app.command()
@told_to_the_user
def info(
    path: _PATH,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole manifest as JSON.")
    ] = False,
) -> None:
    """Show what a store holds, how it was made, and how far it is."""
    from ..storage.info import describe
    from ..storage.manifest import read_manifest
    from .show import show_pairs

    where = place(path)
    manifest = read_manifest(where)
    if as_json:
        typer.echo(json.dumps(manifest, indent=1))
    else:
        say(show_pairs(describe(where, manifest)))


@app.command()
@told_to_the_user
def verify(
    path: _PATH,
    shuffle: Annotated[
        bool,
        typer.Option("--shuffle", help="Measure how well the rows are shuffled instead."),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(help="With --shuffle: rows of a batch. Default: 4096, or less if few rows."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --shuffle: print the numbers as JSON.")
    ] = False,
    key: Annotated[str | None, typer.Option(help=KEY_HELP)] = None,
) -> None:
    """Read every file of a store and compare it with its recorded digest.

    With --shuffle: measure on the source of every row that each is there once and that the order is
    shuffled; docs/numbers.md says how.
    """
    from ..storage import InputError

    if shuffle and key is not None:
        raise InputError("--key is for the files of a store. Leave --shuffle out.")
    if shuffle:
        _verify_shuffle(place(path), batch_size, as_json)
        return
    if batch_size is not None or as_json:
        raise InputError("--batch-size and --json belong to --shuffle. Add it, or leave them out.")
    say(verify_files(place(path), key))


def _verify_shuffle(path: Place, batch_size: int | None, as_json: bool) -> None:
    from ..stages.progress import progress
    from ..storage import StoreError, open_store
    from ..storage.shuffle import measure_shuffle, positions_to_read
    from .show import show_pairs
    from .shuffle_report import report

    store = open_store(path)
    with progress(positions_to_read(store), "shuffle", "positions") as bar:
        measured = measure_shuffle(store, batch_size=batch_size, advance=bar.update)
    say(json.dumps(measured, indent=1) if as_json else show_pairs(report(path, measured)))
    if measured["failures"]:
        raise StoreError(
            f"Store {path} is not shuffled: {'; '.join(measured['failures'])}. "
            "Harvest it again; larger blocks (--block-gb) mix better."
        )
