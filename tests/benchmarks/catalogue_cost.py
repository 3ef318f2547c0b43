"""Seconds that listing a catalogue takes the first time, when every manifest is read, and after that.

Manifests as large as those of stores of 500 million rows of 768 values, without the shards. Process
time of the one thread that lists, and wall time; a folder of a local disk.

    python tests/benchmarks/catalogue_cost.py
    python tests/benchmarks/catalogue_cost.py --stores 1000
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from sae_pipe.storage import list_stores
from sae_pipe.storage.layout import choose_layout
from sae_pipe.storage.manifest import COMPLETE, FORMAT, FORMAT_VERSION, MANIFEST
from sae_pipe.storage.provenance import hardware
from sae_pipe.storage.shard_cache import CACHE_DIR


def manifest() -> dict[str, Any]:
    """What the table needs, and the records of all shards."""
    train = choose_layout(n_rows=500_000_000, d_in=768, block_bytes=2_000_000_000)
    heldout = choose_layout(n_rows=1_000_000, d_in=768, block_bytes=0)
    file = {"bytes": 135_000_000, "sha256": "0" * 64}
    shard = {"rows": train.shard_rows, "files": dict.fromkeys(("activations", "source"), file)}
    splits = {
        name: {"layout": vars(layout), "shards": [shard] * layout.n_shards}
        for name, layout in (("train", train), ("heldout", heldout))
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "state": COMPLETE,
        "recipe": {"model": {"name": "owner/model", "revision": "0" * 40}, "layer": 8},
        "codec": "lossless",
        "corpus": {"digest": "0" * 64},
        "provenance": {"runs": [], "finished": "2026-11-26T00:00:00+00:00"},
        "digest": "0" * 64,
        **splits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stores", type=int, default=200)
    asked = parser.parse_args()
    text = json.dumps(manifest(), indent=1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_DIR] = f"{folder}/cache"
        for number in range(asked.stores):
            file = Path(folder, "stores", str(number % 10), f"{number}.zarr", MANIFEST)
            file.parent.mkdir(parents=True)
            file.write_text(text)
            os.utime(file, (time.time() - 60,) * 2)
        print(f"{asked.stores} manifests of {len(text) / 1e6:.2f} MB")
        for what in ("first", "second"):
            process, wall = time.process_time(), time.perf_counter()
            found = list_stores(f"{folder}/stores")
            process, wall = time.process_time() - process, time.perf_counter() - wall
            assert len(found) == asked.stores
            print(f"{what:6}  {process:.3f} s of one core, {wall:.3f} s by the clock")
    print(f"{hardware()['processor']}, {datetime.date.today()}")
    print(f"sae-pipe {importlib.metadata.version('sae-pipe')}")


if __name__ == "__main__":
    main()
