"""What a store holds at this instant, for a reader that opened it before: it may have been extended.

An extension (`extension.py`) puts its files to their places one by one, and its manifest last.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import SaePipeError
from .files import plain_size, read_plain
from .manifest import (
    EXTENDING,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Manifest,
    load_bounded_json,
    parse_json,
)

STAGING = ".extending"  # below a store: where an extension of it is made

Record = dict[str, Any]


def manifest_now(root: Path) -> Manifest | None:
    """The manifest of a store; while an extension is put to its place, that of the extension, whose
    files are there or come in an instant.

    None when it cannot be read; one without shards when the extension's has gone.
    """
    try:
        for _ in range(2):  # it may be at its place when it is looked for where it was made
            manifest = load_bounded_json(root / MANIFEST)
            if manifest["state"] != EXTENDING:
                return dict(manifest)
            with suppress(FileNotFoundError):
                data = read_plain(root, f"{STAGING}/{MANIFEST}", MANIFEST_LIMIT_BYTES)
                return dict(parse_json(data, f"{root}/{STAGING}/{MANIFEST}"))
    except (SaePipeError, OSError, KeyError, TypeError, ValueError):
        return None
    return {split: {"shards": []} for split in ("train", "heldout")}


def records_of(manifest: Manifest | None, split: str) -> list[Any] | None:
    """The records of a split's shards, as far as there are any of our form."""
    try:
        return list(manifest[split]["shards"]) if manifest is not None else None
    except (KeyError, TypeError):
        return None


def larger_record(known: Record, now: Record, root: Path, name: str) -> Record | None:
    """The record of a last shard that was filled up, with the number of rows that are known of it.

    known: its record before; now: on disk; name: its file below the root. None when it does not hold
    more rows than before, or its file is not (yet) the one that is recorded.
    """
    try:
        if not now["rows"] > known["rows"] or now["files"] == known["files"]:
            return None
        size = now["files"]["activations"]["bytes"]
        if type(size) is not int or plain_size(root, name) != size:
            return None
    except (SaePipeError, OSError, KeyError, TypeError):
        return None
    return {**now, "rows": known["rows"]}
