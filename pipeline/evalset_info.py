"""What `sae-pipe eval-set info` prints."""

from pathlib import Path
from typing import Any

import numpy as np

from ..storage.disk import human_bytes
from ..storage.evalset import SPLITS, EvalSet
from .show import show_pairs
from .tables import table


def describe(path: Path, manifest: dict[str, Any], evalset: EvalSet | None) -> str:
    """A set as text; evalset: None while it is not complete."""
    recipe = manifest["recipe"]
    pairs: list[tuple[str, Any]] = [
        ("state", manifest["state"]),
        (
            "suite",
            f"{manifest['suite']}, pooling {manifest['pooling']}, seed {recipe.get('seed', '-')}",
        ),
        (
            "model",
            f"{recipe['model']['name']} ({recipe['model']['revision']}), {recipe.get('dtype', '-')}",
        ),
        ("hook", f"{recipe.get('hook', '-')} of layer {recipe['layer']}"),
        ("items", f"{manifest['n_items']:,}"),
        ("rows", f"{manifest['n_rows']:,} of {manifest['d_in']}"),
    ]
    if evalset is None:
        size = manifest["chunk_rows"]
        done = sum(1 for _ in (path / "activations" / "c").glob("[0-9]*/0"))
        pairs.append(("done", f"{min(done * size, manifest['n_rows']):,} rows"))
    else:
        n_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
        pairs += [("size", human_bytes(n_bytes)), ("digest", manifest["digest"])]
    for what, counts in (("left out", manifest["dropped"]), ("cut", manifest["truncated"])):
        pairs += [(what, f"{n:,}  {reason}") for reason, n in counts.items()]
    lines = [show_pairs(pairs)]
    if evalset is not None and evalset.tasks:
        lines += ["", _tasks(evalset)]
    notes = [(task["name"], task["note"]) for task in manifest["tasks"] if task["note"]]
    if notes:
        lines += ["", show_pairs(notes)]
    return "\n".join(lines)


def _tasks(evalset: EvalSet) -> str:
    rows = []
    for number, task in enumerate(evalset.tasks):
        split_I = evalset.item_split[evalset.items_of(number)]
        counts = np.bincount(split_I, minlength=len(SPLITS))
        rows.append([task.name, str(len(task.classes)), *(f"{n:,}" for n in counts.tolist())])
    return table(("task", "classes", *SPLITS), rows)
