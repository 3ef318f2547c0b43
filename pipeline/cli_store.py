"""sae-pipe store: look at a store, check it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import told_to_the_user

app = typer.Typer(help="Look at an activation store, check it.", no_args_is_help=True)

_PATH = Annotated[Path, typer.Argument(help="The store, such as acts.zarr.")]


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

    manifest = read_manifest(path)
    if as_json:
        typer.echo(json.dumps(manifest, indent=1))
    else:
        typer.echo(show_pairs(describe(path, manifest)))


@app.command()
@told_to_the_user
def verify(path: _PATH) -> None:
    """Read every file of a store and compare it with its recorded digest."""
    from ..stages.progress import progress
    from ..storage import open_store
    from ..storage.info import verify_files

    store = open_store(path)
    total = sum(file.stat().st_size for file, _ in store.files() if file.is_file())
    with progress(total, "verify", "B") as bar:
        verify_files(store, bar.update)
    typer.echo(f"{path} is whole: {len(store.files())} files and the tokens match their digests.")
