"""Rows per second of random-order batches from S3, with a cold and a warm cache, against local ones.

Batches are read from S3 with an empty cache (one epoch), from S3 again with what that left behind,
and from the store on the disk (some epochs each; opening the store is timed with them). Beside it the same shards are downloaded with as many connections
and nothing else done (s3fs's own `get`). The S3 server is moto's, a process on this machine, so that
client, server and reader share its cores; with --link-mb the bytes come through a process that lets
no more than that through a second, as a network does. Rows are those of the demo model.

    python tests/benchmarks/remote_rates.py
    python tests/benchmarks/remote_rates.py --link-mb 60
    python tests/benchmarks/remote_rates.py --fit             # steps of a fit instead of batches
"""

import argparse
import datetime
import importlib.metadata
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from reader_rates import Rate, linked_store, real_rows

from sae_pipe.stages.fit import fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.layout import choose_layout
from sae_pipe.storage.provenance import hardware
from sae_pipe.storage.remote import CONNECTIONS

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.services import ENVIRONMENT, s3_server, wire_to

ADDRESS = "s3://lab/rates.zarr"


def rows_of(store: ActivationStore, batch: int, passes: int) -> int:
    """Serve every row of a store so many times; the rows."""
    rows = 0
    with store.batches(batch) as batches:
        while rows < store.n_rows * passes:
            rows += len(next(batches))
    return rows


def a_fit(store: ActivationStore, folder: Path) -> int:
    """Train a small SAE for an epoch; the rows."""
    shutil.rmtree(folder, ignore_errors=True)
    config = FitConfig(
        arch="topk", k=16, d_sae=512, batch_size=4096, heldout_rows=0, checkpoint_minutes=60
    )
    return fit(store, config, folder, show_progress=False).tokens


def download(folder: Path) -> int:
    """The activations of all shards, by s3fs alone; bytes."""
    import s3fs

    shutil.rmtree(folder, ignore_errors=True)
    system = s3fs.S3FileSystem(
        skip_instance_cache=True, config_kwargs={"max_pool_connections": 2 * CONNECTIONS}
    )
    root = ADDRESS.removeprefix("s3://")
    names = [name for name in system.find(f"{root}/activations") if name.endswith("/0")]
    targets = [str(folder / name.removeprefix(root).lstrip("/")) for name in names]
    system.get(names, targets, batch_size=CONNECTIONS)
    return sum(Path(target).stat().st_size for target in targets)


def measure(options: argparse.Namespace, folder: Path, local: Path) -> None:
    cache = folder / "cache"
    os.environ["SAE_PIPE_CACHE"] = str(cache)

    def served(place: str | Path, name: str, passes: int) -> Rate:
        if options.fit:
            return Rate.of(lambda: a_fit(open_store(place), folder / name))
        return Rate.of(lambda: rows_of(open_store(place), options.batch, passes))

    def cold() -> Rate:
        shutil.rmtree(cache, ignore_errors=True)
        return served(ADDRESS, "cold", 1)

    arms: dict[str, Callable[[], Rate]] = {
        "download": lambda: Rate.of(lambda: download(folder / "plain")),
        "cold": cold,
        "open": lambda: Rate.of(lambda: open_store(ADDRESS).n_rows),
        "warm": lambda: served(ADDRESS, "warm", options.epochs),
        "local": lambda: served(local, "local", options.epochs),
    }
    rates: dict[str, list[Rate]] = {name: [] for name in arms}
    for number in range(options.repeat):
        print(f"round {number + 1}: load {os.getloadavg()[0]:.1f}", flush=True)
        for name, arm in arms.items():
            rates[name].append(arm())
    for name, found in rates.items():
        seconds, cpu = ([getattr(r, f) for r in found] for f in ("seconds", "cpu_seconds"))
        print(
            f"{name:9} {min(seconds):6.2f} s at best, {statistics.median(seconds):6.2f} in the "
            f"median; {min(cpu):5.2f} processor seconds at best; "
            f"{found[0].rows / min(seconds):,.0f} {'bytes' if name == 'download' else 'rows'}/s"
        )
    compare("warm", "local", rates)
    compare("cold", "download", rates)


def compare(one: str, other: str, rates: dict[str, list[Rate]]) -> None:
    """How fast an arm is beside another, in which 1 is as fast: by the clock and the processor."""
    best, cpu = (
        {name: min(getattr(rate, field) for rate in rates[name]) for name in (one, other)}
        for field in ("seconds", "cpu_seconds")
    )
    pairs = zip(rates[one], rates[other], strict=True)
    each = [second.seconds / first.seconds for first, second in pairs]
    print(
        f"{one} / {other}: {best[other] / best[one]:.3f} at best, {statistics.median(each):.3f} in the "
        f"median of rounds; by processor seconds {cpu[other] / cpu[one]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--megabytes", type=int, default=400, help="raw bfloat16")
    parser.add_argument("--shards", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=4, help="of the warm and the local arm")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--link-mb", type=float, default=0.0, help="megabytes a second")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_rows = int(options.megabytes * 1e6) // (2 * options.d_in)
        shard_rows = 1 << max((n_rows // options.shards).bit_length() - 1, 8)
        n_rows -= n_rows % shard_rows  # all shards are one file
        layout = choose_layout(
            n_rows=n_rows, d_in=options.d_in, block_bytes=0, shard_rows=shard_rows
        )
        rows_ND = real_rows(folder, shard_rows, options.d_in)
        local = linked_store(folder / "rates.zarr", rows_ND, layout, "lossless")
        stored = sum(s["files"]["activations"]["bytes"] for s in local.manifest["train"]["shards"])
        versions = ", ".join(
            f"{p} {importlib.metadata.version(p)}" for p in ("fsspec", "s3fs", "moto", "zarr")
        )
        about = hardware()
        print(
            f"{datetime.date.today()}, {about['processor']}, {about['cores']} cores, {versions}\n"
            f"{n_rows:,} rows of {options.d_in} values, {layout.n_shards} shards of "
            f"{stored / layout.n_shards / 1e6:.1f} MB, {stored / 1e6:.0f} MB in all; "
            f"{CONNECTIONS} connections; link "
            + (f"{options.link_mb:g} MB/s" if options.link_mb else "as fast as it goes")
        )
        with s3_server(folder) as s3, wire_to(s3.port, folder) as wire:
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{s3.port}"
            s3.put(local.path, "rates.zarr")
            if options.link_mb:
                wire.cut()
                wire.join(bytes_per_s=int(options.link_mb * 1e6))
                os.environ["AWS_ENDPOINT_URL"] = wire.url
            measure(options, folder, local.path)


if __name__ == "__main__":
    main()
