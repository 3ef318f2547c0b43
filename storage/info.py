"""A store described for people, and checked against its digests."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import StoreError
from .files import file_digest
from .layout import VALUE_BYTES
from .manifest import COMMITS, COMPLETE, TOKENISING, Manifest, layout_of
from .store import ActivationStore


def describe(path: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Names and values, the most asked-for first. Works for unfinished stores too.

    Raises StoreError when the manifest lacks what every store's has.
    """
    try:
        return [
            ("store", str(path)),
            ("state", _state(path, manifest)),
            *_recipe(manifest["recipe"]),
            *_sizes(path, manifest),
            *_statistics(manifest),
            ("made", _made(manifest)),
            ("digest", str(manifest.get("digest", "-"))),
        ]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise StoreError(
            f"The manifest of {path} is damaged: it lacks what every store has, or has it in another "
            f"form ({error}). "
            "Fetch or harvest the store again."
        ) from error


def _state(path: Path, manifest: Manifest) -> str:
    state = str(manifest["state"])
    return state if state == COMPLETE else f"{state}: {sealed_shards(path, manifest)}"


def sealed_shards(path: Path, manifest: Manifest) -> str:
    """How far an unfinished store is."""
    if manifest["state"] == TOKENISING:
        return "its tokens are being made"
    layout = layout_of(manifest["train"], path)
    sealed = len(list((path / COMMITS / "train").glob("[0-9]*.json")))
    return f"{sealed:,} of {layout.n_shards:,} shards are sealed"


def _recipe(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    model, mask, corpus = recipe["model"], recipe["mask"], recipe["corpus"]["config"]
    return [
        ("model", f"{model['name']} ({model['architecture']}), {model['revision'][:19]}"),
        ("hook", f"{recipe['hook']} of layer {recipe['layer']}, computed in {recipe['dtype']}"),
        (
            "mask",
            f"p = {mask['p']} with {mask['string']!r} (id {mask['id']}), seed {recipe['seed']}",
        ),
        ("text", ", ".join(_part(part) for part in recipe["corpus"]["source"]["parts"][:3])),
        (
            "contexts",
            f"{corpus['context_size']} tokens, {'packed' if corpus['pack'] else 'one document each'}",
        ),
    ]


def _part(part: dict[str, Any]) -> str:
    if "dataset" in part:
        return f"{part['dataset']} at {str(part['revision'])[:12]}"
    return str(part.get("name"))


def _sizes(path: Path, manifest: Manifest) -> list[tuple[str, str]]:
    if "train" not in manifest:
        return []
    train, heldout = layout_of(manifest["train"], path), layout_of(manifest["heldout"], path)
    pairs = [
        ("rows", f"{train.n_rows:,} training, {heldout.n_rows:,} held out, of {train.d_in} values"),
        (
            "shards",
            f"{train.n_shards} of {train.shard_rows:,} rows, chunks of {train.chunk_rows:,}",
        ),
    ]
    if manifest["state"] == COMPLETE:
        stored = sum(
            shard["files"]["activations"]["bytes"]
            for split in ("train", "heldout")
            for shard in manifest[split]["shards"]
        )
        raw = (train.n_rows + heldout.n_rows) * train.d_in * VALUE_BYTES
        ratio = raw / stored if stored else 0.0
        pairs.append(
            (
                "size",
                (
                    f"{stored / 1e9:.3f} GB of activations ({manifest['codec']}), {ratio:.2f} times "
                    "smaller than raw bfloat16"
                ),
            )
        )
    return pairs


def _statistics(manifest: Manifest) -> list[tuple[str, str]]:
    found = manifest.get("statistics")
    if not found:
        return []
    return [
        (
            "norms",
            (
                f"root mean square {found['mean_squared_norm'] ** 0.5:.4g}, of the mean "
                f"{found['norm_of_mean']:.4g}"
            ),
        )
    ]


def _made(manifest: Manifest) -> str:
    made = manifest["provenance"]
    runs = made["runs"]
    where = f" on {runs[-1]['hardware']['processor']}, {runs[-1]['device']}" if runs else ""
    return f"{made.get('finished', 'not finished')}{where}, sae-pipe {made['versions']['sae-pipe']}"


def verify_files(store: ActivationStore, advance: Callable[[int], object]) -> None:
    """Compare every file with its digest, on all cores.

    advance: called with the bytes of each file that is right. Raises StoreError for the first that
    is not.
    """

    def check(entry: tuple[Path, str]) -> int:
        path, digest = entry
        try:
            found, size = file_digest(path), path.stat().st_size
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error.strerror}). "
                "Fetch that file again, or delete the store and harvest it again."
            ) from error
        if found != digest:
            raise StoreError(
                f"{path} does not have the digest that the manifest of {store.path} records. "
                "Fetch that file again, or delete the store and harvest it again."
            )
        return size

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for size in pool.map(check, store.files()):
            advance(size)
    store.corpus.verify()
