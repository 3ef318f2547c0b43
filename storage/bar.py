"""Progress as storage knows it: something that counts, and how to open it.

The bar itself is in `stages.progress`; who calls from Python may pass nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """What counts the rows that are done."""

    def update(self, n: int) -> object: ...


class _NoBar:
    def update(self, n: int) -> None: ...


# Called with rows in all and rows done already.
OpenBar = Callable[[int, int], AbstractContextManager[Bar]]


def no_bar(total: int, done: int) -> AbstractContextManager[Bar]:
    """Progress that nobody sees."""
    return nullcontext(_NoBar())
