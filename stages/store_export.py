"""Rows of a store as files that other tools open: in stored order, with their sources.

# R rows of a chunk, D d_in

An export is a folder, which appears whole, by one rename. Chunks are decoded in threads and written
in their order, so that memory does not grow with the store.
"""

import os
import re
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..storage import open_store, provenance
from ..storage.address import Place
from ..storage.bar import OpenBar, no_bar
from ..storage.disk import check_room, human_bytes
from ..storage.errors import InputError
from ..storage.files import disk_error, fsync_folder, json_digest, write_json
from ..storage.lock import sole_writer
from ..storage.rows import SplitReader
from ..storage.store import ActivationStore
from ..storage.values import VALUE_TYPES, Rows, ValueType
from .exporting import EXPORTERS, Exporter

SPLITS = ("train", "heldout")
NOTES = "export.json"
_HEADER_BYTES = 1 << 20  # headers and notes, generously

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """One export. dtype: None for the store's where nothing is lost by it, else float32; rows: A:B,
    None for all."""

    store: Place
    out: Path
    format: str
    split: str = "train"
    dtype: str | None = None
    rows: str | None = None

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--format", self.format, tuple(EXPORTERS)),
            ("--split", self.split, SPLITS),
            ("--dtype", self.dtype, (*VALUE_TYPES, None)),
        ):
            if value not in known:
                names = ", ".join(name for name in known if name is not None)
                raise InputError(f"{flag} is {value!r}, and has to be one of {names}.")
        if self.dtype is not None and self.dtype not in self.exporter.number_formats:
            raise InputError(
                f"{self.exporter.missing[self.dtype]}, so --format {self.format} cannot be written "
                f"in it. Pass --dtype {' or '.join(self.exporter.number_formats)}, or --format "
                "safetensors."
            )

    @property
    def exporter(self) -> type[Exporter]:
        return EXPORTERS[self.format]


def export_rows(config: ExportConfig, *, say: Say = print, open_bar: OpenBar = no_bar) -> Path:
    """Write the export that `config` asks for; returns its folder.

    Raises InputError for an --out that exists, rows that are not there, or values that the number
    format cannot hold; DiskError before anything is written when the disk is too small; StoreError
    for a damaged store. After a kill the same command begins again.
    """
    out = config.out
    if out.exists():
        raise InputError(f"{out} exists. Pass another place for the export, or remove it.")
    if isinstance(config.store, Path) and config.store.resolve() in out.resolve().parents:
        raise InputError(
            f"{out} would stand inside {config.store}, which is left alone. Pass another place for "
            "the export."
        )
    store = open_store(config.store)
    reader = store._train if config.split == "train" else store.heldout._reader
    first, last = _range(config, reader)
    values = VALUE_TYPES[config.dtype or _default_dtype(store, config.exporter)]
    n_bytes = (last - first) * (store.d_in * values.bytes + 8) + _HEADER_BYTES
    check_room(out, n_bytes)
    # Its lock is what tells a killed export from one that is running.
    unfinished = out.with_name(f".{out.name}.exporting")
    with sole_writer(unfinished, "Export"):
        try:
            for left in unfinished.iterdir():
                if left.name != ".lock":
                    left.unlink()
            with open_bar(last - first, 0) as bar:
                job = _Export(reader, first, last, values, config.store)
                job.write(config, unfinished, _short_notes(store, config, first, last), bar.update)
            write_json(unfinished / NOTES, _notes(store, config, first, last, values, unfinished))
            (unfinished / ".lock").unlink()
            os.rename(unfinished, out)
            fsync_folder(out.parent)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise disk_error(error, out) from error
            raise
    say(
        f"{out} is complete: {last - first:,} rows of {store.d_in} values in {values.name}, "
        f"{human_bytes(n_bytes - _HEADER_BYTES)}."
    )
    return out


def _range(config: ExportConfig, reader: SplitReader) -> tuple[int, int]:
    """First and one-past-last row."""
    first, last = 0, reader.n_rows
    if config.rows is not None:
        found = re.fullmatch(r"(\d{0,15}):(\d{0,15})", config.rows, re.ASCII)
        if found is None:
            raise InputError(
                f"--rows is {config.rows!r}, and has to be A:B with whole numbers, such as 0:1000."
            )
        first = int(found[1] or 0)
        last = int(found[2]) if found[2] else reader.n_rows
    if not 0 <= first < last <= reader.n_rows:
        raise InputError(
            f"Rows {first} to {last} of the {config.split} rows of {config.store} were asked for, "
            f"and it has {reader.n_rows:,}. Pass --rows A:B with 0 <= A < B <= {reader.n_rows}."
            if reader.n_rows
            else f"Store {config.store} has no {config.split} rows to export. Pass another --split."
        )
    return first, last


