"""Shuffled batches of a store as float32 tensors on a device.

# B batch rows, D d_in
"""

import time
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..storage import ActivationStore

_AHEAD = 2  # batches on their way to a GPU


class TorchBatches:
    """An endless iterator over tensors (B, D), deterministic from the seed.

    Rows are multiplied by `scale` (1 / norm factor, so that E||x||^2 = 1). On a CUDA device batches
    travel as they are stored (bfloat16, or whole steps) from pinned memory on a stream of their own, `_AHEAD` batches before they are
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
        world_size: int = 1,
        rank: int = 0,
        part: slice = slice(None),
    ) -> None:
        """start: the first batch to serve, counted from 0 through all epochs; world_size, rank: of
        a distributed run, in which the ranks together serve each row once an epoch. part: which rows
        of every batch to serve, where others serve the rest of the same batches.
        """
        self.device, self.dtype, self.scale = torch.device(device), dtype, scale
        self._loader = store.batches(
            batch_size, seed=seed, start=start, threads=threads, world_size=world_size, rank=rank
        )
        self._batches = (rows_BD[part] for rows_BD in self._loader)
        batch_size = len(range(batch_size)[part])
        self._served = self._loader.served
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
        for served_BD in self._batches:
            yield self._widen(self._tensor(served_BD).to(self.device))

    def _tensor(self, rows_BD: NDArray[Any]) -> torch.Tensor:
        """Rows as the loader serves them, without a copy."""
        tensor = torch.from_numpy(rows_BD)
        return tensor.view(torch.bfloat16) if self._served.name == "bfloat16" else tensor

    def _widen(self, rows_BD: torch.Tensor) -> torch.Tensor:
        return rows_BD.to(self.dtype, copy=True).mul_(self.scale * self._served.step)

    def _on_cuda(self, batch_size: int, d_in: int) -> Iterator[torch.Tensor]:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        like = self._tensor(np.empty((batch_size, d_in), self._served.memory))
        pinned = [torch.empty_like(like, pin_memory=True) for _ in range(_AHEAD)]
        copied: list[torch.cuda.Event | None] = [None] * _AHEAD
        waiting: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        for turn, served_BD in enumerate(self._batches):
            slot = turn % _AHEAD
            if (previous := copied[slot]) is not None:
                previous.synchronize()  # the pinned buffer is free again
            pinned[slot].copy_(self._tensor(served_BD))
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the reader's threads."""
        self._loader.close()
