"""The long part of a harvest: forward passes fill blocks, threads write them as shards.

While one block is filled the one before is encoded and written, so two blocks are in memory for
each hooked layer. A block whose shards are all committed is skipped: that is all there is to
resuming.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..storage import provenance
from ..storage.layout import Layout
from ..storage.values import Floats, Rows, ValueType
from ..storage.writer import SplitWriter
from .backoff import BatchRunner, find_batch_size
from .block_buffer import BlockBuffer
from .calibration import first_rows
from .forward import HostCopier, fill_block
from .harvest_job import HarvestJob
from .hooks import HookedModel
from .models import load_truncated
from .plan import Rates, measure
from .row_map import BlockRows, RowMap

_SEALING_THREADS = 3


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way through the tokens of a split: the same masked tokens for all layers.

    writers: layer -> the stores that take its rows (several for held-out rows, which do not depend
    on the mask ratio).
    """

    label: str
    rows: RowMap
    layout: Layout
    batch_contexts: int
    values: ValueType
    writers: dict[int, list[SplitWriter]]

    def missing(self, block: int) -> set[int]:
        """Shards of a block that some store has not committed."""
        return {s for s in self.layout.shards_of_block(block) if not self._is_everywhere(s)}

    def _is_everywhere(self, shard: int) -> bool:
        return all(shard in w.committed for writers in self.writers.values() for w in writers)

    def rows_done(self) -> int:
        """Rows of the blocks that need no more work."""
        blocks = range(self.layout.n_blocks)
        return sum(self.n_rows_of(block) for block in blocks if not self.missing(block))

    @property
    def n_rows(self) -> int:
        """Rows to be made, whether they are there yet or not."""
        return max(self.layout.n_rows - self.rows.first_row, 0)

    def n_rows_of(self, block: int) -> int:
        """Those of one block."""
        first, last = self.layout.rows_of_block(block)
        return max(last - max(first, self.rows.first_row), 0)


class BlockPipeline:
    """Fills blocks on the device and writes them behind it."""

    def __init__(
        self,
        model: HookedModel,
        *,
        note_every_s: float,
        tokens_per_s: float,
        advance: Callable[[int], None],
    ) -> None:
        """tokens_per_s: measured; decides whether a block takes so long that it is kept on disk."""
        self._model, self._note_every_s, self._advance = model, note_every_s, advance
        self._tokens_per_s = tokens_per_s
        self._copier = HostCopier(model.device)
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")
        # While one shard is hashed, written and synced, the encoding threads work for the next.
        self._sealing = ThreadPoolExecutor(_SEALING_THREADS, thread_name_prefix="seal")
        self._runners: dict[tuple[tuple[int, ...], int], BatchRunner] = {}
        self._behind: Future[None] | None = None
        self._spare: list[dict[int, Rows]] = []

    def run_all(self, tasks: Sequence[tuple[Pass, int]]) -> None:
        """Fill the blocks in order; what is to be in the next one is worked out meanwhile."""
        plans = [partial(job.rows.block, job.layout, block) for job, block in tasks]
        ahead = self._planning.submit(plans[0]) if plans else None
        for number, (job, block) in enumerate(tasks):
            assert ahead is not None
            rows = ahead.result()
            if number + 1 < len(plans):
                ahead = self._planning.submit(plans[number + 1])
            self._run(job, block, rows)
        self.wait()

    def _run(self, job: Pass, block: int, rows: BlockRows) -> None:
        """Fill one block and hand it over to be written."""
        buffer = self.fill(job, block, rows)
        self.wait()
        self._behind = self._writing.submit(self.write, job, rows, buffer, job.missing(block))

    def fill(self, job: Pass, block: int, rows: BlockRows) -> BlockBuffer:
        """Run the model over a block; its rows, in stored order. One at a time."""
        buffer = self._buffer(job, block, rows)
        fill_block(
            self._runner(job),
            rows,
            buffer,
            batch_contexts=job.batch_contexts,
            copier=self._copier,
            note_every_s=self._note_every_s,
            advance=self._advance,
            values=job.values,
        )
        return buffer

    def _runner(self, job: Pass) -> BatchRunner:
        """One for all blocks: a batch that had to be halved stays halved."""
        layers = tuple(sorted(job.writers))
        key = (layers, job.batch_contexts)
        if key not in self._runners:
            model = replace(self._model, layers=layers)
            self._runners[key] = BatchRunner(model, job.batch_contexts)
        return self._runners[key]

    def _buffer(self, job: Pass, block: int, rows: BlockRows) -> BlockBuffer:
        d_model = self._model.d_model
        tokens = rows.n_contexts * job.rows.table.context_size
        if tokens / self._tokens_per_s > self._note_every_s:
            stores = {layer: writers[0].root for layer, writers in job.writers.items()}
            label = f"{job.label}-{block}"
            return BlockBuffer.on_disk(stores, label, rows.n_rows, d_model, job.values)
        # Memory is taken once and used again: fresh pages cost more than filling them.
        whole = self._spare.pop() if self._spare else {}
        for layer in job.writers:
            if layer not in whole or len(whole[layer]) < rows.n_rows:
                whole[layer] = np.empty((rows.n_rows, d_model), job.values.memory)
        return BlockBuffer.in_memory(whole)

    def write(self, job: Pass, rows: BlockRows, buffer: BlockBuffer, missing: set[int]) -> None:
        """Write the shards of a filled block that are missing, and give its memory back."""
        source_R, masked_R = rows.stored(rows.source_R), rows.stored(rows.masked_R)
        jobs: list[Future[None]] = []
        for layer, writers in job.writers.items():
            for writer in writers:
                for shard in sorted(missing - writer.committed):
                    first, last = job.layout.rows_of_shard(shard)
                    # Of a shard that an extension fills up, the rows before are there.
                    first = max(first, rows.first_row)
                    part = slice(first - rows.first_row, last - rows.first_row)
                    bits = buffer.values[layer][part]
                    shard_of = (shard, bits, source_R[part], masked_R[part])
                    jobs.append(self._sealing.submit(writer.write, *shard_of))
        for sealed in jobs:
            sealed.result()
        if not buffer.is_on_disk:
            self._spare.append(buffer.values)
        buffer.discard()

    def wait(self) -> None:
        """Until the block behind is written; raise what writing it raised."""
        if self._behind is not None:
            behind, self._behind = self._behind, None
            behind.result()

    def close(self) -> None:
        """End the threads."""
        self._copier.close()
        for pool in (self._planning, self._writing, self._sealing):
            pool.shutdown(wait=True)


