"""A training step recorded once as a CUDA graph and replayed: one launch in place of hundreds.

# B rows, D d_in

A step of a small SAE is a hundred kernels of a few microseconds each, and the host needs longer to launch
them than the GPU to run them. A replay does the same work on the same memory with the numbers that were
there when it was recorded. So what changes in every step (learning rate, weight of the sparsity
term, step count, the batch) lies in tensors that are filled before each replay; what changes now and
then (k while it is annealed, p, whether the threshold is averaged) is the phase of a step, and a new
phase is stepped eagerly a few times and recorded again. A k that changes in every step is never
recorded.

`Graph` is what records; `CudaGraph` is the one that fits use. Tests have one that runs on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from .sae.asking import without_asking

# Before a phase is recorded: libraries load kernels and Adam makes its state on first use.
EAGER_STEPS = 3

Values = Mapping[str, Tensor | float]
Work = Callable[[], Values]


class Graph(Protocol):
    """Records device work without doing it, and does it as often as it is asked to."""

    def warm_up(self, work: Work) -> Values:
        """Do it now, as preparation."""

    def record(self, work: Work) -> Values:
        """Record it; what it returned is valid after a replay. RuntimeError if it cannot be."""

    def replay(self) -> None:
        """Do what was recorded."""


class CapturedStep:
    """Steps by `work`, eagerly at first and in every new phase, then by replays.

    around: entered while work is recorded.
    """

    def __init__(
        self,
        work: Callable[[Tensor], Values],
        new_graph: Callable[[], Graph],
        around: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._work, self._new_graph, self._around = work, new_graph, around
        self._key: Hashable = None
        self._recorded: _Recorded | None = None
        self._can_record = True
        self.forget()

    @property
    def is_recorded(self) -> bool:
        """Whether the next step of the same phase is a replay."""
        return self._recorded is not None

    def forget(self) -> None:
        """Begin anew: the memory that was recorded is no longer the one to work on."""
        self._key, self._recorded, self._eager_steps = None, None, 0
        self._graph = self._new_graph()

    def __call__(self, phase: Hashable, x_BD: Tensor) -> dict[str, Tensor | float]:
        """One step. phase: everything that the work branches on, apart from the batch's shape."""
        key = (phase, x_BD.shape)
        if key != self._key:
            self.forget()
            self._key = key
        if self._recorded is None and self._can_record and self._eager_steps == EAGER_STEPS:
            self._recorded = self._record(x_BD)
        if self._recorded is not None:
            return self._recorded.step(x_BD)
        self._eager_steps = min(self._eager_steps + 1, EAGER_STEPS)
        with without_asking():
            return dict(self._graph.warm_up(lambda: self._work(x_BD)))

    def _record(self, x_BD: Tensor) -> _Recorded | None:
        """None, for good, where it does not work: steps are eager then, and give the same numbers."""
        batch_BD = x_BD.clone()

        def packed() -> Values:
            values = self._work(batch_BD)
            tensors = {n: v.double() for n, v in values.items() if isinstance(v, Tensor)}
            return {**values, **tensors, "": torch.stack(list(tensors.values()))}

        try:
            with without_asking(), self._around() as held:
                values = dict(self._graph.record(packed))
        except RuntimeError as error:
            self._can_record = False
            reason = str(error).partition("\n")[0]
            print(f"Steps are not captured, and so take longer: {reason}", file=sys.stderr)
            return None
        together = values.pop("")
        assert isinstance(together, Tensor)
        return _Recorded(self._graph, batch_BD, together, values, held)


@dataclass(frozen=True)
class _Recorded:
    """together: all values of a step that are tensors, as float64, in one; values: by their names.

    held: what has to stay for as long as the graph uses its memory.
    """

    graph: Graph
    batch_BD: Tensor
    together: Tensor
    values: Values
    held: object

    def step(self, x_BD: Tensor) -> dict[str, Tensor | float]:
        self.batch_BD.copy_(x_BD)
        self.graph.replay()
        # A copy, because the next replay writes to the same memory.
        parts = iter(self.together.clone().unbind())
        return {n: next(parts) if isinstance(v, Tensor) else v for n, v in self.values.items()}


class CudaGraph:
    """A torch.cuda.CUDAGraph. All of a device are recorded on one stream and share memory.

    Sharing is safe because they are replayed one after another, and none uses what another left in
    it: what lasts from step to step lies outside.
    """

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}
    _recorded: ClassVar[WeakSet[CudaGraph]] = WeakSet()

    def __init__(self, device: torch.device) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream = self._streams[device]

    def warm_up(self, work: Work) -> Values:
        # On the stream that records, for which libraries keep workspaces of their own.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            values = work()
        current.wait_stream(self._stream)
        for value in values.values():
            if isinstance(value, Tensor):
                value.record_stream(current)
        return values

    def record(self, work: Work) -> Values:
        others = [each for each in self._recorded if each._device == self._device]
        pool = others[0]._graph.pool() if others else None
        with (
            torch.cuda.stream(self._stream),  # as it was, should the capture not end by itself
            torch.cuda.graph(
                self._graph,
                pool=pool,
                stream=self._stream,
                # Threads that read ahead may use the device meanwhile.
                capture_error_mode="thread_local",
            ),
        ):
            values = work()
        self._recorded.add(self)
        return values

    def replay(self) -> None:
        self._graph.replay()
