"""The shards of one split on their way to another codec: read, checked, written, read back.

# R rows of a shard, D d_in
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .address import Place
from .bar import Bar
from .codecs import Codec
from .errors import InputError, StoreError
from .files import file_digest
from .rows import SplitReader
from .values import Floats, Rows, ValueType
from .writer import SplitWriter

_PART_ROWS = 256  # compared at once: they stay in the cache


class SplitCopier:
    """The shards of one split: read, checked, written, read back."""

    def __init__(
        self, reader: SplitReader, writer: SplitWriter, path: Place, pool: ThreadPoolExecutor
    ) -> None:
        """path: the source store; pool: threads that decode and encode."""
        self._reader, self._writer, self._path, self._pool = reader, writer, path, pool
        layout = writer.layout
        self._records: list[dict[str, Any]] = [{} for _ in range(layout.n_shards)]
        self._back = SplitReader(writer.root, writer.split, layout, self._records, writer.codec)
        self._digests: dict[int, list[tuple[Path, str]]] = {}
        for shard, file, digest in reader.files():
            self._digests.setdefault(shard, []).append((file, digest))

    def rows_done(self) -> int:
        """Rows of the shards that are committed."""
        spans = (self._writer.layout.rows_of_shard(s) for s in self._writer.committed)
        return sum(last - first for first, last in spans)

    def run(self, bar: Bar) -> None:
        """All missing shards; the next one is read while one is written."""
        missing = sorted(set(range(self._writer.layout.n_shards)) - self._writer.committed)
        with ThreadPoolExecutor(1, thread_name_prefix="seal") as seal:
            behind: Future[int] | None = None
            for shard in missing:
                given = self._read(shard)
                if behind is not None:
                    bar.update(behind.result())
                behind = seal.submit(self._write, shard, *given)
            if behind is not None:
                bar.update(behind.result())
        self._back.close()

    def _read(self, shard: int) -> tuple[Rows, NDArray[np.int64], NDArray[np.bool_] | None]:
        """Rows of one shard in the copy's number format, sources and mask flags."""
        reader, values = self._reader, self._writer.codec.values
        first, last = reader.layout.rows_of_shard(shard)
        reader.bring(shard)
        hashing = [
            self._pool.submit(check_digest, file, digest, self._path)
            for file, digest in self._digests[shard]
        ]
        rows_RD = np.empty((last - first, reader.d_in), values.memory)
        step = reader.layout.chunk_rows

        def decode(chunk: int) -> None:
            start = chunk * step
            part = rows_RD[start - first : min(start + step, last) - first]
            if reader.codec.served.name == values.name:
                reader.decode_chunk(chunk, part)
                return
            served = np.empty(part.shape, reader.codec.served.memory)
            reader.decode_chunk(chunk, served)
            floats = np.empty(part.shape, np.float32)
            reader.codec.to_floats(served, floats)
            part[...] = rounded(floats, values, self._path, start)

        decoding = [
            self._pool.submit(decode, chunk) for chunk in range(first // step, -(-last // step))
        ]
        for job in (*hashing, *decoding):
            job.result()
        rows = slice(first, last)
        masked_R = None if self._writer.split else reader.read_masked(rows)
        source_R = reader.read_source(rows)
        reader.let_go()
        return rows_RD, source_R, masked_R

    def _write(
        self,
        shard: int,
        rows_RD: Rows,
        source_R: NDArray[np.int64],
        masked_R: NDArray[np.bool_] | None,
    ) -> int:
        def check(shard: int, record: dict[str, Any]) -> None:
            self._records[shard] = record
            self._read_back(shard, rows_RD, source_R, masked_R)

        self._writer.before_commit = check
        self._writer.write(shard, rows_RD, source_R, masked_R)
        return len(rows_RD)

    def _read_back(
        self,
        shard: int,
        rows_RD: Rows,
        source_R: NDArray[np.int64],
        masked_R: NDArray[np.bool_] | None,
    ) -> None:
        """StoreError unless the written shard holds what the codec is to keep of the rows."""
        back, codec = self._back, self._writer.codec
        first, last = back.layout.rows_of_shard(shard)
        step = back.layout.chunk_rows

        def is_kept(chunk: int) -> bool:
            start = chunk * step
            given = rows_RD[start - first : min(start + step, last) - first]
            served = np.empty(given.shape, codec.served.memory)
            back.decode_chunk(chunk, served)
            parts = (slice(i, i + _PART_ROWS) for i in range(0, len(given), _PART_ROWS))
            return all(_is_kept(codec, given[part], served[part]) for part in parts)

        same = all(self._pool.map(is_kept, range(first // step, -(-last // step))))
        same &= np.array_equal(back.read_source(slice(first, last)), source_R)
        if masked_R is not None:
            same &= np.array_equal(back.read_masked(slice(first, last)), masked_R)
        if not same:
            raise StoreError(
                f"Shard {shard} of {self._writer.root} does not read back as it was written. The "
                "disk or the memory of this machine is not to be trusted; run the same command "
                "again, elsewhere if it happens twice."
            )


def _is_kept(codec: Codec, given_RD: Rows, served_RD: Rows) -> bool:
    """Whether rows that were read back are, to the bit, what the codec keeps of those given."""
    floats_RD, found_RD = (np.empty(given_RD.shape, np.float32) for _ in range(2))
    codec.values.to_floats(given_RD, floats_RD)
    codec.to_floats(served_RD, found_RD)
    return np.array_equal(codec.kept(floats_RD).view(np.uint32), found_RD.view(np.uint32))


def rounded(
    floats_RD: Floats, values: ValueType, path: Place, rows: int | NDArray[np.int64]
) -> Rows:
    """Values in another number format; InputError where it cannot hold one.

    rows: the number of each row, or of the first of a run.
    """
    with np.errstate(over="ignore"):
        rounded = values.of_floats(floats_RD)
    if values.name == "float16" and np.isinf(rounded).any():
        row, column = (int(i) for i in np.argwhere(np.isinf(rounded))[0])
        number = rows + row if isinstance(rows, int) else int(rows[row])
        raise InputError(
            f"Row {number} of {path} holds {floats_RD[row, column]:g}, and float16 ends at 65504. "
            "Pass --store-dtype bfloat16 or float32."
        )
    return rounded


def check_digest(file: Path, digest: str, store: Place) -> None:
    """StoreError unless a file has the SHA-256 that its store records."""
    try:
        found = file_digest(file)
    except OSError as error:
        raise StoreError(
            f"{file} cannot be read ({error.strerror}). Fetch that file again, or the store."
        ) from error
    if found != digest:
        raise StoreError(
            f"{file} does not have the digest that the manifest of {store} records. "
            "Fetch that file again, or delete the store and harvest it again."
        )
