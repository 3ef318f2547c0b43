"""Whether a step may look at a tensor's values on the host.

On a CPU looking is free, and what is found there (nothing is dead, few latents are active) saves work.
A GPU would have to finish everything first, in every step; there the same numbers are computed
without a look, by operations whose shapes are known beforehand. Such a step can also be recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_FORBIDDEN = ContextVar("values are not looked at", default=False)


def may_ask(tensor: Tensor) -> bool:
    """Whether its values can be had without waiting, and are not to be left alone."""
    return tensor.device.type == "cpu" and not _FORBIDDEN.get()


@contextmanager
def without_asking() -> Iterator[None]:
    """Steps inside look at nothing, on a CPU either: they do what they do on a GPU."""
    token = _FORBIDDEN.set(True)
    try:
        yield
    finally:
        _FORBIDDEN.reset(token)
