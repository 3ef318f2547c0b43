"""sae-pipe store sign and keygen: signatures in the format of minisign."""

import getpass
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import told_to_the_user

if TYPE_CHECKING:
    from ..storage.minisign import SecretKey

SIGN_HELP = (
    "Sign the manifest with the secret key in this file (`store keygen`, `minisign -G`); needs "
    "sae-pipe[sign]. A password comes from SAE_PIPE_SIGN_PASSWORD or the terminal."
)
KEY_HELP = (
    "Refuse the store unless it was signed with this key: a .pub file, or its base64 line. Needs "
    "sae-pipe[sign]."
)


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `sae-pipe store`."""
    app.command()(sign)
    app.command()(keygen)


@told_to_the_user
def sign(
    path: Annotated[str, typer.Argument(help="The store, such as acts.zarr.")],
    key: Annotated[Path, typer.Option(help="File of the secret key; needs sae-pipe[sign].")],
) -> None:
    """Sign the manifest of a store, which records the digest of every file.

    Writes manifest.json.minisig beside it, which minisign checks too.
    """
    from ..storage.address import only_local, place
    from ..storage.signed import sign_store
    from .say import say

    folder = only_local(place(path), "A store is signed where it stands")
    file = sign_store(folder, secret_key(key))
    say(f"{file} is written: store {folder} is signed.")


@told_to_the_user
def keygen(
    path: Annotated[
        Path, typer.Argument(help="File of the secret key; the public one is PATH.pub.")
    ],
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Leave the secret key without a password.")
    ] = False,
) -> None:
    """Make a key pair to sign stores with, as minisign makes them."""
    from ..storage import minisign
    from .say import say

    word = None if no_password else _password(f"Password of {path}: ", twice=True)
    public = minisign.generate(path, word)
    say(f"{path} is the secret key: keep it to yourself. {path}.pub is key {public.name}.")


def secret_key(path: Path) -> "SecretKey":
    """The key in a file, its password asked for where it has one."""
    from ..storage import minisign

    locked = minisign.is_locked(path)
    return minisign.read_secret(path, _password(f"Password of {path}: ") if locked else None)


def _password(question: str, *, twice: bool = False) -> str:
    """From the environment, or the terminal; never a flag, which others can see."""
    from ..storage import InputError
    from ..storage.minisign import PASSWORD

    given = os.environ.get(PASSWORD)
    if given is not None:
        return _not_empty(given) if twice else given
    if not sys.stdin.isatty():
        raise InputError(
            f"The key needs a password, and there is no terminal to ask in. Set {PASSWORD}."
        )
    word = getpass.getpass(question)
    if twice and getpass.getpass("Once more: ") != word:
        raise InputError("The two passwords differ. Nothing was written.")
    return _not_empty(word) if twice else word


def _not_empty(word: str) -> str:
    """The password of a new key; an old one may have been made with none."""
    from ..storage import InputError

    if not word:
        raise InputError(
            "An empty password locks nothing. Give one, or pass --no-password. Nothing was written."
        )
    return word
