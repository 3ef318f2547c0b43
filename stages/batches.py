"""Shuffled batches of a store as float32 tensors on a device.

# B batch rows, D d_in
"""

import time
from collections.abc import Iterator

import torch

from ..storage import ActivationStore

_AHEAD = 2  # batches on their way to a GPU


class TorchBatches:
    """An endless iterator over tensors (B, D), deterministic from the seed.

    Rows are multiplied by `scale` (1 / norm factor, so that E||x||^2 = 1). On a CUDA device batches
    travel as bfloat16 from pinned memory on a stream of their own, `_AHEAD` batches before they are
    needed, and are widened there. waited_s: seconds that the consumer has waited for data.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        threads: int | None = None,
    ) -> None:
        """start: the first batch to serve, counted from 0 through all epochs."""
        self.device, self.dtype, self.scale = torch.device(device), dtype, scale
        self._loader = store.batches(batch_size, seed=seed, start=start, threads=threads)
        self._batches = iter(self._loader)
        self.waited_s = 0.0
        on_cuda = self.device.type == "cuda"
        self._iterator = self._on_cuda(batch_size, store.d_in) if on_cuda else self._direct()

    @property
    def buffer_bytes(self) -> int:
        """Host memory that the reader holds."""
        return self._loader.buffer_bytes

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        begun = time.perf_counter()
        batch_BD = next(self._iterator)
        self.waited_s += time.perf_counter() - begun
        return batch_BD

    def _direct(self) -> Iterator[torch.Tensor]:
        for bits_BD in self._batches:
            rows_BD = torch.from_numpy(bits_BD).view(torch.bfloat16).to(self.device)
            yield self._widen(rows_BD)

    def _widen(self, rows_BD: torch.Tensor) -> torch.Tensor:
        return rows_BD.to(self.dtype, copy=True).mul_(self.scale)

    def _on_cuda(self, batch_size: int, d_in: int) -> Iterator[torch.Tensor]:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        shape = (batch_size, d_in)
        pinned = [torch.empty(shape, dtype=torch.bfloat16, pin_memory=True) for _ in range(_AHEAD)]
        copied: list[torch.cuda.Event | None] = [None] * _AHEAD
        waiting: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        for turn, bits_BD in enumerate(self._batches):
            slot = turn % _AHEAD
            if (previous := copied[slot]) is not None:
                previous.synchronize()  # the pinned buffer is free again
            pinned[slot].copy_(torch.from_numpy(bits_BD).view(torch.bfloat16))
            with torch.cuda.stream(stream):
                rows_BD = pinned[slot].to(self.device, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            copied[slot] = event
            waiting.append((rows_BD, event))
            if len(waiting) < _AHEAD:
                continue
            rows_BD, event = waiting.pop(0)
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            rows_BD.record_stream(current)
            yield self._widen(rows_BD)

    def close(self) -> None:
        """Stop the reader's threads."""
        self._loader.close()
