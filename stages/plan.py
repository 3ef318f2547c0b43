"""What a harvest will take, said before it begins: rows, bytes, memory, time.

# B contexts of a batch, T positions, R rows, D d_model
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..storage.disk import human_bytes
from ..storage.errors import DiskError
from ..storage.layout import VALUE_BYTES, Layout
from ..storage.values import Rows, ValueType
from .backoff import BatchRunner
from .forward import in_memory
from .harvest_config import HarvestConfig
from .hooks import HookedModel

SOURCE_BYTES = 3.5  # a row's source and mask flag, compressed: measured 3.2 to 3.4
TOKEN_BYTES = 2.3  # a token of the finished corpus with its document, compressed
WORK_TOKEN_BYTES = 8  # while the corpus is built: two flat uint32 files
_SAMPLE_ROWS = 8192
_WARM_UP_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured on the first contexts of the text: forward tokens/s; stored bytes a value."""

    tokens_per_s: float
    bytes_per_value: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One harvest in numbers. All bytes are of all stores together.

    rows: training rows to be made; rows_before: those that are there, of stores that are extended.
    """

    n_stores: int
    n_passes: int
    n_workers: int  # processes that share the work
    rows: int
    heldout_rows: int
    d_in: int
    context_size: int
    layout: Layout
    rates: Rates
    memory_bytes: int
    work_bytes: int
    free_bytes: int
    folder: Path
    rows_before: int = 0

    @property
    def raw_bytes(self) -> int:
        """bfloat16 rows, uncompressed."""
        return (self.rows + self.heldout_rows) * self.d_in * VALUE_BYTES * self.n_stores

    @property
    def bytes_per_row(self) -> float:
        """Expected on disk for one more row in every store, its token included."""
        in_store = self.d_in * self.rates.bytes_per_value + SOURCE_BYTES
        return in_store * self.n_stores + TOKEN_BYTES + WORK_TOKEN_BYTES

    @property
    def stored_bytes(self) -> int:
        """Expected on disk when it is done."""
        rows = self.rows + self.heldout_rows
        return int(rows * (self.bytes_per_row - WORK_TOKEN_BYTES))

    @property
    def peak_bytes(self) -> int:
        """Expected on disk at most, files that go away again included."""
        corpus_work = (self.rows + self.heldout_rows) * WORK_TOKEN_BYTES
        return self.stored_bytes + max(corpus_work, self.work_bytes)

    @property
    def seconds(self) -> float:
        """Expected time of the forward passes, which everything else overlaps with."""
        tokens = self.rows * self.n_passes + self.heldout_rows
        return tokens * self.context_size / (self.context_size - 1) / self._tokens_per_s

    @property
    def _tokens_per_s(self) -> float:
        """Of all workers together: less than n_workers times one where they share a host's cores."""
        return self.rates.tokens_per_s * self.n_workers

    def lines(self) -> list[str]:
        """The plan as it is printed."""
        shards = self.layout.n_shards
        n_blocks = self.layout.n_blocks - self.rows_before // self.layout.block_rows
        workers, blocks = self.n_workers, n_blocks * self.n_passes
        by_workers = f" in {workers} workers" if workers > 1 else ""
        few = (
            f"work      {_count(blocks, 'block')} for {workers} workers: some have nothing to do; a "
            "smaller --block-gb makes more blocks"
        )
        rows = f"{self.rows:,} training and {self.heldout_rows:,} held-out rows"
        if self.rows_before:
            rows = f"{self.rows:,} training rows behind the {self.rows_before:,} that are there,"
        return [
            (
                f"rows      {rows} of {self.d_in} values in {_count(self.n_stores, 'store')}, "
                f"{_count(shards, 'shard')} of {self.layout.shard_rows:,} rows each"
            ),
            (
                f"disk      {human_bytes(self.raw_bytes)} as raw bfloat16, about "
                f"{human_bytes(self.stored_bytes)} stored ({human_bytes(self.peak_bytes)} at most "
                f"while running); {human_bytes(self.free_bytes)} free at {self.folder}"
            ),
            (
                f"memory    {human_bytes(self.memory_bytes)} for blocks of "
                f"{self.layout.block_rows:,} rows, beside the model"
            ),
            (
                f"time      about {human_time(self.seconds)} at {self._tokens_per_s:,.0f} "
                f"tokens/s{by_workers}, {_count(self.n_passes, 'forward pass', 'es')} over the text"
            ),
            *([few] if blocks < workers else []),
        ]

    def check_disk(self) -> None:
        """DiskError, with the flags that would make it fit, when the disk is too small."""
        if self.peak_bytes <= self.free_bytes:
            return
        room = self.free_bytes * 0.95 - self.heldout_rows * self.bytes_per_row
        fitting = int(max(room, 0) / self.bytes_per_row)
        fitting -= fitting % (1000 if fitting > 10_000 else 1)
        fitting += self.rows_before if fitting else 0
        fewer = "" if self.n_stores == 1 else ", fewer --layer or --mask-p"
        smaller = f"--tokens {fitting}{fewer}, or " if fitting else ""
        needs = "needs" if self.n_stores == 1 else "need"
        raise DiskError(
            f"The disk is too small: {_count(self.n_stores, 'store')} of {self.rows_before + self.rows:,} rows {needs} "
            f"about {human_bytes(self.peak_bytes)}{' more' if self.rows_before else ''}, and {human_bytes(self.free_bytes)} are free at "
            f"{self.folder}. Pass {smaller}--out on a larger disk."
        )


def measure(model: HookedModel, sample_BT: NDArray[np.integer], config: HarvestConfig) -> Rates:
    """Run a batch of real contexts a few times, and compress its rows."""
    tokens_BT = torch.from_numpy(sample_BT.astype(np.int64))
    runner = BatchRunner(model, len(tokens_BT))
    rows_RD = _run(runner, tokens_BT, config.stored_as.values)  # warms up; its time does not count
    begun, done = time.perf_counter(), 0
    while done == 0 or (time.perf_counter() - begun < _WARM_UP_S and done < 50):
        _run(runner, tokens_BT, config.stored_as.values)
        done += 1
    seconds = time.perf_counter() - begun
    values_RD = np.empty(rows_RD.shape, np.float32)
    config.stored_as.values.to_floats(rows_RD, values_RD)
    stored = sum(map(len, config.stored_as.calibrated(values_RD).encode(values_RD)))
    return Rates(
        tokens_per_s=tokens_BT.numel() * done / seconds,
        bytes_per_value=stored / values_RD.size,
    )


def _run(runner: BatchRunner, tokens_BT: torch.Tensor, values: ValueType) -> Rows:
    """One pass; a few of its rows on the host, which also waits for the device."""
    rows_RD = torch.empty(0)
    for _, activations in runner.run(tokens_BT):
        layer = next(iter(activations.values()))
        rows_RD = layer[:, 1:].reshape(-1, layer.shape[-1])[:_SAMPLE_ROWS]
    return in_memory(rows_RD.to(getattr(torch, values.name)).cpu(), values)


def human_time(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{'' if n == 1 else plural}"
