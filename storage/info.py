"""A store described for people."""

from pathlib import Path
from typing import Any

from .address import Address, Place
from .disk import human_bytes
from .errors import StoreError
from .extension import extension_begun
from .layout import VALUE_BYTES, Layout
from .manifest import COMMITS, COMPLETE, TOKENISING, Manifest, layout_of
from .shuffle import verdict


def describe(path: Place, manifest: Manifest) -> list[tuple[str, str]]:
    """Names and values, the most asked-for first. Works for unfinished stores too.

    Raises StoreError when the manifest lacks what every store's has.
    """
    try:
        return [
            ("store", str(path)),
            ("state", _state(path, manifest)),
            *_recipe(manifest["recipe"]),
            *_sizes(path, manifest),
            *_encoding(manifest),
            *_statistics(manifest),
            *_shuffle(manifest),
            *_made(manifest),
            ("digest", str(manifest.get("digest", "-"))),
        ]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise StoreError(
            f"The manifest of {path} is damaged: it lacks what every store has, or has it in another "
            f"form ({error}). "
            "Fetch or harvest the store again."
        ) from error


def _state(path: Place, manifest: Manifest) -> str:
    state = str(manifest["state"])
    if isinstance(path, Address):
        return state
    if state == COMPLETE:
        begun = extension_begun(path)
        if begun is None or begun.state == COMPLETE:
            return state
        n_rows = begun.layouts()[0].n_rows
        return f"{state}; its extension to {n_rows:,} rows is not finished: {begun.progress()}"
    return f"{state}: {sealed_shards(path, manifest)}"


def progress_of(path: Path, manifest: Manifest) -> str:
    """The state of an unfinished store in a word or two: tokenising, or 12 of 40 shards."""
    if manifest["state"] == TOKENISING:
        return TOKENISING
    sealed, n_shards = _sealed(path, manifest)
    return f"{sealed:,} of {n_shards:,} shards"


def sealed_shards(path: Path, manifest: Manifest) -> str:
    """How far an unfinished store is."""
    if manifest["state"] == TOKENISING:
        return "its tokens are being made"
    sealed, n_shards = _sealed(path, manifest)
    return f"{sealed:,} of {n_shards:,} shards are sealed"


def _sealed(path: Path, manifest: Manifest) -> tuple[int, int]:
    layout = layout_of(manifest["train"], path)
    return len(list((path / COMMITS / "train").glob("[0-9]*.json"))), layout.n_shards


