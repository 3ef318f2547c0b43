"""What a CUDA graph does, on a CPU: operations recorded once and done again on the same memory.

A tape sees what torch dispatches below autograd, each operation with the tensors and the numbers that
it was called with. Played again, an operation writes where it wrote before; what Python computed in
between stays what it was. So a step that depends on a number of the host, or on memory that another
took its place of, shows on a tape what it would show on a GPU.

What would make a GPU wait is refused by name, and so is what copies from the host.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Operations whose result, or its shape, the host has to be told; and a tensor made of Python numbers,
# which reaches a GPU by a copy that is waited for.
WAITING = {
    aten._local_scalar_dense: "the value of a tensor (.item(), bool(), int(), float())",
    aten.is_nonzero: "the truth of a tensor",
    aten.equal: "whether two tensors are equal",
    aten.nonzero: "nonzero()",
    aten.nonzero_numpy: "nonzero(as_tuple=True)",
    aten.masked_select: "masked_select()",
    aten._unique2: "unique()",
    aten.unique_consecutive: "unique_consecutive()",
    aten.unique_dim: "unique(dim)",
    aten.bincount: "bincount()",
    aten.histc: "histc()",
    aten.repeat_interleave: "repeat_interleave() of a tensor of counts",
    aten.lift_fresh: "a tensor of Python numbers",
}
_UNINITIALISED = (
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class WouldWait(AssertionError):
    """A step did what makes a GPU wait for the host, or the host for a GPU."""


class NeverWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations that would make a GPU wait; seen: the names of all others.

    device: the type that stands for a GPU. What is done on tensors of another is the host's affair.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.seen = device, set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.check(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def check(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        packet, given = func.overloadpacket, _tensors((args, kwargs))
        sides = {each.device.type for each in given}
        if packet == aten._to_copy and kwargs.get("device") is not None:
            sides.add(torch.device(kwargs["device"]).type)
        if len(sides) > 1:
            # A number of the host goes along with a kernel; anything else is copied.
            hosts = [each for each in given if each.device.type != self.device]
            if packet in (aten._to_copy, aten.copy_) or any(each.dim() for each in hosts):
                raise WouldWait(f"{func} copies between host and device")
        elif sides and sides != {self.device}:
            return
        self.seen.add(str(packet))
        if packet in WAITING:
            raise WouldWait(f"{func} asks for {WAITING[packet]}")
        indices = args[1] if packet in INDEXING else ()
        if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
            raise WouldWait(f"{func} has a mask as its index, of which it counts what is true")


class Tape(NeverWaits):  # type: ignore[no-untyped-call]
    """A `Graph` of stages/captured.py."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self.replays = 0

    def warm_up(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> Any:
        with self:
            values = work()
        # A GPU only takes down what is to be done: undo it.
        for whole, content in self._before.values():
            whole.copy_(content)
        return values

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, fresh in self._operations:
                results = func(*args, **kwargs)
                for old, new in zip(fresh, _tensors(results), strict=fresh != []):
                    old.copy_(new)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.check(func, args, kwargs)
        self._keep_what_is_overwritten(func, args, kwargs)
        results = func(*args, **kwargs)
        returns = func._schema.returns
        is_view = bool(returns) and all(
            each.alias_info is not None and not each.alias_info.is_write for each in returns
        )
        if not is_view:
            writes = any(each.alias_info is not None for each in returns)
            fresh = [] if writes or _is_uninitialised(func) else _tensors(results)
            self._operations.append((func, args, dict(kwargs), fresh))
        return results

    def _keep_what_is_overwritten(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for each in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                storage = each.untyped_storage()
                if storage.data_ptr() not in self._before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self._before[storage.data_ptr()] = whole, whole.clone()


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


def _is_uninitialised(func: Any) -> bool:
    return func.overloadpacket in _UNINITIALISED