def blocks_to_do(passes: list[Pass]) -> list[tuple[Pass, int]]:
    """Blocks with missing shards, all passes together so that their stores grow alike."""
    blocks = range(max((job.layout.n_blocks for job in passes), default=0))
    return [
        (job, block)
        for block in blocks
        for job in passes
        if block < job.layout.n_blocks and job.missing(block)
    ]


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine that blocks are made on; name: for messages; workers: processes there."""

    name: str
    memory_bytes: int
    workers: int


class Crew(Protocol):
    """Who runs the model: this process, or workers (`harvest_workers.ManyWorkers`).

    keeps_notes: whether a block that takes long is kept in a file, to go on with after a crash.
    """

    keeps_notes: bool

    def batch_contexts(self, context_size: int) -> int:
        """Contexts a forward pass that suit the device."""

    def rates(self, sample_BT: NDArray[np.uint32]) -> Rates:
        """How fast one process runs these contexts, and how well their rows compress."""

    def first_rows(
        self, rows: RowMap, layers: tuple[int, ...], batch_contexts: int, values: ValueType
    ) -> dict[int, Floats]:
        """The first rows of a split, by layer: see `calibration.first_rows`."""

    def hosts(self) -> list[Host]:
        """Where the processes are."""

    def about(self) -> dict[str, Any]:
        """Device and processes, for the manifest."""

    def run(self, passes: list[Pass], tokens_per_s: float, bar: Any) -> None:
        """Make and write every block of the passes that has missing shards."""


class OneProcess:
    """This process does everything."""

    keeps_notes = True

    def __init__(self, job: HarvestJob, layers: tuple[int, ...]) -> None:
        self._config = job.config
        self._model = load_truncated(job.info, layers, job.config.hook, job.device, job.dtype)

    def batch_contexts(self, context_size: int) -> int:
        return find_batch_size(self._model, context_size)

    def rates(self, sample_BT: NDArray[np.uint32]) -> Rates:
        return measure(self._model, sample_BT, self._config)

    def first_rows(
        self, rows: RowMap, layers: tuple[int, ...], batch_contexts: int, values: ValueType
    ) -> dict[int, Floats]:
        return first_rows(self._model, rows, layers, batch_contexts, values)

    def hosts(self) -> list[Host]:
        return [Host(name="this machine", memory_bytes=provenance.memory_bytes(), workers=1)]

    def about(self) -> dict[str, Any]:
        return {"device": device_name(self._model.device)}

    def run(self, passes: list[Pass], tokens_per_s: float, bar: Any) -> None:
        run_passes(
            self._model,
            passes,
            note_every_s=self._config.note_every_s,
            tokens_per_s=tokens_per_s,
            bar=bar,
        )


def device_name(device: torch.device) -> str:
    """A device with the name of the GPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def run_passes(
    model: HookedModel,
    passes: list[Pass],
    *,
    note_every_s: float,
    tokens_per_s: float,
    bar: Any,
) -> None:
    """Run every pass, block by block."""
    pipeline = BlockPipeline(
        model, note_every_s=note_every_s, tokens_per_s=tokens_per_s, advance=bar.update
    )
    try:
        pipeline.run_all(blocks_to_do(passes))
    finally:
        pipeline.close()


def encode_threads() -> int:
    """Threads that encode chunks: blosc lets the interpreter go, so all cores can."""
    return os.cpu_count() or 1
