"""sae-pipe store repair, and what store verify does with the files of a store."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ..storage.address import Address, Place, only_local, place
from .errors import told_to_the_user
from .say import say
from .tables import table


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `sae-pipe store`."""
    app.command()(repair)


@told_to_the_user
def repair(
    path: Annotated[str, typer.Argument(help="The store, such as acts.zarr.")],
    model: Annotated[
        str | None,
        typer.Option(help="The model that it was harvested from. Default: where that one was."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="auto, cuda, cuda:N, mps or cpu. Default: the kind that it was harvested on."
        ),
    ] = None,
) -> None:
    """Make damaged files of a store again, and touch nothing else.

    Needs no text: shards are harvested again from the tokens and the recipe in the store. Can be
    killed at any instant and run again.
    """
    from ..stages.repair import repair as run

    folder = only_local(place(path), "A store is repaired where it stands")
    run(folder, model=model, device=device, say=say)


def verify_files(path: Place, key: str | None = None) -> str:
    """Compare every file with its digest; returns a line that says that all is well.

    key: the store has to be signed with this public key. Prints a table of all that is not well, and
    raises StoreError with what to do.
    """
    from ..stages.progress import progress
    from ..storage import StoreError
    from ..storage.manifest import COMPLETE, read_manifest
    from ..storage.signed import check_unrecorded
    from ..storage.verify import advice, stored_files, verify_store

    folder, content = path, None
    if isinstance(path, Address):
        from ..storage.remote_files import open_to_verify

        folder, manifest, content = open_to_verify(path)
    else:
        manifest = read_manifest(path)
    assert isinstance(folder, Path)
    comment = None if key is None else _signed_as(path, folder, key)
    files = stored_files(folder, manifest)
    if key is not None and folder == path:
        check_unrecorded(folder, [file.name for file in files])
    total = sum(file.bytes for file in files)
    begun = time.perf_counter()
    with progress(total, "verify", "B") as bar:
        damages = verify_store(folder, manifest, files, bar.update, content)
    seconds = time.perf_counter() - begun
    if damages:
        header = ("file", "what is wrong")
        say(table(header, [(d.file.name, d.what) for d in damages], right=False))
        raise StoreError(
            f"Store {path} is damaged: {len(damages)} of {len(files)} files. "
            f"{advice(path, manifest, damages)}"
        )
    rate = f"{total / 1e9:.2f} GB at {total / 1e9 / max(seconds, 1e-9):.2f} GB/s"
    if manifest["state"] != COMPLETE:
        return f"{path} is unfinished, and what is there is whole: {len(files)} files, {rate}."
    signed = "" if comment is None else f"\nIt was signed with {key}: {comment}."
    return f"{path} is whole: {len(files)} files match their digests ({rate}).{signed}"


def _signed_as(path: Place, folder: Path, key: str) -> str:
    """The trusted comment of a store's signature. folder: with the manifest that is looked at."""
    from ..storage.files import read_plain
    from ..storage.manifest import MANIFEST, MANIFEST_LIMIT_BYTES
    from ..storage.minisign import read_public
    from ..storage.signed import check_signature, signature_of

    public = read_public(key)
    data = read_plain(folder, MANIFEST, MANIFEST_LIMIT_BYTES)
    return check_signature(path, data, signature_of(path), public)
