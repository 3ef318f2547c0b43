"""Rows per second of random-order batches, as ratios to decoding alone, a raw memmap and memcpy.

Decoding alone is the same chunks by the same number of threads, each into a buffer of its own: what
the batches add is the mixing. The memmap holds the same rows as raw bfloat16 and is asked for the
same rows in the same order. Everything is read from the page cache, so that the disk is left out.
Rows are real: those of the demo model over the demo text, laid end to end to the width asked for;
one shard of them is linked as often as needed, so that a store of 100 GB fits anywhere.

    python tests/benchmarks/reader_rates.py                     # d_in 768, codec lossless
    python tests/benchmarks/reader_rates.py --codec compact
    python tests/benchmarks/reader_rates.py --gigabytes 100     # start-up on a large store
    python tests/benchmarks/reader_rates.py --shard-mb 64 --chunk-rows 4096
"""

# N rows, D d_in

import argparse
import datetime
import importlib.metadata
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sae_pipe.pipeline.cli_demo import MODEL, TEXT
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.builder import StoreBuilder
from sae_pipe.storage.codecs import get_codec
from sae_pipe.storage.corpus_writer import complete as complete_corpus
from sae_pipe.storage.corpus_writer import create_groups
from sae_pipe.storage.layout import Layout, choose_layout
from sae_pipe.storage.manifest import COMMITS
from sae_pipe.storage.order import Order
from sae_pipe.storage.provenance import hardware
from sae_pipe.storage.values import Bits, Floats

_DEMO_TOKENS = 800_000


@dataclass(frozen=True)
class Rate:
    """Rows moved, and what it took by the clock and in processor seconds of all threads."""

    rows: int
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, move: Callable[[], int]) -> "Rate":
        """Time one call, which gives the number of rows that it has moved."""
        begun, cpu = time.perf_counter(), time.process_time()
        rows = move()
        return cls(rows, time.perf_counter() - begun, time.process_time() - cpu)

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds

    @property
    def rows_per_cpu_s(self) -> float:
        return self.rows / max(self.cpu_seconds, 1e-9)


