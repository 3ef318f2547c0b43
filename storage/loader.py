"""Shuffled batches of a split, decoded by threads ahead of the consumer.

# B batch rows, D d_in, W window rows

Two windows of rows stand in memory, in the type that the codec serves: one is served while threads decode chunks into the
other, each row straight to its permuted place. Serving is then a run of contiguous rows: no copy.
"""

import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .codecs.base import Served
from .errors import InputError
from .order import Order, Window
from .rows import SplitReader
from .values import Floats, Rows


class _Filling:
    """One window on its way into a buffer."""

    def __init__(self, window: Window, buffer: Rows, jobs: "list[Future[None]]") -> None:
        self.window, self.buffer, self._jobs = window, buffer, jobs

    def wait(self) -> Rows:
        """The window's rows in serving order; raises what a decoding thread raised."""
        for job in self._jobs:
            job.result()
        return self.buffer[: self.window.n_rows]


class BatchLoader:
    """An endless iterator over batches (B, D) in the memory type of `served`.

    With the default codec these are bfloat16 bits as uint16; `to_floats` widens any of them.

    A batch may be a view into the loader's memory: it is valid until the next one is asked for.
    Batch t holds rows t*B to (t+1)*B of the rank's order, epochs end to end, so no row is dropped;
    the ranks together serve each row once an epoch.
    waited_s: seconds that the consumer has waited for data.
    """

    def __init__(
        self,
        reader: SplitReader,
        *,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        threads: int | None = None,
        window_rows: int = 0,
        world_size: int = 1,
        rank: int = 0,
        in_stored_order: bool = False,
    ) -> None:
        """start: the first batch to serve; threads: decoding threads (default: the cores);
        in_stored_order: as in `Order`.
        """
        if batch_size < 1:
            raise InputError(f"A batch needs at least one row, found batch size {batch_size}.")
        if reader.n_rows < 1:
            raise InputError("The store holds no rows, so there are no batches to serve.")
        self.batch_size, self.waited_s = batch_size, 0.0
        self._reader = reader
        self.served: Served = reader.codec.served
        self._order = Order(
            layout=reader.layout,
            seed=seed,
            window_rows=window_rows,
            world_size=world_size,
            rank=rank,
            in_stored_order=in_stored_order,
        )
        self._row = start * batch_size
        self._windows = self._order.windows(self._row)
        self._threads = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        largest = min(self._order.largest_window, reader.n_chunks * reader.layout.chunk_rows)
        self._spare: list[Rows] = [self._memory(largest) for _ in range(2)]
        self._across = self._memory(batch_size)
        self._group: tuple[int, int] | None = None
        self._planned = self._plan()
        self._ahead = self._fill()
        self._served = self._serve()

    def _memory(self, n_rows: int) -> Rows:
        return np.empty((n_rows, self._reader.d_in), self.served.memory)

    def to_floats(self, batch_BD: Rows) -> Floats:
        """float32 of a batch, (B, D)."""
        out = np.empty(batch_BD.shape, np.float32)
        self._reader.codec.to_floats(batch_BD, out)
        return out

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        return next(self._served)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def buffer_bytes(self) -> int:
        """Memory held: two windows and one batch."""
        return 2 * self._spare[0].nbytes + self._across.nbytes if self._spare else 0

    def _serve(self) -> Iterator[Rows]:
        served = self._memory(0)
        place = self._row % self._order.n_rows - self._ahead.window.first_row
        current = None
        while True:
            wanted = self.batch_size
            if len(served) - place >= wanted and current is not None:
                batch = served[place : place + wanted]
                place += wanted
                yield batch
                continue
            filled = 0
            while filled < wanted:
                if current is None or place >= len(served):
                    if current is not None:
                        self._spare.append(current.buffer)
                        place = 0
                    current, served = self._next_window()
                take = min(wanted - filled, len(served) - place)
                self._across[filled : filled + take] = served[place : place + take]
                filled, place = filled + take, place + take
            yield self._across

    def _next_window(self) -> tuple[_Filling, Rows]:
        begun = time.perf_counter()
        current = self._ahead
        served = current.wait()
        self._ahead = self._fill()
        self.waited_s += time.perf_counter() - begun
        return current, served

    def _plan(self) -> "Future[tuple[Window, NDArray[np.int64]]]":
        """Permute the next window's rows in a thread, a window before they are needed."""
        window = next(self._windows)
        return self._pool.submit(lambda: (window, window.places()))

    def _fill(self) -> _Filling:
        window, places = self._planned.result()
        self._planned = self._plan()
        self._prepare(window)
        buffer = self._spare.pop()
        starts = np.concatenate(
            ([0], np.cumsum([self._reader.rows_of_chunk(int(c)) for c in window.chunks]))
        )
        turns = itertools.count()  # next() on it is atomic: each thread takes the next chunk

        def decode() -> None:
            rows = self._memory(self._reader.layout.chunk_rows)
            while (turn := next(turns)) < len(window.chunks):
                chunk = int(window.chunks[turn])
                count = self._reader.rows_of_chunk(chunk)
                self._reader.decode_chunk(chunk, rows[:count])
                scatter_rows(buffer, places[starts[turn] : starts[turn + 1]], rows[:count])

        return _Filling(window, buffer, [self._pool.submit(decode) for _ in range(self._threads)])

    def _prepare(self, window: Window) -> None:
        """Tell the reader when other shards are needed; those before have all been decoded."""
        group = window.epoch, window.group
        if group != self._group:
            self._group = group
            following = self._order.group_after(*group)
            self._reader.prepare(
                self._order.shards_of_group(*group), self._order.shards_of_group(*following)
            )

    def close(self) -> None:
        """Stop the threads. The loader cannot be used after that."""
        self._reader.stop_waiting()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._spare = []


def scatter_rows(target: Rows, places: NDArray[np.int64], rows: Rows) -> None:
    """target[places] = rows, each row moved as one opaque value (a tenth faster than as numbers)."""
    row = np.dtype((np.void, target.shape[1] * target.itemsize))
    target.view(row).reshape(-1)[places] = rows.view(row).reshape(-1)
