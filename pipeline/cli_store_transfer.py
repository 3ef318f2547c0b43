"""sae-pipe store push and pull: stores sent to an address and fetched from one."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ..storage.address import STORE_HELP, Address, only_local, place
from ..storage.errors import InputError
from .bars import open_bar_of
from .cli_store_sign import KEY_HELP, SIGN_HELP, secret_key
from .errors import told_to_the_user
from .say import say

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `sae-pipe store`."""
    app.command()(push)
    app.command()(pull)


@told_to_the_user
def push(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="The store here, such as acts.zarr.")
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="Where to, such as s3://bucket/acts.zarr or hf://datasets/USER/REPO/acts.zarr.",
        ),
    ],
    private: Annotated[
        bool,
        typer.Option("--private", help="If a repository of the Hub is made now: for you alone."),
    ] = False,
    sign: Annotated[Path | None, typer.Option(metavar="KEYFILE", help=SIGN_HELP)] = None,
) -> None:
    """Send a store to an address, several files at once, its manifest last.

    Every file is compared with its digest before it is sent. The same command goes on with what was
    interrupted, and sends only what is missing. A repository of the Hub that is not there is made.
    Credentials are taken from the environment or the profile files of the service.
    """
    path, where = only_local(place(source), "A store is pushed from this machine"), place(target)
    if private and not (isinstance(where, Address) and where.repository is not None):
        raise InputError(
            f"--private is for a repository of the Hub, and DST is {where}. Leave it out: who may "
            "read there is set at the service itself."
        )
    if sign is not None:
        from ..storage.signed import sign_store

        sign_store(path, secret_key(sign))
    if isinstance(where, Address):
        from ..storage.push import push as send

        send(path, where, private=private, say=say, open_bar=open_bar_of("push", "B"))
        return
    from ..storage.pull import pull as fetch

    fetch(path, where, may_renew=True, say=say, open_bar=open_bar_of("push", "B"))


@told_to_the_user
def pull(
    source: Annotated[str, typer.Argument(metavar="SRC", help=STORE_HELP)],
    target: Annotated[str, typer.Argument(metavar="DST", help="The folder to fetch it to.")],
    rows: Annotated[
        str | None,
        typer.Option(
            help="Fetch only so many training rows, such as 50M, in whole shards: a fair sample, "
            "which is a store of its own."
        ),
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Or such a fraction of them, such as 0.1.")
    ] = None,
    key: Annotated[str | None, typer.Option(help=KEY_HELP)] = None,
) -> None:
    """Fetch a store, or a fair part of it, into a folder.

    Every file is compared with its digest; the manifest is written last. The same command goes on
    with what was interrupted.
    """
    from ..storage.pull import Part
    from ..storage.pull import pull as fetch

    part = Part(rows=None if rows is None else whole_rows(rows), fraction=fraction)
    into = place(target)
    if isinstance(into, Address):
        raise InputError(
            f"A store is pulled into a folder, and {into} is an address. Pass a folder, or use "
            "`sae-pipe store push` to send a store there."
        )
    public = None
    if key is not None:
        from ..storage.minisign import read_public

        public = read_public(key)
    fetch(place(source), Path(into), part, key=public, say=say, open_bar=open_bar_of("pull", "B"))


def whole_rows(text: str) -> int:
    """50000000 of 50M, 50000k or 50_000_000; InputError for anything else."""
    found = re.fullmatch(r"(\d[\d_]{0,20}(?:\.\d{1,9})?)([kKmMbBgG]?)", text.strip(), re.ASCII)
    if found is None:
        raise InputError(f"--rows is {text!r}, and has to be a number such as 50M or 50000000.")
    return int(float(found[1].replace("_", "")) * _POWERS[found[2].lower()])
