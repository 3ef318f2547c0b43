"""sae-pipe store ls: the stores of a catalogue, and those that are asked for."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..storage.address import expanded
from ..storage.catalogue import CATALOG
from ..storage.listing import STATES, StoreFilter
from ..storage.shown import shown
from .errors import told_to_the_user
from .say import say
from .store_table import store_table

_SHOWN_WARNINGS = 20


def register(app: typer.Typer) -> None:
    """Add the command of this file to `sae-pipe store`."""
    app.command("ls")(list_stores)


@told_to_the_user
def list_stores(
    place: Annotated[
        str | None,
        typer.Argument(
            help=f"A folder, or a prefix such as s3://bucket/stores. Default: {CATALOG}, or else "
            "the current folder.",
        ),
    ] = None,
    catalog: Annotated[str | None, typer.Option(help="The same, as `harvest` takes it.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Only those of a model, named as for `harvest`."),
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only those of a block.")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="Only those of a hook point.")] = None,
    mask_p: Annotated[list[float] | None, typer.Option(help="Only those of a mask ratio.")] = None,
    state: Annotated[
        list[str] | None, typer.Option(help=f"Only those that are {', '.join(STATES)}.")
    ] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Only those of a codec.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all that is known as one JSON array.")
    ] = False,
) -> None:
    """List the stores of a catalogue, the newest first, from their manifests alone.

    Looks six folders deep. Each filter may be given several times, for one value or another.
    """
    from ..storage import InputError
    from ..storage.catalogue import catalogue_place
    from ..storage.catalogue import list_stores as found_in

    if place is not None and catalog is not None:
        raise InputError("--catalog and PLACE both say where to look. Pass one of them.")
    where = catalogue_place(catalog if place is None else place)
    wanted = StoreFilter(
        models=[name for asked in model or () for name in _names(asked)],
        layers=layer or (),
        hooks=hook or (),
        mask_p=mask_p or (),
        states=state or (),
        codecs=codec or (),
    )
    warnings: list[str] = []
    found = found_in(where or Path(), wanted, warn=warnings.append)
    such = "such stores" if any(vars(wanted).values()) else "stores"
    if as_json:
        typer.echo(json.dumps([entry.as_json() for entry in found], indent=1))
    elif not found:
        say(f"There are no {such} in {shown(str(where or 'this folder'))}.")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        say(store_table(found, width))
    for line in warnings[:_SHOWN_WARNINGS]:
        say(f"Warning: {shown(line)}", err=True)
    if len(warnings) > _SHOWN_WARNINGS:
        say(f"and {len(warnings) - _SHOWN_WARNINGS:,} more warnings.", err=True)


def _names(asked: str) -> list[str]:
    """What a manifest may call the model that somebody names: as it is named, or its Hub id."""
    from ..stages.model_names import resolve_model
    from ..storage import InputError

    folder = expanded(asked)
    if os.path.isdir(folder):  # unlike Path's, of any text
        return [folder.resolve().name]
    try:
        return [asked, resolve_model(asked)]
    except InputError:  # of a folder that is elsewhere, or as an importer has called it
        return [asked]
