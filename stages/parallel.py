"""Several processes that step one SAE together, each on its share of every batch.

# W processes, B rows of a whole batch

torchrun starts them (stages/torchrun.py). What a step needs to know of the whole batch goes through
the `Group`: sums, means, minima, and what each process has. Tensors travel on their own device
(gloo for a CPU, NCCL for CUDA), plain values by gloo. Every exchange is a sum or an extreme over all
processes, whose result is the same to the last bit on each of them; so each steps for itself from
equal weights to equal weights.

All processes make the same calls in the same order. An error that one of them meets where the
others are known to wait for it is agreed on (`together`, `first`, `agree`): all raise it, the first
tells it. An error in the middle of a step cannot be: that process ends, and the others see it gone.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..storage import errors
from ..storage.errors import InputError, SaePipeError
from .backoff import is_out_of_memory
from .devices import pick_device
from .torchrun import Seat, find_seat

T = TypeVar("T")

_MEET = timedelta(minutes=5)  # for all processes to come to the master's address
# The last resort: an exchange may wait while the first process judges or writes.
_PATIENCE = timedelta(hours=2)


class OutOfStep(Exception):
    """The processes cannot agree on anything any more: this one ends, with a sentence for the user.

    No SaePipeError, of which a sweep or an exchange of errors could make something.
    """

    is_shared = False


class ProcessLost(OutOfStep):
    """Another process has ended, or does not answer."""

    is_shared = True


class Group:
    """A process by itself: every exchange gives back what it is given. See `Processes`."""

    seat = Seat()

    def __deepcopy__(self, memo: object) -> Self:
        return self  # of an SAE that is copied: the processes are the same

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.seat.world_size

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and tells."""
        return self.seat.rank == 0

    def device(self, name: str) -> torch.device:
        """The device that a name means for this process."""
        return pick_device(name)

    def use(self, device: torch.device) -> None:
        """Make ready for exchanges of tensors there: called by all processes with their own."""

    def part(self, batch_size: int) -> slice:
        """Which rows of a whole batch are this process's; it divides by the number of processes."""
        size = batch_size // self.world_size
        return slice(self.seat.rank * size, (self.seat.rank + 1) * size)

    # --- tensors, of equal shape and type on all processes ---

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes: of a mean over rows, that over the whole batch."""
        return value

    def min(self, value: Tensor) -> Tensor:
        """The least of all processes."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """What each process has: (W, ...)."""
        return value[None]

    def mean_gradients_(self, bucket: Bucket) -> None:
        """Make every gradient the mean over all processes."""

    # --- plain values and errors ---

    def first(self, act: Callable[[], T]) -> T:
        """What act gives (as JSON has it) on the first process, which alone calls it."""
        return act()

    def together(self, act: Callable[[], T]) -> T:
        """What act gives here; an error of the user's making in any process is that of all."""
        return act()

    def agree(
        self, found: Sequence[SaePipeError | None], signal: int = 0
    ) -> tuple[list[SaePipeError | None], int]:
        """Errors and the number of a signal (0: none), as any of the processes has met them."""
        return list(found), signal

    def check_alike(self, values: Mapping[str, Any], advice: str) -> None:
        """InputError on all processes, unless all have the same values."""

    def in_step(self) -> AbstractContextManager[None]:
        """Around exchanges of tensors: errors of the user's making become OutOfStep."""
        return nullcontext()

    def wait(self) -> None:
        """For all processes to come here; at once when one of them is gone."""


ALONE = Group()