def real_rows(folder: Path, n_rows: int, d_in: int) -> Floats:
    """Rows of the demo model, (N, D), repeated where there are too few."""
    config = HarvestConfig(
        model=str(MODEL),
        layers=(3,),
        mask_p=(0.3,),
        out=folder / "demo.zarr",
        text=TextConfig(dataset=str(TEXT)),
        tokens=min(_DEMO_TOKENS, -(-n_rows * d_in // 128)),
        heldout_tokens=1000,
    )
    values = open_store(harvest(config, say=lambda _: None)[0]).read(slice(None))
    return np.resize(values, (n_rows, d_in))


def linked_store(path: Path, rows_ND: Floats, layout: Layout, codec: str) -> ActivationStore:
    """A store whose shards are all the same file."""
    create_groups(path / "corpus")
    complete_corpus(path / "corpus", {})
    builder = StoreBuilder.begin(path, {}, {"benchmark": "reader_rates"}, codec)
    builder.lay_out(layout, replace(layout, n_rows=0), {}, rows_ND[:16_384])
    with ThreadPoolExecutor() as pool:
        train, heldout = builder.writers(pool)
        count = layout.shard_rows
        rows = builder.codec.values.of_floats(rows_ND[:count])
        train.write(0, rows, np.arange(count), np.zeros(count, np.bool_))
        for shard in range(1, layout.n_shards):
            (path / f"activations/c/{shard}").mkdir()
            for name in ("activations/c/{}/0", "source/c/{}", "masked/c/{}"):
                os.link(path / name.format(0), path / name.format(shard))
            commits = path / COMMITS / "train"
            os.link(commits / f"{0:08d}.json", commits / f"{shard:08d}.json")
        builder.finish(train, heldout)
    return open_store(path)


def decode_alone(store: ActivationStore, chunks: int, threads: int) -> Rate:
    """Decoding `chunks` chunks of the first epoch's order."""
    reader = store._train
    wanted: list[int] = []
    for window in Order(layout=reader.layout, seed=0).windows(0):
        wanted += window.chunks.tolist()
        if len(wanted) >= chunks:
            break
    turns = itertools.count()

    def decode() -> int:
        rows = np.empty((reader.layout.chunk_rows, reader.d_in), reader.codec.served.memory)
        done = 0
        while (turn := next(turns)) < chunks:
            count = reader.rows_of_chunk(wanted[turn])
            reader.decode_chunk(wanted[turn], rows[:count])
            done += count
        return done

    with ThreadPoolExecutor(threads) as pool:
        return Rate.of(lambda: sum(pool.map(lambda _: decode(), range(threads))))


def batches(store: ActivationStore, batch_size: int, threads: int) -> Rate:
    """Whole windows of batches, the first window's filling left out."""
    with store.batches(batch_size, threads=threads) as loader:
        windows = Order(layout=store._train.layout, seed=0).windows(0)
        sizes = [next(windows).n_rows for _ in range(4)]
        # From the batch that first touches one window to the one that first touches the third after
        # it: just so many windows have to be decoded in between.
        first, last = sizes[0] // batch_size + 1, sum(sizes) // batch_size + 1
        for _ in range(first):
            next(loader)
        return Rate.of(lambda: sum(len(next(loader)) for _ in range(last - first)))


def from_memmap(raw: Bits, store: ActivationStore, batch_size: int, n_batches: int) -> Rate:
    """Gathering the same batches from raw bfloat16."""
    layout = store._train.layout
    window = next(Order(layout=layout, seed=0).windows(0))
    laid = [np.arange(c * layout.chunk_rows, (c + 1) * layout.chunk_rows) for c in window.chunks]
    rows = np.empty(window.n_rows, np.int64)
    rows[window.places()] = np.concatenate(laid)[: window.n_rows] % len(raw)
    out = np.empty((batch_size, raw.shape[1]), np.uint16)

    def gather() -> int:
        for number in range(n_batches):
            start = number * batch_size % (len(rows) - batch_size + 1)
            np.take(raw, rows[start : start + batch_size], axis=0, out=out, mode="clip")
        return n_batches * batch_size

    return Rate.of(gather)


def memcpy_rows(d_in: int) -> Rate:
    """Copying bfloat16 from memory to memory, on one thread."""
    source = np.ones((256 << 20) // 2, np.uint16)  # zeros would all be one page
    target = np.ones_like(source)

    def copy() -> int:
        for _ in range(4):
            np.copyto(target, source)
        return 4 * source.size // d_in

    return Rate.of(copy)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_over_time(store: ActivationStore, batch_size: int, threads: int) -> list[int]:
    """Resident bytes after each of eight windows."""
    found = []
    with store.batches(batch_size, threads=threads) as loader:
        window = Order(layout=store._train.layout, seed=0).largest_window
        for _ in range(8):
            for _ in range(window // batch_size):
                next(loader)
            found.append(resident_bytes())
    return found


def start_up(path: Path, batch_size: int) -> tuple[float, float]:
    """Seconds until the store is open, and from there to the first batch."""
    begun = time.perf_counter()
    store = open_store(path)
    opened = time.perf_counter()
    with store.batches(batch_size) as loader:
        next(loader)
        return opened - begun, time.perf_counter() - opened


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codec", default="lossless")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="raw bfloat16 of the store")
    parser.add_argument(
        "--shard-mb", type=int, help="raw bfloat16 of a shard; default: as harvested"
    )
    parser.add_argument("--chunk-rows", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the store; default: temporary")
    arguments = parser.parse_args()
    d_in = arguments.d_in
    codec = get_codec(arguments.codec)
    shard_rows = None
    if arguments.shard_mb:
        shard_rows = 1 << ((arguments.shard_mb << 20) // (2 * d_in)).bit_length() - 1
    layout = choose_layout(
        n_rows=int(arguments.gigabytes * 1e9 / (2 * d_in)),
        d_in=d_in,
        block_bytes=2_000_000_000,
        shard_rows=shard_rows,
        chunk_rows=arguments.chunk_rows or codec.chunk_rows(d_in),
    )
    layout = replace(layout, n_rows=max(layout.n_rows // layout.shard_rows, 1) * layout.shard_rows)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        rows_ND = real_rows(folder, layout.shard_rows, d_in)
        store = linked_store(folder / "acts.zarr", rows_ND, layout, arguments.codec)
        stored = store.manifest["train"]["shards"][0]["files"]["activations"]["bytes"]
        raw = np.memmap(folder / "raw", np.uint16, "w+", shape=rows_ND.shape)
        raw[:] = codec.values.of_floats(rows_ND)
        report(arguments, store, stored, raw)


def report(arguments: argparse.Namespace, store: ActivationStore, stored: int, raw: Bits) -> None:
    """Measure in turns, and print."""
    layout, threads = store._train.layout, arguments.threads
    n_rows = 2 * Order(layout=layout, seed=0).largest_window
    n_chunks = n_rows // layout.chunk_rows
    measured: dict[str, Callable[[], Rate]] = {
        "decode alone": lambda: decode_alone(store, n_chunks, threads),
        "batches of 2048": lambda: batches(store, 2048, threads),
        "decode alone again": lambda: decode_alone(store, n_chunks, threads),
        "batches of 8192": lambda: batches(store, 8192, threads),
        "memmap, 2048": lambda: from_memmap(raw, store, 2048, 50),
        "memmap, 8192": lambda: from_memmap(raw, store, 8192, 15),
        "memcpy": lambda: memcpy_rows(layout.d_in),
    }
    rates: dict[str, list[Rate]] = {name: [] for name in measured}
    for _ in range(arguments.rounds):
        for name, measure in measured.items():
            rates[name].append(measure())
    machine = hardware()
    versions = {
        name: importlib.metadata.version(name) for name in ("sae-pipe", "numpy", "numcodecs")
    }
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {machine['processor']}, {threads} threads")
    print(f"versions  {versions}")
    print(f"config    {vars(arguments)}")
    print(
        f"store     {layout.n_rows:,} rows of {layout.d_in}, {layout.n_shards} shards of "
        f"{layout.shard_rows:,}, chunks of {layout.chunk_rows:,}; {store._codec.spelling}, "
        f"{layout.shard_rows * layout.d_in * 2 / stored:.3f} times smaller than raw bfloat16"
    )
    for name, found in rates.items():
        by_clock = sorted(rate.rows_per_s for rate in found)
        rate, cpu = (
            statistics.median(by_clock),
            statistics.median(r.rows_per_cpu_s for r in found),
        )
        print(
            f"{name:19} {rate:12,.0f} rows/s {rate * layout.d_in * 2 / 1e9:6.2f} GB/s "
            f"({by_clock[0]:,.0f} to {by_clock[-1]:,.0f}); a processor second {cpu:10,.0f} rows"
        )
    for size, before in (("2048", "decode alone"), ("8192", "decode alone again")):
        pairs = list(zip(rates[f"batches of {size}"], rates[before], strict=True))
        by_clock = sorted(ours.rows_per_s / alone.rows_per_s for ours, alone in pairs)
        by_cpu = sorted(ours.rows_per_cpu_s / alone.rows_per_cpu_s for ours, alone in pairs)
        mean = statistics.median(ours.rows_per_s for ours, _ in pairs)
        others = ", ".join(
            f"{mean / statistics.median(r.rows_per_s for r in rates[other]):.2f} of {other}"
            for other in (f"memmap, {size}", "memcpy")
        )
        print(
            f"ratio     batches of {size} to decode alone: {statistics.median(by_clock):.3f} by the "
            f"clock ({by_clock[0]:.2f} to {by_clock[-1]:.2f}), {statistics.median(by_cpu):.3f} by "
            f"processor seconds (aim 0.9); {others}"
        )
    resident = memory_over_time(store, 2048, threads)
    print(f"memory    {', '.join(f'{each / 1e6:,.0f}' for each in resident)} MB after each window")
    opened, first = start_up(store.path, 2048)
    total = opened + first
    print(f"start-up  {opened:.3f} s to open, {first:.3f} s to the first batch: {total:.3f} s")


if __name__ == "__main__":
    main()
