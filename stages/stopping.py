"""Ending when asked to: a signal is noted, and obeyed once the state is safe."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def signals_asked() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C instead of dying at once; a second one is obeyed at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set handlers
        return

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    for each in before:
        signal.signal(each, note)
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def leave(number: int, runs: Sequence[Path]) -> None:
    """End the process as the signal would have; the checkpoints are written."""
    names = ", ".join(map(str, runs))
    go_on = "goes on from its checkpoint" if len(runs) == 1 else "go on from their checkpoints"
    print(f"Stopped: {names} {go_on}.", file=sys.stderr)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
