"""Reading the rows of one split: shards on disk to rows in memory.

# R rows, D d_in

Chunks are read with pread and decoded here, not by zarr-python, because decoding several chunks in
threads into reused buffers is what makes the reader as fast as the codec (docs/architecture.md).
Every chunk's crc32c is checked; a damaged one is an error that names the shard.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .codecs.blosc import PLAIN
from .errors import InputError, SaePipeError, StoreError
from .files import plain_size
from .layout import Layout
from .manifest import Manifest
from .shard import checked_frame, index_bytes, packed_limit, parse_index
from .switched import larger_record, manifest_now, records_of
from .values import Floats, Rows

_OPEN_FILES = 256
MOST_FRAMES = 1 << 20  # of a shard: its index is 16 MB then

# A slice, row numbers, or one boolean for each row.
RowIndex = slice | NDArray[np.integer[Any]] | NDArray[np.bool_] | list[int]


class SplitReader:
    """Rows of one split. Safe to use from several threads."""

    def __init__(
        self,
        root: Path,
        split: str,
        layout: Layout,
        shards: list[dict[str, Any]],
        codec: Codec,
    ) -> None:
        """root: the store; split: "" or "heldout"; shards: the manifest's records, in order."""
        self.layout, self.codec = layout, codec
        self.n_rows, self.d_in = layout.n_rows, layout.d_in
        self._columns = codec.columns(layout.d_in)
        self._frames_a_chunk = layout.d_in // self._columns
        self._check_bounds()
        self._root, self._folder = root, root / split if split else root
        self._shards = shards
        self._files: OrderedDict[int, int] = OrderedDict()
        self._replaced_files: list[int] = []  # open still: a thread may be reading one
        # Plain descriptors close nothing themselves.
        weakref.finalize(self, _close_all, self._files, self._replaced_files)
        self._indices: dict[int, NDArray[np.uint64]] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def _check_bounds(self) -> None:
        """ValueError for sizes that ask for more memory than any store that is written."""
        frames = self.layout.chunks_per_shard * self._frames_a_chunk
        if frames > MOST_FRAMES:
            raise ValueError(
                f"a shard of {frames:,} frames, and none that is written has more than "
                f"{MOST_FRAMES:,}"
            )
        chunk_bytes = self.layout.chunk_rows * self._columns * self.codec.stored.itemsize
        self._most_frame_bytes = packed_limit(chunk_bytes)

    # --- rows ---

    def read(self, rows: RowIndex) -> Floats:
        """Rows as float32 (R, D), in the order asked for.

        rows: a slice or whole numbers in [0, n_rows). Raises InputError for rows outside the store
        and StoreError for a damaged shard.
        """
        wanted = self._wanted(rows)
        out = np.empty((len(wanted), self.d_in), np.float32)
        served = np.empty((self.layout.chunk_rows, self.d_in), self.codec.served.memory)
        values = np.empty(served.shape, np.float32)
        chunks = wanted // self.layout.chunk_rows
        order = np.argsort(chunks, kind="stable")
        borders = np.flatnonzero(np.diff(chunks[order])) + 1
        for places in np.split(order, borders):
            if len(places) == 0:
                continue
            chunk = int(chunks[places[0]])
            count = self.rows_of_chunk(chunk)
            self.decode_chunk(chunk, served[:count])
            self.codec.to_floats(served[:count], values[:count])
            out[places] = values[wanted[places] - chunk * self.layout.chunk_rows]
        return out

    def read_source(self, rows: RowIndex) -> NDArray[np.int64]:
        """context * context_size + position of each row, int64 (R,)."""
        return self._read_plain("source", rows, np.dtype("<i8")).astype(np.int64)

    def read_masked(self, rows: RowIndex) -> NDArray[np.bool_]:
        """Whether each row's token was replaced by the mask token, bool (R,)."""
        return self._read_plain("masked", rows, np.dtype("u1")).astype(np.bool_)

    def _wanted(self, rows: RowIndex) -> NDArray[np.int64]:
        if isinstance(rows, slice):
            return np.arange(*rows.indices(self.n_rows), dtype=np.int64)
        given = np.asarray(rows)
        if given.dtype == np.bool_ and given.shape == (self.n_rows,):
            return np.flatnonzero(given)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise InputError(
                f"Rows are a slice, a list of whole numbers, or {self.n_rows} booleans; found "
                f"{given.dtype} of shape {given.shape}."
            )
        wanted = given.astype(np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.n_rows):
            raise InputError(
                f"Rows {wanted.min()} to {wanted.max()} were asked for, and the store has rows "
                f"0 to {self.n_rows - 1}."
            )
        return wanted

    # --- chunks ---

    @property
    def n_chunks(self) -> int:
        """Chunks that hold rows; numbered through the store."""
        return -(-self.n_rows // self.layout.chunk_rows)

    def rows_of_chunk(self, chunk: int) -> int:
        """Rows of a chunk: chunk_rows, fewer in the last one."""
        return min(self.layout.chunk_rows, self.n_rows - chunk * self.layout.chunk_rows)

    def decode_chunk(self, chunk: int, out_RD: Rows) -> None:
        """Decode one chunk into out_RD (R, D), in the memory type that the codec serves."""
        shard, inner = divmod(chunk, self.layout.chunks_per_shard)
        first = inner * self._frames_a_chunk
        stored, known = self._stored_buffer(), self._record(shard)
        try:
            index = self._index(shard)
            for frame in range(self._frames_a_chunk):
                data = self._frame(shard, index[first + frame])
                self.codec.decode(checked_frame(memoryview(data)), stored)
                columns = slice(frame * self._columns, (frame + 1) * self._columns)
                self.codec.serve(stored[: len(out_RD)], out_RD[:, columns])
        except SaePipeError:
            raise  # some are OSErrors too: of a file that could not be fetched
        except (ValueError, OSError) as error:
            if not self._goes_on_in_larger(shard, known):
                raise self._damaged(shard, error) from error
            self.decode_chunk(chunk, out_RD)

    def chunk_frames(self, chunk: int) -> list[bytes]:
        """The frames of a chunk as they stand in its shard, each with its checksum behind it."""
        shard, inner = divmod(chunk, self.layout.chunks_per_shard)
        first = inner * self._frames_a_chunk
        try:
            index = self._index(shard)[first : first + self._frames_a_chunk]
            frames = [self._frame(shard, entry) for entry in index]
            for frame in frames:
                checked_frame(memoryview(frame))
        except (ValueError, OSError) as error:
            raise self._damaged(shard, error) from error
        return frames

    def _frame(self, shard: int, entry: NDArray[np.uint64]) -> bytes:
        offset, length = (int(value) for value in entry)
        if length > self._most_frame_bytes:
            raise ValueError(f"a chunk of {length:,} bytes, more than one can have")
        data = os.pread(self._file(shard), length, offset)
        if len(data) != length:
            raise ValueError("it is shorter than its index says")
        return data

    def _stored_buffer(self) -> Rows:
        """This thread's memory for one decoded frame."""
        buffer: Rows | None = getattr(self._scratch, "stored", None)
        if buffer is None:
            buffer = np.empty((self.layout.chunk_rows, self._columns), self.codec.stored)
            self._scratch.stored = buffer
        return buffer

    def _index(self, shard: int) -> NDArray[np.uint64]:
        index = self._indices.get(shard)
        if index is None:
            record = self._record(shard)
            assert record is not None
            first, last = self.layout.rows_of_shard(shard)
            frames = -(-(last - first) // self.layout.chunk_rows) * self._frames_a_chunk
            file, size = self._file(shard), int(record["files"]["activations"]["bytes"])
            length = index_bytes(self.layout.chunks_per_shard * self._frames_a_chunk)
            if length > size:
                raise ValueError("it is smaller than the index of its chunks")
            tail = os.pread(file, length, size - length)
            if len(tail) != length:
                raise ValueError("it is truncated")
            index = parse_index(tail, frames, size)
            with self._lock:
                if self._record(shard) is record:  # and not that of a larger file by now
                    self._indices[shard] = index
        return index

    def _record(self, shard: int) -> dict[str, Any] | None:
        """What is recorded of a shard's files, as far as it is known yet."""
        return self._shards[shard] if shard < len(self._shards) else None

    def _file(self, shard: int) -> int:
        while True:
            with self._lock:
                record, file = self._record(shard), self._files.get(shard)
                if file is not None:
                    self._files.move_to_end(shard)
                    return file
            opened = self._open(shard)
            with self._lock:
                if self._record(shard) is not record:  # it may be the file before
                    os.close(opened)
                    continue
                file = self._files.setdefault(shard, opened)
                if file != opened:  # another thread was faster
                    os.close(opened)
                elif len(self._files) > _OPEN_FILES:
                    # Only ever the least recently used of many: no thread can still be reading it.
                    os.close(self._files.popitem(last=False)[1])
                return file

    def _open(self, shard: int) -> int:
        return os.open(self.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)

    # --- files ---

    def shard_path(self, shard: int, array: str = "activations") -> Path:
        """The file of one shard of one array."""
        if array == "activations":
            return self._folder / array / "c" / str(shard) / "0"
        return self._folder / array / "c" / str(shard)

    def check_files(self) -> None:
        """StoreError unless every shard file is there with its recorded size."""
        for shard, record in enumerate(self._shards):
            self.check_shard(shard, record)

    def check_shard(self, shard: int, record: dict[str, Any]) -> None:
        """StoreError unless the files of one shard are there with their recorded sizes."""
        for array, entry in record["files"].items():
            path = self.shard_path(shard, array)
            try:
                size = plain_size(self._root, path.relative_to(self._root).as_posix())
            except SaePipeError:
                raise  # of something that is no file
            except OSError as error:
                raise self._damaged(shard, ValueError("it is missing"), array) from error
            if size != entry["bytes"]:
                found = ValueError(f"it has {size:,} bytes instead of {entry['bytes']:,}")
                raise self._damaged(shard, found, array)

    def files(self) -> Iterator[tuple[int, Path, str]]:
        """Shard number, path and recorded SHA-256 of every file."""
        for shard, record in enumerate(self._shards):
            for array, entry in record["files"].items():
                yield shard, self.shard_path(shard, array), entry["sha256"]

    def _damaged(self, shard: int, error: Exception, array: str = "activations") -> StoreError:
        if self._is_replaced(shard):
            return StoreError(
                f"Store {self._root} was extended or repaired since it was opened, and shard {shard} is "
                "another file now. Open it again."
            )
        path = self.shard_path(shard, array).relative_to(self._root)
        reason = error.strerror if isinstance(error, OSError) else error
        return StoreError(
            f"Shard {shard} of {self._root} is damaged: {path}: {reason}. "
            f"Run `sae-pipe store repair {self._root}`: it makes damaged files again and touches "
            "nothing else."
        )

    def _goes_on_in_larger(self, shard: int, known: dict[str, Any] | None) -> bool:
        """Whether reading can be tried again: in the larger file of a shard that was filled up by an
        extension since the store was opened.

        Its rows stand where they stood (`storage/extension.py`). known: the record when reading was
        tried; if there is another one by now, another thread was faster. All that was read by it,
        index and descriptor, goes with it.
        """
        with self._lock:
            if self._record(shard) is not known:
                return True
        larger = self._larger(shard, known) if known is not None else None
        if larger is None:
            return False
        with self._lock:
            if self._record(shard) is known:
                self._take_record(shard, larger)
                self._indices.pop(shard, None)
                file = self._files.pop(shard, None)
                if file is not None:
                    self._replaced_files.append(file)
        return True

    def _larger(self, shard: int, known: dict[str, Any]) -> dict[str, Any] | None:
        """The record of the larger file that is in a shard's place by now, if there is one."""
        manifest = manifest_now(self._root)
        there = records_of(manifest, self._split)
        if manifest is None or there is None or shard != self.layout.n_shards - 1:
            return None
        if len(there) <= shard or not self._is_same_store(manifest, shard):
            return None
        name = self.shard_path(shard).relative_to(self._root).as_posix()
        return larger_record(known, there[shard], self._root, name)

    def _is_same_store(self, manifest: Manifest, shard: int) -> bool:
        """Whether a manifest is of the store that was opened, extended: told by the shards before."""
        there = records_of(manifest, self._split)
        return 0 < shard and there is not None and there[:shard] == self._shards[:shard]

    def _take_record(self, shard: int, record: dict[str, Any]) -> None:
        self._shards = [*self._shards[:shard], record]

    def _is_replaced(self, shard: int) -> bool:
        """Whether the manifest on disk records another file than the one that this reader has."""
        there, known = records_of(manifest_now(self._root), self._split), self._record(shard)
        if there is None or known is None:
            return False
        try:
            return len(there) <= shard or bool(there[shard]["files"] != known["files"])
        except (KeyError, TypeError):
            return False

    @property
    def _split(self) -> str:
        return "train" if self._folder == self._root else self._folder.name

    def _read_plain(self, array: str, rows: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
        wanted = self._wanted(rows)
        out = np.empty(len(wanted), dtype)
        shards = wanted // self.layout.shard_rows
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            values = self._plain_shard(array, int(shard), dtype)
            out[places] = values[wanted[places] - int(shard) * self.layout.shard_rows]
        return out

    def _plain_shard(self, array: str, shard: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        try:
            file = self.shard_path(shard, array)
            limit = packed_limit(self.layout.shard_rows * dtype.itemsize)
            if file.stat().st_size > limit:
                raise ValueError(f"it has more than the {limit:,} bytes that it can have")
            frame = checked_frame(memoryview(file.read_bytes()))
            # Before memory is taken: a manifest may name any size.
            PLAIN.check_size(frame, self.layout.shard_rows * dtype.itemsize)
            values = np.empty(self.layout.shard_rows, dtype)
            PLAIN.decode(frame, values)
        except SaePipeError:
            raise
        except (ValueError, OSError) as error:
            raise self._damaged(shard, error, array) from error
        return values

    def prepare(self, now: NDArray[np.int64], later: NDArray[np.int64]) -> None:
        """Told by who reads in an order of its own: the shards whose chunks are read from here on,
        and those after them. Here they are all there.
        """

    def bring(self, shard: int) -> None:
        """Have all files of a shard on this machine until `let_go`. Here they are."""

    def let_go(self) -> None:
        """What `bring` has brought is not needed any more."""

    def stop_waiting(self) -> None:
        """End what waits for shards that are still to be written; here nothing does."""

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        with self._lock:
            _close_all(self._files, self._replaced_files)


def _close_all(files: OrderedDict[int, int], replaced: list[int]) -> None:
    while files:
        os.close(files.popitem()[1])
    while replaced:
        os.close(replaced.pop())
