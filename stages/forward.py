"""The forward pass over a block: tokens in, rounded rows in the block's buffer out.

# B contexts of a batch, T positions, D d_model, R rows

The device never waits for the host: rows leave it by asynchronous copies into pinned memory, and a
thread puts them to their places while the next batch runs. On a CPU the same thread does the same
with nothing to copy.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..storage.errors import InputError, NonFiniteError
from ..storage.values import BFLOAT16, Rows, ValueType
from .backoff import BatchRunner, is_out_of_memory
from .block_buffer import BlockBuffer
from .row_map import BlockRows

_IN_FLIGHT = 3  # batches between the device and the buffer


@dataclass
class _Parcel:
    """Rows of one batch on their way to the host."""

    rows: dict[int, Tensor]  # layer -> (R, D), rounded, on the host once `copied` has happened
    is_finite: dict[int, Tensor]
    copied: torch.cuda.Event | None
    deliver: Callable[[dict[int, Tensor], dict[int, Tensor]], None]


class HostCopier:
    """Takes rows off the device in the order given, a few batches behind it."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device
        self._parcels: queue.Queue[_Parcel | None] = queue.Queue(_IN_FLIGHT)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._deliver_all, name="host-copy", daemon=True)
        self._thread.start()

    def put(
        self,
        rows: dict[int, Tensor],
        deliver: Callable[[dict[int, Tensor], dict[int, Tensor]], None],
    ) -> None:
        """Copy rows to the host and call deliver(rows, is_finite) in the thread."""
        self._raise_error()
        is_finite = {layer: torch.isfinite(part).all() for layer, part in rows.items()}
        if self._stream is None:
            rows = {layer: part.to("cpu") for layer, part in rows.items()}
            self._parcels.put(_Parcel(rows, is_finite, None, deliver))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            on_host = {layer: self._to_host(part) for layer, part in rows.items()}
            finite_on_host = {layer: self._to_host(flag) for layer, flag in is_finite.items()}
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._parcels.put(_Parcel(on_host, finite_on_host, event, deliver))

    def _to_host(self, source: Tensor) -> Tensor:
        # Pinned memory comes from torch's caching host allocator: taken anew, but not made anew.
        assert self._stream is not None
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)
        return target

    def _deliver_all(self) -> None:
        while (parcel := self._parcels.get()) is not None:
            if self._error is None:
                try:
                    if parcel.copied is not None:
                        parcel.copied.synchronize()
                    parcel.deliver(parcel.rows, parcel.is_finite)
                except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                    self._error = error
            self._parcels.task_done()
        self._parcels.task_done()

    def flush(self) -> None:
        """Wait until everything put so far is delivered; raise what delivering raised."""
        self._parcels.join()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread."""
        self._parcels.put(None)
        self._thread.join()


def fill_block(
    runner: BatchRunner,
    block: BlockRows,
    buffer: BlockBuffer,
    *,
    batch_contexts: int,
    copier: HostCopier,
    note_every_s: float,
    advance: Callable[[int], None],
    values: ValueType = BFLOAT16,
) -> None:
    """Run the model over a block's contexts and put the rows into the buffer.

    values: the number format that rows are rounded to. advance: called with the number of rows each time a batch is in. Raises NonFiniteError, naming
    context and position, when an activation is NaN or Inf.
    """
    row = int(block.kept_CT[: buffer.filled].sum())
    advance(row)
    for start, stop in _batches(block, buffer.filled, batch_contexts):
        if not block.kept_CT[start:stop].any():
            continue
        length = int(block.lengths_C[start:stop].max())
        tokens_BT = _uploadable(block.tokens_CT[start:stop, :length], runner.model.device)
        kept_BT = block.kept_CT[start:stop, :length]
        for part, activations in runner.run(tokens_BT):
            kept = np.flatnonzero(kept_BT[part])
            rows = slice(row, row + len(kept))
            deliver = _delivery(buffer, block, rows, values, advance)
            copier.put(_kept_rows(activations, kept, values), deliver)
            row = rows.stop
            del activations  # or they would stand beside those of the next batch
        if buffer.wants_note(note_every_s):
            copier.flush()
            buffer.note(stop)
    copier.flush()
    assert row == block.n_rows, f"{row} rows computed, {block.n_rows} planned"


def _batches(block: BlockRows, filled: int, batch_contexts: int) -> Iterator[tuple[int, int]]:
    """Contexts of each batch; no batch reaches over the end of a part of the block."""
    begin = 0
    for end in block.part_ends:
        for start in range(begin, end, batch_contexts):
            if start >= filled:  # what is noted to be in ends with a batch
                yield start, min(start + batch_contexts, end)
        begin = end


def _uploadable(values: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    """Whole numbers as int64, in memory that a CUDA device copies from without waiting."""
    tensor = torch.from_numpy(values.astype(np.int64))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _kept_rows(
    activations: dict[int, Tensor], kept: NDArray[np.int64], values: ValueType
) -> dict[int, Tensor]:
    rows = {}
    device = next(iter(activations.values())).device
    try:
        where = _uploadable(kept, device).to(device, non_blocking=True)
        for layer, values_BTD in activations.items():
            flat = values_BTD.reshape(-1, values_BTD.shape[-1])
            rows[layer] = flat.index_select(0, where).to(getattr(torch, values.name))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        contexts = len(next(iter(activations.values())))
        raise InputError(
            f"The memory of device {device} is too small for the rows of {contexts} contexts "
            f"beside the model. Pass --batch-contexts {max(contexts // 2, 1)} with another --out."
        ) from error
    return rows


def in_memory(rows_RD: Tensor, values: ValueType) -> Rows:
    """Rounded rows on the host as numpy holds them, without a copy."""
    tensor = rows_RD.view(torch.uint16) if values is BFLOAT16 else rows_RD
    rows: Rows = tensor.numpy()
    return rows


def _delivery(
    buffer: BlockBuffer,
    block: BlockRows,
    rows: slice,
    values: ValueType,
    advance: Callable[[int], None],
) -> Callable[[dict[int, Tensor], dict[int, Tensor]], None]:
    places_R, source_R = block.places_R[rows], block.source_R[rows]

    def deliver(parts: dict[int, Tensor], is_finite: dict[int, Tensor]) -> None:
        for layer, rows_RD in parts.items():
            if not bool(is_finite[layer]):
                raise _non_finite(layer, rows_RD, source_R, block, values)
            buffer.put(layer, places_R, in_memory(rows_RD, values))
        advance(len(places_R))

    return deliver


def _non_finite(
    layer: int, rows_RD: Tensor, source_R: NDArray[np.int64], block: BlockRows, values: ValueType
) -> NonFiniteError:
    is_bad_R = ~torch.isfinite(rows_RD).all(dim=1)
    first = int(is_bad_R.nonzero()[0, 0])
    context, position = divmod(int(source_R[first]), block.tokens_CT.shape[1])
    stored = " and --store-dtype bfloat16" if values.name == "float16" else ""
    return NonFiniteError(
        f"The activation of layer {layer} at context {context}, position {position} of the "
        f"{block.split} rows is NaN or Inf: it overflows in this number format. Pass --dtype "
        f"float32 (or bfloat16 if it was float16){stored} with another --out."
    )
