"""sae-pipe store card: the README.md of a store."""

from pathlib import Path
from typing import Annotated

import typer

from ..storage.address import STORE_HELP, only_local, place
from .errors import told_to_the_user
from .say import say


def register(app: typer.Typer) -> None:
    """Add the command of this file to `sae-pipe store`."""
    app.command()(card)


@told_to_the_user
def card(
    path: Annotated[str, typer.Argument(help=STORE_HELP)],
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Write it into the store, unless a README.md of your own is there."
        ),
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="Of the rows: apache-2.0, cc-by-4.0, ... Noted in the manifest; implies --write."
        ),
    ] = None,
) -> None:
    """Show the card of a store: what it is, how it was made, licences, how to cite and read it.

    Complete stores have it as README.md; it is made from the manifest alone.
    """
    from ..storage.card import card as card_of
    from ..storage.store_source import complete_manifest

    where = place(path)
    if write or license is not None:
        say(_write(only_local(where, "A card is written into a folder"), license))
    else:
        say(card_of(complete_manifest(where)), nl=False)


def _write(folder: Path, licence: str | None) -> str:
    from ..storage import InputError
    from ..storage.card import README, write_card
    from ..storage.licences import is_identifier
    from ..storage.lock import sole_writer
    from ..storage.manifest import write_manifest
    from ..storage.signed import SIGNATURE_IS_GONE, remove_signature
    from ..storage.store_source import complete_manifest

    if licence is not None and not is_identifier(licence):
        raise InputError(
            f"--license is {licence!r}, which is no identifier of a licence on the Hub. Pass one "
            "such as apache-2.0 or cc-by-4.0."
        )
    complete_manifest(folder)  # before a lock is put where no store is
    with sole_writer(folder, "Store"):
        manifest = complete_manifest(folder)
        lost = ""
        if licence is not None and manifest.get("licence") != licence:
            if remove_signature(folder):  # before what it is no longer of
                lost = f"\n{SIGNATURE_IS_GONE}"
            manifest["licence"] = licence
            write_manifest(folder, manifest)
        if not write_card(folder, manifest):
            return f"{folder / README} is your own, and stays as it is.{lost}"
    return f"{folder / README} is written.{lost}"
