"""What a store was before its extensions: what the manifest notes of it, as manifests of that time."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import StoreError
from .files import is_sha256
from .layout import Layout
from .manifest import Manifest


def manifests_before(manifest: Manifest) -> list[Manifest]:
    """The manifest of a complete store as it was before each of its extensions, the first of them first.

    With the digest of that time, the recipe and the digest of the tokens (where they are noted), and
    the shards with the rows that they held; the last one's file is the one that holds more by now.
    """
    found: list[Manifest] = []
    for each in _extensions(manifest):
        sizes = manifest["train"]["layout"]
        layout = Layout(**sizes)
        if each["rows"] > layout.n_rows:  # of a part, perhaps a smaller one
            continue
        layout = replace(layout, n_rows=each["rows"])
        if len(manifest["train"]["shards"]) < layout.n_shards:
            continue
        shards = copy.deepcopy(manifest["train"]["shards"][: layout.n_shards])
        first, last = layout.rows_of_shard(layout.n_shards - 1)
        shards[-1]["rows"] = last - first  # of those that are in its files by now
        found.append(
            {
                **manifest,
                "recipe": each.get("recipe", manifest["recipe"]),
                "corpus": {"digest": each.get("corpus", manifest["corpus"]["digest"])},
                "train": {"layout": sizes | {"n_rows": layout.n_rows}, "shards": shards},
                "statistics": each["statistics"],
                "digest": each["digest"],
            }
        )
    return found


def _extensions(manifest: Manifest) -> list[dict[str, Any]]:
    """What is noted of a store's extensions, as far as it is of our form: no digest covers it."""
    made = manifest.get("provenance")
    found = made.get("extensions") if isinstance(made, dict) else None
    return [
        each
        for each in (found if isinstance(found, list) else ())
        if isinstance(each, dict)
        and is_sha256(each.get("digest"))
        and type(each.get("rows")) is int
        and each["rows"] > 0
        and isinstance(each.get("statistics"), dict)
        and type(each["statistics"].get("mean_squared_norm")) is float
        and isinstance(each.get("recipe", {}), dict)
        and ("corpus" not in each or is_sha256(each["corpus"]))
    ]


def not_kept(vector: Path, n_rows: int) -> StoreError:
    """For statistics of the rows before an extension. vector: where those of all rows are."""
    return StoreError(
        f"{vector} is that of all rows that the store has by now, and that of the {n_rows:,} rows "
        "before it was extended is not kept. Open the store itself."
    )
