"""Ten processes that put stores into a catalogue and list it at once: catalogue_crowd.py SOURCE PLACE.

Each fetches copies of a store, lays out and finishes one under another's eyes, and lists after every
step. It fails when a store that was complete before a listing began is not in it, or when anything is
listed as complete that is not whole. Prints how many of them failed, and how many stores there are.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from sae_pipe.storage import list_stores, open_store
from sae_pipe.storage.manifest import (
    COMPLETE,
    HARVESTING,
    MANIFEST,
    read_manifest,
    write_manifest,
)
from sae_pipe.storage.pull import pull

PROCESSES, ROUNDS = 10, 3


def age(store: Path) -> None:
    """As if it had been written a minute ago: what is younger is not noted in the index."""
    os.utime(store / MANIFEST, (time.time() - 60,) * 2)


def work(number: int, source: Path, place: Path, log: Path) -> None:
    """What one process does."""
    warnings: list[str] = []
    expected = open_store(source)

    def look() -> None:
        before = {file.name.replace("+", "/") for file in log.iterdir()}
        found = {entry.store: entry for entry in list_stores(place, warn=warnings.append)}
        missing = before - {name for name, entry in found.items() if entry.state == COMPLETE}
        assert not missing, f"not listed: {missing}"
        assert not warnings, warnings
        for name, entry in found.items():
            if entry.state == COMPLETE:
                whole = (expected.n_rows, expected.digest)
                assert (entry.n_rows, entry.digest) == whole, f"half of {name}: {entry}"
                assert entry.n_sealed == entry.n_shards
                open_store(place / name)
            else:
                assert (entry.state, entry.n_rows) == (HARVESTING, expected.n_rows)

    def done(name: str) -> None:
        (log / name.replace("/", "+")).touch()

    for turn in range(ROUNDS):
        name = f"lab-{number}/{turn}.zarr"
        pull(source, place / name, say=lambda line: None)
        age(place / name)
        done(name)
        look()
    # A store whose manifest changes: it is laid out, then finished, then looked at.
    name = f"lab-{number}/slow.zarr"
    manifest = read_manifest(source)
    shards = {split: manifest[split] | {"shards": []} for split in ("train", "heldout")}
    pull(source, place / f".{number}.zarr", say=lambda line: None)
    write_manifest(place / f".{number}.zarr", manifest | {"state": HARVESTING} | shards)
    age(place / f".{number}.zarr")
    os.rename(place / f".{number}.zarr", place / name)
    look()
    write_manifest(place / name, manifest)
    age(place / name)
    done(name)
    look()


def _die(*error: Any) -> None:
    """A child does not go on with what its parent was doing."""
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    source, place = Path(sys.argv[1]), Path(sys.argv[2])
    log = place.with_name("done")
    log.mkdir()
    children = []
    start = time.time() + 0.2
    for number in range(PROCESSES):
        child = os.fork()
        if child == 0:
            time.sleep(max(start - time.time(), 0))
            sys.excepthook = _die
            work(number, source, place, log)
            os._exit(0)
        children.append(child)
    failed = sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)
    print(json.dumps({"failed": failed, "stores": len(list(log.iterdir()))}))


if __name__ == "__main__":
    main()
