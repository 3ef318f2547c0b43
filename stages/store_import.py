"""Activations that exist already, into a store: shuffled, checked and committed as a harvest does.

# R rows, D d_in

Blocks of the permuted order are filled from the input, slice by slice in threads, while the block
before is written. A block whose shards are all committed is skipped: that is all there is to
resuming. The input is never in memory as a whole.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..storage import ActivationStore, open_store, provenance
from ..storage.bar import OpenBar, no_bar
from ..storage.builder import StoreBuilder, is_begun
from ..storage.codecs import Codec, get_codec
from ..storage.disk import check_room, human_bytes
from ..storage.errors import InputError
from ..storage.files import remove_leftovers
from ..storage.layout import Layout, choose_layout
from ..storage.lock import sole_writer
from ..storage.manifest import COMPLETE, TOKENISING
from ..storage.recode import CALIBRATION_ROWS, is_free
from ..storage.shuffle import HARVEST_ROWS, measure_shuffle, verdict
from ..storage.values import Floats
from .harvest_config import DEFAULT_BLOCK_BYTES, MAX_HELDOUT_TOKENS, check_same
from .importing import RowInput, open_input
from .importing.blocks import BlockWriter, RowReader
from .importing.order import InputOrder

_MEMORY_SHARE = 0.7  # of the machine's memory, for blocks
_SOURCE_BYTES = 10  # a row's source and mask flag, at most
# Measuring the shuffle takes 40 bytes a context, and of single rows it would say little.
_MEASURED_CONTEXTS = 1 << 24

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """One import.

    member: what --tensor, --column or --array names, by the flag; context_size: of rows that stand
    by themselves, how many neighbours are one context (None: 1); heldout_rows: None for a million
    or 1 %, the smaller; model, layer, hook, note: what the user knows of where the rows come from.
    """

    source: Path
    out: Path
    members: dict[str, str | None]
    context_size: int | None = None
    heldout_rows: int | None = None
    codec: str = "lossless"
    store_dtype: str = "bfloat16"
    seed: int = 0
    block_bytes: int = DEFAULT_BLOCK_BYTES
    shard_rows: int | None = None
    model: str | None = None
    layer: int | None = None
    hook: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        get_codec(self.codec, self.store_dtype)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed is {self.seed}, and has to be from 0 to 2**63 - 1.")
        for flag, value, least in (
            ("--context-size", self.context_size, 1),
            ("--heldout-rows", self.heldout_rows, 0),
            ("--block-gb", self.block_bytes, 1),
            ("--shard-rows", self.shard_rows, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{flag} is {value}, and has to be at least {least}.")


def import_rows(
    config: ImportConfig, *, say: Say = print, open_bar: OpenBar = no_bar
) -> ActivationStore:
    """Make the store that `config` asks for, or go on with it.

    Raises InputError for an input that cannot be read or holds NaN or Inf, and for an --out that is
    something else; DiskError before anything is written when the disk is too small.
    """
    job = _Import.of(config)
    out = config.out
    if is_begun(out):
        job.check_same(StoreBuilder.resume(out))
        if StoreBuilder.resume(out).state == COMPLETE:
            store = open_store(out)  # a shard that has gone is found here
            say(f"{out} is complete: {store.n_rows:,} rows of this input. Nothing to do.")
            return store
    elif out.exists() and not is_free(out):
        raise InputError(
            f"{out} exists and is not an activation store. Pass another --out, or move it away."
        )
    with sole_writer(out, "Store"):
        remove_leftovers(out, deep=is_begun(out))
        builder = job.begin(say)
        job.run(builder, open_bar)
    store = open_store(out)
    if "shuffle" in store.manifest:
        say(f"order     {verdict(store.manifest['shuffle'])}")
    say(f"{out} is complete: {store.n_rows:,} training and {store.heldout.n_rows:,} held-out rows.")
    return store


@dataclass(frozen=True)
class _Import:
    """One import with everything looked at; codec: before calibration."""

    config: ImportConfig
    input: RowInput
    codec: Codec
    context_size: int
    heldout_rows: int
    order: InputOrder

    @classmethod
    def of(cls, config: ImportConfig) -> "_Import":
        found = open_input(config.source, config.members)
        if found.context_size is not None and config.context_size not in (None, found.context_size):
            raise InputError(
                f"--context-size is {config.context_size}, and {found.name} has contexts of "
                f"{found.context_size}. Leave it out."
            )
        context_size = found.context_size or config.context_size or 1
        codec = get_codec(config.codec, config.store_dtype)
        heldout_rows = config.heldout_rows
        if heldout_rows is None:
            heldout_rows = min(MAX_HELDOUT_TOKENS, max(found.n_rows // 100, 1))
        order = InputOrder(
            found.n_rows,
            context_size=context_size,
            rows_together=found.rows_together,
            block_rows=config.block_bytes // (found.d_in * codec.values.bytes),
            heldout_rows=heldout_rows,
            seed=config.seed,
        )
        return cls(config, found, codec, context_size, heldout_rows, order)

    @property
    def reader(self) -> RowReader:
        """Rows in the store's number format."""
        return RowReader(self.input, self.codec.values)

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides about the store's rows: this is hashed and compared."""
        config = self.config
        return {
            "imported": self.input.identity(),
            "model": None if config.model is None else {"name": config.model, "revision": None},
            "hook": config.hook,
            "layer": config.layer,
            "heldout_rows": self.heldout_rows,
            "corpus": {"config": {"context_size": self.context_size}},
            "seed": config.seed,
            "codec": self.codec.spelling,
            "store_dtype": config.store_dtype,
        }

    def layouts(self) -> tuple[Layout, Layout]:
        """Of the training and the held-out rows."""
        sizes: dict[str, Any] = {
            "d_in": self.input.d_in,
            "value_bytes": self.codec.values.bytes,
            "chunk_rows": self.codec.chunk_rows(self.input.d_in),
        }
        return (
            choose_layout(
                n_rows=self.order.n_train,
                block_bytes=self.config.block_bytes,
                shard_rows=self.config.shard_rows,
                **sizes,
            ),
            choose_layout(n_rows=self.order.n_heldout, block_bytes=0, **sizes),
        )

    def check_same(self, builder: StoreBuilder) -> None:
        """InputError unless the store was begun with the same input and flags."""
        begun = builder.manifest.get("recipe", {})
        if "imported" not in begun:
            raise InputError(
                f"{self.config.out} was not made by an import. Pass another --out, or move it away."
            )
        check_same(self.config.out, begun, self.recipe)
        if builder.state != TOKENISING:
            there = [vars(layout) for layout in builder.layouts()]
            here = [vars(layout) for layout in self.layouts()]
            for old, new in zip(there, here, strict=True):
                check_same(self.config.out, old, new)

    # --- begun ---

    def begin(self, say: Say) -> StoreBuilder:
        """The store, begun and laid out."""
        out, config = self.config.out, self.config
        if is_begun(out):  # as it is now that nobody else writes
            builder = StoreBuilder.resume(out)
            self.check_same(builder)
            if builder.state != TOKENISING:
                say(f"{out} goes on.")
                return self._noted(builder)
        train, heldout = self.layouts()
        self._check_memory(train)
        sample_RD = self._sample()
        self._check_disk(sample_RD, train, say)
        origin = {"path": str(config.source.resolve()), "note": config.note}
        builder = StoreBuilder.begin(
            out,
            None,
            self.recipe,
            self.codec.spelling,
            self.codec.values.name,
            {"imported": origin},
        )
        builder.lay_out(train, heldout, {}, sample_RD, has_corpus=False)
        return self._noted(builder)

    def _noted(self, builder: StoreBuilder) -> StoreBuilder:
        run = {"started": provenance.now(), "hardware": provenance.hardware(), "device": "cpu"}
        builder.record_run(run | {"versions": provenance.versions()})
        return builder

    def _check_memory(self, train: Layout) -> None:
        needed = 2 * train.block_rows * train.d_in * self.codec.values.bytes
        room = provenance.memory_bytes() * _MEMORY_SHARE
        if needed > room:
            raise InputError(
                f"Two blocks need {human_bytes(needed)} of memory, and this machine has "
                f"{human_bytes(provenance.memory_bytes())}. Pass --block-gb {room / 2e9:.2g} or "
                "less."
            )

    def _sample(self) -> Floats:
        """The first rows in permuted order, as they will be stored: (R, D)."""
        rows_R = self.order.first_rows(CALIBRATION_ROWS)
        sample_RD = np.empty((len(rows_R), self.input.d_in), np.float32)
        for part in self.reader.slices(rows_R):
            values = self.reader.read(rows_R[part])
            self.codec.values.to_floats(values, sample_RD[part])
        return sample_RD

    def _check_disk(self, sample_RD: Floats, train: Layout, say: Say) -> None:
        codec = self.codec.calibrated(sample_RD)
        some_RD = np.resize(sample_RD, (train.chunk_rows, train.d_in))
        a_value = sum(map(len, codec.encode(some_RD))) / some_RD.size
        n_rows = self.input.n_rows
        needed = int(n_rows * (train.d_in * a_value + _SOURCE_BYTES))
        say(
            f"input     {n_rows:,} rows of {train.d_in} values ({self.input.number_format}), "
            f"{self.order.n_heldout:,} of them held out, in contexts of {self.context_size}"
        )
        say(
            f"disk      about {human_bytes(needed)} stored; blocks of {train.block_rows:,} rows, "
            f"shards of {train.shard_rows:,}"
        )
        check_room(self.config.out, needed)

    # --- filled ---

    def run(self, builder: StoreBuilder, open_bar: OpenBar) -> None:
        """Write the shards that are missing, and declare the store complete."""
        with (
            ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="import") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="write") as behind,
        ):
            train, heldout = builder.writers(pool)
            done = sum(
                last - first
                for writer in (train, heldout)
                for first, last in map(writer.layout.rows_of_shard, writer.committed)
            )
            with open_bar(self.input.n_rows, done) as bar:
                tasks = BlockWriter(self.reader, pool, behind, bar.update)
                for writer, block_of in (
                    (heldout, self.order.heldout_block),
                    (train, self.order.train_block),
                ):
                    for block in range(writer.layout.n_blocks):
                        missing = set(writer.layout.shards_of_block(block)) - writer.committed
                        if missing:
                            tasks.run(writer, block, block_of(writer.layout, block), missing)
                tasks.wait()
            contexts = -(-self.input.n_rows // self.context_size)
            if contexts <= _MEASURED_CONTEXTS:
                builder.finish(
                    train, heldout, lambda store: measure_shuffle(store, max_rows=HARVEST_ROWS)
                )
            else:
                builder.finish(train, heldout)
