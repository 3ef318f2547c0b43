"""Progress bars for what storage does, which only knows how to count."""

from contextlib import AbstractContextManager
from typing import Any


def open_bar_of(what: str, unit: str) -> Any:
    """Opens a progress bar, given how many units in all and how many are done already."""
    from ..stages.progress import progress

    def open_bar(total: int, done: int) -> AbstractContextManager[Any]:
        bar: Any = progress(total, what, unit)
        bar.initial = bar.n = done
        bar.refresh()
        return bar  # type: ignore[no-any-return]

    return open_bar
