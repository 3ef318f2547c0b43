"""The stores of a folder, from their manifests alone: what each is and how far it is."""

from pathlib import Path
from typing import Any

from .corpus import Corpus
from .disk import human_bytes
from .errors import InputError, StoreError
from .info import progress_of
from .layout import VALUE_BYTES
from .manifest import COMPLETE, MANIFEST, Manifest, layout_of, read_manifest

HEADER = ("store", "state", "model", "layer", "p", "rows", "on disk", "codec", "ratio")

Entry = dict[str, Any]


def stores_in(folder: Path) -> list[Entry]:
    """What `store ls --json` prints: one entry a store, by name, damaged ones among them.

    Raises InputError when there is no such folder. `folder` may be a store itself.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Pass one that holds stores.")
    if (folder / MANIFEST).is_file():
        return [_entry(folder)]
    return [_entry(file.parent) for file in sorted(folder.glob(f"*/{MANIFEST}"))]


def _entry(path: Path) -> Entry:
    try:
        manifest = read_manifest(path)
        return {"store": path.name, **_of_manifest(path, manifest)}
    except (StoreError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return {"store": path.name, "state": "damaged", "error": str(error)}


def _of_manifest(path: Path, manifest: Manifest) -> Entry:
    recipe = manifest["recipe"]
    model, mask = recipe.get("model"), recipe.get("mask")
    entry: Entry = {
        "state": manifest["state"],
        "progress": None if manifest["state"] == COMPLETE else progress_of(path, manifest),
        "model": model["name"] if isinstance(model, dict) else None,
        "layer": recipe.get("layer"),
        "p": mask["p"] if isinstance(mask, dict) else None,
        "rows": None,
        "heldout_rows": None,
        "bytes": None,
        "codec": manifest["codec"],
        "ratio": None,
    }
    if "train" not in manifest:
        return entry
    train, heldout = layout_of(manifest["train"], path), layout_of(manifest["heldout"], path)
    entry |= {"rows": train.n_rows, "heldout_rows": heldout.n_rows}
    if manifest["state"] == COMPLETE:
        shards = [s for split in ("train", "heldout") for s in manifest[split]["shards"]]
        activations = sum(shard["files"]["activations"]["bytes"] for shard in shards)
        positions = sum(
            file["bytes"]
            for shard in shards
            for array, file in shard["files"].items()
            if array != "activations"
        )
        others = sum(file["bytes"] for file in manifest.get("files", {}).values())
        raw = (train.n_rows + heldout.n_rows) * train.d_in * VALUE_BYTES
        entry |= {
            "bytes": activations + positions + others + _token_bytes(path),
            "ratio": round(raw / activations, 3) if activations else None,
        }
    return entry


def _token_bytes(path: Path) -> int:
    """Bytes of the tokens; stores beside one another may share them on the disk."""
    try:
        files = Corpus(path / "corpus", check_files=False).info["files"]
    except StoreError:
        return 0
    return sum(int(file["bytes"]) for file in files.values())


def as_cells(entry: Entry) -> list[str]:
    """One line of the table."""
    if entry["state"] == "damaged":
        return [entry["store"], "damaged", *["-"] * (len(HEADER) - 2)]
    size = entry["bytes"]
    return [
        entry["store"],
        entry["progress"] or entry["state"],
        _or_dash(entry["model"]),
        _or_dash(entry["layer"]),
        _or_dash(entry["p"]),
        "-" if entry["rows"] is None else f"{entry['rows']:,}",
        "-" if size is None else human_bytes(size),
        entry["codec"],
        "-" if entry["ratio"] is None else f"{entry['ratio']:.2f}",
    ]


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)
