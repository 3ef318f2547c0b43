"""Hundreds of SIGKILLs of extensions: a store that is extended is killed over and over.

As crash_kills.py, of `harvest --extend`. After every kill the store is opened as a reader would:
it has to be the old one, row by row, or the new one, or to say that it is being extended.

    python tests/benchmarks/extend_kills.py --kills 200
"""

import argparse
import datetime
import json
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from crash_kills import attempt, content, lost_and_repeated, small_harvest

from sae_pipe.stages.harvest import harvest
from sae_pipe.storage import ActivationStore, StoreError, open_store
from sae_pipe.storage.extension import staging_of
from sae_pipe.storage.manifest import COMMITS, MANIFEST
from sae_pipe.storage.provenance import hardware


def phase(store: Path, n_rows: int) -> str:
    """What a kill has left. n_rows: of the store when it is extended."""
    found, staging = json.loads((store / MANIFEST).read_bytes()), staging_of(store)
    if found["state"] == "extending":
        return "putting files to their places"
    if found["train"]["layout"]["n_rows"] == n_rows:
        return "complete"
    if not (staging / "corpus").is_dir():
        return "tokenising" if staging.is_dir() else "beginning"
    if not (staging / MANIFEST).is_file():
        return "laying out"
    if json.loads((staging / MANIFEST).read_bytes())["state"] == "complete":
        return "new files complete"
    sealed = list((staging / COMMITS / "train").glob("[0-9]*.json"))
    return "sealing shards" if sealed else "filling the first block"


def is_well(store: Path, old: ActivationStore, n_rows: int) -> bool:
    """Whether a reader gets the old rows, the new ones, or a sentence."""
    try:
        found = open_store(store)
    except StoreError as error:
        return phase(store, n_rows) == "putting files to their places" and "Try again" in str(error)
    rows = slice(0, old.n_rows)
    return found.n_rows in (old.n_rows, n_rows) and bool(
        (found.read(rows) == old.read(rows)).all()
        and (found._train.read_source(rows) == old._train.read_source(rows)).all()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=10_000, help="before; half as many are added")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, kills = np.random.default_rng(arguments.seed), Counter[str]()
    stores = lost = repeated = different = wrong = 0
    begun, n_rows = time.monotonic(), arguments.tokens * 3 // 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = small_harvest(folder / "old.zarr", arguments.tokens)
        harvest(config, say=lambda _: None, show_progress=False)
        old = open_store(config.out)
        extension = replace(config, tokens=n_rows, extend=True)
        whole = replace(extension, out=Path(shutil.copytree(config.out, folder / "whole.zarr")))
        _, events = attempt(whole, 0, "", None)
        expected = content(whole.out)
        while sum(kills.values()) < arguments.kills:
            out = Path(shutil.copytree(config.out, folder / f"killed{stores}" / "acts.zarr"))
            # Half of the stores keep a block that is being filled on disk.
            killed = replace(extension, out=out, note_every_s=0.0 if stores % 2 else 60.0)
            while not attempt(killed, int(rng.integers(1, events // 2)), "", None)[0]:
                kills[phase(out, n_rows)] += 1
                wrong += not is_well(out, old, n_rows)
            found = content(out)
            different += sum(found.get(name) != data for name, data in expected.items())
            different += len(found.keys() - expected.keys())
            counts = lost_and_repeated(out, whole.out)
            lost, repeated, stores = lost + counts[0], repeated + counts[1], stores + 1
            shutil.rmtree(out.parent)
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {hardware()['processor']}")
    print(f"config    {vars(arguments)}, {events} events in an extension")
    print(f"kills     {sum(kills.values())} in {time.monotonic() - begun:.0f} s: {dict(kills)}")
    print(
        f"result    {stores} stores; rows lost {lost}, rows repeated {repeated}, files that differ "
        f"from those of an extension that was never interrupted {different}; readers in between that "
        f"saw something else than the old store, the new one or a sentence {wrong}"
    )


if __name__ == "__main__":
    main()