def _default_dtype(store: ActivationStore, exporter: type[Exporter]) -> str:
    codec = store._codec
    fits = not codec.is_lossy and codec.values.name in exporter.number_formats
    return codec.values.name if fits else "float32"


# --- rows ---


class _Export:
    """The rows of a range, decoded ahead and written in order."""

    def __init__(
        self, reader: SplitReader, first: int, last: int, values: ValueType, path: Place
    ) -> None:
        """path: of the store, for messages."""
        self._reader, self._first, self._last = reader, first, last
        self._values, self._path = values, path

    def write(
        self,
        config: ExportConfig,
        folder: Path,
        notes: dict[str, str],
        advance: Callable[[int], object],
    ) -> None:
        """All rows into a folder."""
        reader = self._reader
        shape = self._last - self._first, reader.d_in
        writer = config.exporter(folder, shape, self._values.name, notes)
        try:
            self._write_to(writer, advance)
        finally:
            writer.close()
        for file in folder.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    def _write_to(self, writer: Exporter, advance: Callable[[int], object]) -> None:
        layout, step = self._reader.layout, self._reader.layout.chunk_rows
        chunks = iter(range(self._first // step, -(-self._last // step)))
        shard, source_R = -1, np.empty(0, np.int64)
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads, thread_name_prefix="export") as pool:
            ahead: deque[tuple[int, Future[Rows]]] = deque()

            def decode_next() -> None:
                chunk = next(chunks, None)
                if chunk is not None:
                    ahead.append((chunk, pool.submit(self._rows, chunk)))

            for _ in range(2 * threads):
                decode_next()
            try:
                while ahead:
                    chunk, job = ahead.popleft()
                    rows_RD = job.result()
                    decode_next()
                    start = max(chunk * step, self._first)
                    if start // layout.shard_rows != shard:
                        shard = start // layout.shard_rows
                        source_R = self._reader.read_source(slice(*layout.rows_of_shard(shard)))
                    place = start - shard * layout.shard_rows
                    writer.write(rows_RD, source_R[place : place + len(rows_RD)])
                    advance(len(rows_RD))
            finally:
                for _, job in ahead:
                    job.cancel()

    def _rows(self, chunk: int) -> Rows:
        """The rows of one chunk that are in the range, in the export's number format."""
        reader, codec, values = self._reader, self._reader.codec, self._values
        start = chunk * reader.layout.chunk_rows
        n_rows = reader.rows_of_chunk(chunk)
        served = np.empty((n_rows, reader.d_in), codec.served.memory)
        reader.decode_chunk(chunk, served)
        part = slice(max(self._first - start, 0), min(self._last - start, n_rows))
        if codec.served.name == values.name:
            return served[part]
        floats_RD = np.empty(served.shape, np.float32)
        codec.to_floats(served, floats_RD)
        if values.name == "float16" and np.abs(floats_RD[part]).max() > 65504:
            row, column = np.argwhere(np.abs(floats_RD[part]) > 65504)[0]
            raise InputError(
                f"Row {start + part.start + row} of {self._path} holds "
                f"{floats_RD[part][row, column]:g}, and float16 ends at 65504. "
                "Pass --dtype float32."
            )
        return values.of_floats(floats_RD[part])


# --- what is said of them ---


def _short_notes(
    store: ActivationStore, config: ExportConfig, first: int, last: int
) -> dict[str, str]:
    """Strings for the metadata of the file itself."""
    return {
        "digest": store.digest,
        "recipe_digest": json_digest(store.recipe),
        "store": store.name,
        "split": config.split,
        "rows": f"{first}:{last}",
        "order": "stored",
    }


def _notes(
    store: ActivationStore,
    config: ExportConfig,
    first: int,
    last: int,
    values: ValueType,
    folder: Path,
) -> dict[str, Any]:
    """export.json: where the rows come from and what was done to them."""
    encoding = {"codec": store.manifest["codec"], **store.manifest.get("encoding", {})}
    return {
        **_short_notes(store, config, first, last),
        "n_rows": last - first,
        "d_in": store.d_in,
        "dtype": values.name,
        "source": "context * context_size + position, of each row",
        "context_size": store.recipe.get("corpus", {}).get("config", {}).get("context_size"),
        "stored_as": encoding,
        "recipe": store.recipe,
        "files": {
            file.name: {"bytes": file.stat().st_size}
            for file in sorted(folder.iterdir())
            if file.name != ".lock"
        },
        "made": provenance.now(),
        "versions": provenance.versions(),
    }