class Processes(Group):
    """One of several processes."""

    def __init__(self, seat: Seat) -> None:
        """Waits for all processes; raises InputError when they do not come."""
        self.seat = seat
        _meet(seat)
        self._groups = {"cpu": dist.new_group(backend="gloo", timeout=_PATIENCE)}
        self.is_whole = True

    def device(self, name: str) -> torch.device:
        device = pick_device(name)
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise InputError(
                f"--device {name} means {device.type} here, which is not for several processes. "
                "Pass --device cpu."
            )
        if device.index is not None:
            raise InputError(
                f"--device {name} is one GPU, and each of {self.world_size} processes takes its "
                "own. Pass --device cuda."
            )
        if self.seat.local_size > torch.cuda.device_count():
            raise InputError(
                f"Each process takes a GPU of its own, but {self.seat.local_size} were started on "
                f"a machine with {torch.cuda.device_count()}. Start as many as there are GPUs, or "
                "pass --device cpu."
            )
        return torch.device("cuda", self.seat.local_rank)

    def use(self, device: torch.device) -> None:
        self.check_alike({"device": device.type}, "Pass --device cuda or --device cpu.")
        if device.type == "cuda" and "cuda" not in self._groups:
            torch.cuda.set_device(device)
            self._groups["cuda"] = dist.new_group(backend="nccl", timeout=_PATIENCE)

    # --- tensors ---

    def sum(self, value: Tensor) -> Tensor:
        return self._reduced(value.detach().clone(), dist.ReduceOp.SUM)

    def mean(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.world_size

    def min(self, value: Tensor) -> Tensor:
        return self._reduced(value.detach().clone(), dist.ReduceOp.MIN)

    def gather(self, value: Tensor) -> Tensor:
        # A sum with zeros: exact, and faster than gloo's own gathering.
        all_W = value.new_zeros((self.world_size, *value.shape))
        all_W[self.seat.rank] = value.detach()
        return self._reduced(all_W, dist.ReduceOp.SUM)

    def mean_gradients_(self, bucket: Bucket) -> None:
        bucket.fill()
        self._reduced(bucket.values, dist.ReduceOp.SUM)
        bucket.values.div_(self.world_size)

    def _reduced(self, value: Tensor, how: Any) -> Tensor:
        """In place."""
        try:
            dist.all_reduce(value, how, group=self._groups[value.device.type])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.is_whole = False
            raise ProcessLost(
                "Another process of this fit has ended or does not answer, so this one ends, too. "
                "Run the same command again: it goes on from the last checkpoint."
            ) from error
        return value

    # --- plain values and errors ---

    def gather_json(self, value: Any) -> list[Any]:
        """What each process has, as JSON has it."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size_W = self.gather(torch.tensor(len(text)))
        padded = torch.zeros(int(size_W.max()), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = self.gather(padded).numpy()
        return [json.loads(t[:size].tobytes()) for t, size in zip(texts, size_W, strict=True)]

    def first(self, act: Callable[[], T]) -> T:
        result = self.together(lambda: act() if self.is_first else None)
        found: T = self.gather_json(result)[0]
        return found

    def together(self, act: Callable[[], T]) -> T:
        error: SaePipeError | None = None
        try:
            result = act()
        except SaePipeError as caught:
            error = caught
        [error], _ = self.agree([error])
        if error is not None:
            raise error
        return result

    def agree(
        self, found: Sequence[SaePipeError | None], signal: int = 0
    ) -> tuple[list[SaePipeError | None], int]:
        flags = torch.tensor([signal, *(error is not None for error in found)])
        signal, *failed = self._reduced(flags, dist.ReduceOp.MAX).tolist()
        if not any(failed):
            return list(found), signal
        told = [None if error is None else (type(error).__name__, str(error)) for error in found]
        told_W = self.gather_json(told)
        return [_shared(error, of_W) for error, *of_W in zip(found, *told_W, strict=True)], signal

    def check_alike(self, values: Mapping[str, Any], advice: str) -> None:
        first, *others = self.gather_json(dict(values))
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):
                if first.get(name) != other.get(name):
                    error = InputError(
                        f"Process {rank} of this fit has {name} {other.get(name)!r}, but process 0 "
                        f"{first.get(name)!r}. {advice}"
                    )
                    error.is_shared = True
                    raise error

    @contextmanager
    def in_step(self) -> Iterator[None]:
        try:
            yield
        except SaePipeError as error:
            self.is_whole = False
            raise OutOfStep(str(error)) from error

    def wait(self) -> None:
        if self.is_whole:
            with suppress(ProcessLost):
                self.sum(torch.zeros(1))

    def leave(self) -> None:
        """End gloo's threads, which must not outlive the interpreter.

        They let go of the tensors of an exchange after it has been answered. In an interpreter that
        is ending already, a thread that does so aborts the process (pytorch/pytorch#179291).
        """
        dist.destroy_process_group(self._groups.pop("cpu"))


class Bucket:
    """One memory for all gradients of some parameters, so that they travel together."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self._parameters]
        self.values = self._parameters[0].new_zeros(sum(sizes))
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        # In the order that the parameter itself has in memory, which the optimiser works in.
        self._views = [
            self.values.as_strided(parameter.shape, parameter.stride(), start)
            for parameter, start in zip(self._parameters, starts[:-1], strict=True)
        ]

    def fill(self) -> None:
        """Move the gradients of a backward pass here, and leave them here."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
            parameter.grad = view


_joined: list[Processes] = []


def join() -> Group:
    """The group of this process, as torchrun has started it: ALONE without others.

    The first call waits for the other processes. Raises InputError when they do not come.
    """
    if _joined:
        return _joined[0]
    seat = find_seat()
    if seat.world_size == 1:
        return ALONE
    is_ours = not dist.is_initialized()  # or by the script that calls us
    group = Processes(seat)
    _joined.append(group)
    atexit.register(_part, group, is_ours=is_ours)
    return group


def _meet(seat: Seat) -> None:
    if dist.is_initialized():
        return
    try:
        store, *_ = next(iter(rendezvous("env://", timeout=_MEET)))
        dist.init_process_group(
            "gloo",
            store=PrefixStore("sae-pipe", store),
            rank=seat.rank,
            world_size=seat.world_size,
            timeout=_MEET,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"Process {seat.rank} of {seat.world_size} could not meet the others ({error}). "
            "Start all of them at the same time, with torchrun; unset WORLD_SIZE for a single one."
        ) from error


def _part(group: Processes, *, is_ours: bool) -> None:
    if not dist.is_initialized():  # the script that calls us has ended it
        return
    group.leave()
    # Of the others, NCCL's may wait for a process that was lost.
    if is_ours and group.is_whole:
        dist.destroy_process_group()


def _shared(error: SaePipeError | None, told_W: Sequence[Any]) -> SaePipeError | None:
    """An error that all processes raise: this one's, or a copy of the first other's."""
    if error is None:
        found = next((told for told in told_W if told is not None), None)
        if found is None:
            return None
        kind, text = found
        error = getattr(errors, kind, SaePipeError)(text)
    error.is_shared = True
    return error
