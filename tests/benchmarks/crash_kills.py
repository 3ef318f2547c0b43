"""Hundreds of SIGKILLs: a small harvest is killed over and over, and ends with the same bytes.

A harvest of the demo model runs in a process of its own, which is killed at a random event (a
rename, a sync, a batch through the model) or after a random time, and is run again until it ends.
Then every file is compared with those of a harvest that was never interrupted, and each (context,
position) is looked for in the stored sources. Printed are the kills by what the folder looked like
afterwards, and how many rows were lost or there twice over all stores.

    python tests/benchmarks/crash_kills.py --kills 300
"""

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_pipe.pipeline.cli_demo import MODEL, TEXT
from sae_pipe.stages import harvest_run
from sae_pipe.stages.backoff import BatchRunner
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.plan import Rates
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import open_store
from sae_pipe.storage.manifest import COMMITS
from sae_pipe.storage.provenance import hardware

_FORK = multiprocessing.get_context("fork")


# Where the counting of events begins, so that the short phases get their kills too, and how many
# events there are about to count; None: from the start, over a third of all.
COUNTED_FROM = {"": None, "corpus.building": 40, "statistics/mean/c/0": 9}


def run_until(config: HarvestConfig, die_at: int, since: str, events: Any) -> None:
    """In the child: harvest, and die by SIGKILL at an event; 0 for never.

    since: count events from the first file on whose name has this in it.
    """
    lock, is_counting = threading.Lock(), not since

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal is_counting
            with lock:
                is_counting = is_counting or since in str(arguments[-1])
                events.value += is_counting
                if events.value == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return called

    torch.set_num_threads(1)
    for name in ("replace", "fsync", "posix_fallocate"):
        setattr(os, name, counted(getattr(os, name)))
    BatchRunner._try = counted(BatchRunner._try)  # type: ignore[method-assign]
    vars(harvest_run)["measure"] = lambda *_: Rates(tokens_per_s=1e3, bytes_per_value=1.4)
    harvest(config, say=lambda _: None, show_progress=False)


def attempt(
    config: HarvestConfig, die_at: int, since: str, after_s: float | None
) -> tuple[bool, int]:
    """Whether the harvest ended by itself, and how many events it came to."""
    events = _FORK.Value("q", 0, lock=False)
    process = _FORK.Process(target=run_until, args=(config, die_at, since, events))
    process.start()
    process.join(after_s)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a harvest ended with {process.exitcode}: that is a bug")
    return process.exitcode == 0, int(events.value)


def phase(store: Path) -> str:
    """What a kill has left."""
    manifest = store / "manifest.json"
    if not manifest.is_file():
        return "beginning"
    found = json.loads(manifest.read_bytes())
    if found["state"] == "tokenising":
        return "laying out" if (store / "corpus").is_dir() else "tokenising"
    if found["state"] == "complete":
        return "complete"
    sealed = {int(file.stem) for file in (store / COMMITS / "train").glob("[0-9]*.json")}
    layout = found["train"]["layout"]
    if len(sealed) == -(-layout["n_rows"] // layout["shard_rows"]):
        return "writing the manifest"
    # What is there of a shard before its commit record, written or still under its temporary name.
    heldout = {int(file.stem) for file in (store / COMMITS / "heldout").glob("[0-9]*.json")}
    for folder, known in ((store, sealed), (store / "heldout", heldout)):
        arrays = [folder / name / "c" for name in ("activations", "source", "masked")]
        files = [file for array in arrays for file in array.rglob("*") if file.is_file()]
        numbers = [file.relative_to(folder).parts[2].split(".") for file in files]
        if any(len(parts) > 1 or int(parts[0]) not in known for parts in numbers):
            return "sealing a shard"
    return "filling a block"


def content(store: Path) -> dict[str, bytes]:
    """Every file that must not depend on interruptions; of the manifest, all but when and where.

    A kill right after the store was declared complete leaves commit records, which nothing reads.
    """
    files = {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file()
        and file.name not in (".lock", "manifest.json")
        and file.relative_to(store).parts[0] != COMMITS
    }
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("provenance")
    files["manifest"] = json.dumps(manifest, sort_keys=True).encode()
    return files


def lost_and_repeated(store: Path, expected: Path) -> tuple[int, int]:
    """Rows of the expected store that are not there, and rows that are there more than once."""
    reads = [open_store(path)._train.read_source(slice(None)) for path in (store, expected)]
    there, wanted = (np.unique(each) for each in reads)
    return len(np.setdiff1d(wanted, there)), len(reads[0]) - len(there)


def small_harvest(out: Path, tokens: int) -> HarvestConfig:
    """A harvest of the demo with many shards and blocks."""
    return HarvestConfig(
        model=str(MODEL),
        layers=(3,),
        mask_p=(0.3,),
        out=out,
        text=TextConfig(dataset=str(TEXT)),
        tokens=tokens,
        heldout_tokens=500,
        block_bytes=1024 * 128 * 2,
        shard_rows=512,
        batch_contexts=8,
        device="cpu",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, kills = np.random.default_rng(arguments.seed), Counter[str]()
    stores = lost = repeated = different = 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = small_harvest(folder / "whole.zarr", arguments.tokens)
        whole_s = time.monotonic()
        _, events = attempt(config, 0, "", None)
        whole_s = time.monotonic() - whole_s
        expected = content(config.out)
        while sum(kills.values()) < arguments.kills:
            # Half of the stores keep a block that is being filled on disk.
            note_every_s = 0.0 if stores % 2 else 60.0
            out = folder / f"killed{stores}" / "acts.zarr"
            killed = replace(config, out=out, note_every_s=note_every_s)
            ended = False
            while not ended:
                by_time = rng.random() < 0.3
                since = "" if by_time else str(rng.choice(list(COUNTED_FROM)))
                most = COUNTED_FROM[since] or max(events // 3, 2)
                die_at = 0 if by_time else int(rng.integers(1, most))
                after_s = float(rng.uniform(0, whole_s / 2)) if by_time else None
                ended, _ = attempt(killed, die_at, since, after_s)
                if not ended:
                    kills[phase(out)] += 1
            found = content(out)
            different += sum(found.get(name) != data for name, data in expected.items())
            different += len(found.keys() - expected.keys())
            counts = lost_and_repeated(out, config.out)
            lost, repeated, stores = lost + counts[0], repeated + counts[1], stores + 1
            shutil.rmtree(out.parent)
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {hardware()['processor']}")
    print(f"config    {vars(arguments)}, {events} events in a harvest")
    print(f"kills     {sum(kills.values())} in {time.monotonic() - begun:.0f} s: {dict(kills)}")
    print(
        f"result    {stores} stores; rows lost {lost}, rows repeated {repeated}, files that differ "
        f"from those of a harvest that was never interrupted {different}"
    )


if __name__ == "__main__":
    main()
