"""manifest.json: what a store holds, how it was made, and what is committed.

Format: docs/store-format.md. The manifest is written before the first shard and rewritten whole
when something larger than a shard changes; each sealed shard has a record of its own in
`.commits/` until the store is complete, so that workers never write one file together.
"""

from pathlib import Path
from typing import Any

from .address import Address, Place
from .errors import StoreError
from .files import json_digest, plain_size, write_json
from .layout import Layout
from .plain_json import parse_plain_json

FORMAT = "sae-pipe activation store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMMITS = ".commits"
MANIFEST_LIMIT_BYTES = 1 << 27  # a store of 10 billion rows needs about 40 MB

TOKENISING, HARVESTING, COMPLETE = "tokenising", "harvesting", "complete"
# Complete but for the instant in which an extension puts its files to their places.
EXTENDING = "extending"

Manifest = dict[str, Any]


def read_manifest(path: Place) -> Manifest:
    """Parse and check the manifest of a store folder, or of a store at an address.

    Raises StoreError: no such folder, not a store, damaged, of a newer format, or its files are
    being exchanged for those of a larger store.
    """
    if isinstance(path, Address):
        from .store_source import fetch_manifest

        return fetch_manifest(path)
    manifest = read_manifest_of_any_state(path)
    if manifest.get("state") == EXTENDING:
        raise StoreError(
            f"Store {path} is being extended: its new files are being put to their places. Try "
            "again in a moment; if that was interrupted, run the `sae-pipe harvest --extend` "
            "command once more."
        )
    return manifest


def read_manifest_of_any_state(path: Path) -> Manifest:
    """`read_manifest` for who extends a store, and finishes what a kill has interrupted."""
    if not path.is_dir():
        raise StoreError(
            f"There is no store at {path}. "
            "Pass the folder that `sae-pipe harvest --out` wrote, such as acts.zarr."
        )
    file = path / MANIFEST
    if not file.is_file():
        raise StoreError(
            f"{path} is not an activation store: it has no {MANIFEST}. "
            "Pass the folder that `sae-pipe harvest --out` wrote."
        )
    return checked_manifest(load_bounded_json(file), path)


def checked_manifest(manifest: Any, path: Place) -> Manifest:
    """The JSON of a manifest, if it is one that can be read; StoreError otherwise."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(
            f"{path} is not an activation store: {MANIFEST} does not name the format {FORMAT!r}. "
            "Pass the folder that `sae-pipe harvest --out` wrote."
        )
    version = manifest.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise StoreError(
            f"Store {path} has format version {version}, and this sae-pipe reads up to "
            f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade sae-pipe."
        )
    return dict(manifest)


def load_bounded_json(file: Path) -> Any:
    """JSON of a file of bounded size; StoreError when it is damaged."""
    size = plain_size(file.parent, file.name)
    if size > MANIFEST_LIMIT_BYTES:
        raise StoreError(
            f"{file} has {size:,} bytes, more than any manifest needs "
            f"({MANIFEST_LIMIT_BYTES:,}). The store is damaged: fetch or harvest it again."
        )
    return parse_json(file.read_bytes(), str(file))


def parse_json(data: bytes, file: str) -> Any:
    """JSON of a file's content; StoreError, naming the file, when it is damaged."""
    try:
        return parse_plain_json(data)
    except ValueError as error:
        raise StoreError(
            f"{file} is damaged: it is not JSON ({error}). Fetch or harvest the store again."
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest, whole or not at all."""
    write_json(path / MANIFEST, manifest)


def layout_of(split: dict[str, Any], path: Place) -> Layout:
    """The layout of one split of a manifest; StoreError when the sizes make no sense."""
    try:
        return Layout(**split["layout"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"The manifest of {path} is damaged: its layout cannot be ({error}). "
            "Fetch or harvest the store again."
        ) from error


def sealed_records(path: Path, split: str) -> dict[int, dict[str, Any]]:
    """The commit records of an unfinished store by shard number, ascending, as the manifest will
    have them. split: "train" or "heldout". StoreError when one is damaged.
    """
    files = sorted((path / COMMITS / split).glob("[0-9]*.json"))
    found = ((int(file.stem), read_commit(file)) for file in files)
    return {shard: record for shard, record in found if record is not None}


def read_commit(file: Path) -> dict[str, Any] | None:
    """One commit record as the manifest will have it; None when there is none (any more)."""
    try:
        record = load_bounded_json(file)
    except FileNotFoundError:
        return None
    try:
        return {"rows": record["rows"], "files": record["files"]}
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{file} is damaged: it is not the record of a shard ({error}). Remove it and run the "
            "`sae-pipe harvest` command that began the store once more."
        ) from error


def began_by(manifest: Manifest) -> str:
    """The command that makes a store of this kind."""
    origin = manifest.get("provenance")
    if not isinstance(origin, dict):
        return "harvest"
    commands = {"imported": "store import", "recoded": "store recode", "sampled": "store pull"}
    return next((command for name, command in commands.items() if name in origin), "harvest")


def rows_digest(manifest: Manifest) -> str:
    """What decides about the bytes of every shard of a store that is laid out.

    A worker of another process writes into a store only while this is what it was told.
    """
    names = ("recipe", "codec", "encoding", "corpus", "train", "heldout")
    parts = {name: manifest.get(name) for name in names}
    for name in ("train", "heldout"):
        parts[name] = (parts[name] or {}).get("layout")
    parts["batch_contexts"] = manifest.get("execution", {}).get("batch_contexts")
    return json_digest(parts)


def content_digest(manifest: Manifest) -> str:
    """The identity of a store's content: recipe, layouts and the digests of every shard.

    Times, hosts and versions are not part of it, so that two harvests of one recipe that gave the
    same bytes have the same digest.
    """
    parts = {"recipe": manifest["recipe"], "corpus": manifest.get("corpus", {}).get("digest")}
    if "encoding" in manifest:  # the first stores had none
        parts["encoding"] = {
            name: manifest["encoding"].get(name) for name in ("dtype", "container", "parameters")
        }
    for name in ("train", "heldout"):
        split = manifest[name]
        parts[name] = {"layout": split["layout"], "shards": split["shards"]}
    return json_digest(parts)