def _recipe(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    if "imported" in recipe:
        return _imported(recipe)
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


def _imported(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Of rows that were there already: the input, and what the user said of it."""
    given, model = recipe["imported"], recipe["model"]
    shape = " x ".join(f"{n:,}" for n in given["shape"])
    said = {
        "model": None if model is None else model["name"],
        "hook": recipe["hook"],
        "layer": recipe["layer"],
    }
    return [
        (
            "imported",
            (
                f"{given['name']} ({given['kind']}), {shape} values in {given['dtype']}, "
                f"{human_bytes(given['bytes'])}; seed {recipe['seed']}"
            ),
        ),
        *(
            (name, f"{value}, as the importer said")
            for name, value in said.items()
            if value is not None
        ),
        (
            "contexts",
            f"{recipe['corpus']['config']['context_size']} rows; their tokens are unknown",
        ),
    ]


def _part(part: dict[str, Any]) -> str:
    if "dataset" in part:
        return f"{part['dataset']} at {str(part['revision'])[:12]}"
    return str(part.get("name"))


def _sizes(path: Place, manifest: Manifest) -> list[tuple[str, str]]:
    if "train" not in manifest:
        return []
    train, heldout = layout_of(manifest["train"], path), layout_of(manifest["heldout"], path)
    pairs = [
        ("rows", f"{train.n_rows:,} training, {heldout.n_rows:,} held out, of {train.d_in} values"),
        (
            "sizes",
            (
                f"{train.n_shards:,} shards; raw, a {_size('chunk', train, train.chunk_rows)}, a "
                f"{_size('shard', train, train.shard_rows)}, a "
                f"{_size('block', train, train.block_rows)}"
            ),
        ),
    ]
    if manifest["state"] == COMPLETE:
        files = [
            file
            for split in ("train", "heldout")
            for shard in manifest[split]["shards"]
            for file in shard["files"].items()
        ]
        stored = sum(entry["bytes"] for array, entry in files if array == "activations")
        raw = (train.n_rows + heldout.n_rows) * train.d_in * VALUE_BYTES
        ratio = raw / stored if stored else 0.0
        n_files = len(files) + len(manifest.get("files", {}))
        of_tokens = " and those of the tokens" if manifest["corpus"]["digest"] else ""
        pairs += [
            (
                "size",
                (
                    f"{human_bytes(stored)} of activations ({manifest['codec']}), {ratio:.2f} "
                    "times smaller than raw bfloat16"
                ),
            ),
            ("files", f"{n_files:,}{of_tokens}"),
        ]
    return pairs


def _size(name: str, layout: Layout, rows: int) -> str:
    return f"{name} of {rows:,} rows is {human_bytes(rows * layout.d_in * VALUE_BYTES)}"


def _encoding(manifest: Manifest) -> list[tuple[str, str]]:
    """How values are stored, and what that has cost."""
    found = manifest.get("encoding")
    if not found:
        return []
    stored = f"{found['dtype']}, in {found['container']} for Zarr"
    if (step := found.get("parameters", {}).get("step")) is not None:
        stored += f"; whole steps of {step:.6g}"
    pairs = [("values", stored)]
    if before := found.get("before"):
        lost = before.get("error", {}).get("relative")
        what = "rounding" if "error" not in before else f"{_number(lost)} of the variance"
        pairs.append(("before", f"{before['codec']} in {before['dtype']}, which had cost {what}"))
    if error := found.get("error"):
        typical, largest = error["per_dimension_median"], error["per_dimension_max"]
        pairs.append(
            (
                "error",
                (
                    f"{_number(error['relative'])} of the variance is lost, "
                    f"{_number(error.get('of_typical_variance'))} of that of an ordinary dimension, "
                    f"of a dimension {_number(typical)} in the median and {_number(largest)} at "
                    f"most; "
                    f"{error['clipped_values']:,} values were clipped"
                ),
            )
        )
    return pairs


def _number(value: float | None) -> str:
    return "an undefined share" if value is None else f"{value:.3g}"


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


def _shuffle(manifest: Manifest) -> list[tuple[str, str]]:
    found = manifest.get("shuffle")
    return [("order", verdict(found))] if found else []


def _made(manifest: Manifest) -> list[tuple[str, str]]:
    made = manifest["provenance"]
    runs, speed = made["runs"], manifest.get("execution", {}).get("tokens_per_s")
    by = f" by {made['owner']}" if made.get("owner") else ""
    where = f" on {runs[-1]['hardware']['processor']}, {runs[-1]['device']}" if runs else ""
    count = f", in {len(runs)} runs" if len(runs) > 1 else ""
    pairs = [
        ("made", f"{made.get('finished', 'not finished')}{by}{where}{count}"),
        ("command", str(made["command"])),
        ("versions", ", ".join(f"{name} {v}" for name, v in made["versions"].items())),
    ]
    if speed is not None:
        pairs.append(("speed", f"{speed:,.0f} tokens/s through the model, measured beforehand"))
    for each in made.get("extensions", []):
        pairs.append(("extended", f"{each['finished']}, behind {each['rows']:,} training rows"))
    repairs = made.get("repairs", [])
    if repairs:
        n_files = sum(len(entry["files"]) for entry in repairs)
        pairs.append(("repaired", f"{n_files} files have other bytes than the harvest wrote"))
    return pairs
