"""Ending when asked to: a signal is noted, and obeyed once the state is safe."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

_collecting: list[list[int]] = []


def ask(number: int) -> None:
    """Ask what runs in this process to end, as a signal of that number would."""
    for asked in _collecting:
        asked.append(number)


@contextmanager
def signals_asked() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C instead of dying at once; a second one is obeyed at once.

    Only the main thread may set handlers: in another only `ask` can ask.
    """
    asked: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    _collecting.append(asked)
    try:
        with _handled(asked) if is_main else nullcontext():
            yield asked
    finally:
        _collecting[:] = [each for each in _collecting if each is not asked]


@contextmanager
def _handled(asked: list[int]) -> Iterator[None]:
    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    for each in before:
        signal.signal(each, note)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def leave(number: int, runs: Sequence[Path]) -> None:
    """End the process as the signal would have; the checkpoints are written."""
    names = ", ".join(map(str, runs))
    go_on = "goes on from its checkpoint" if len(runs) == 1 else "go on from their checkpoints"
    if runs:  # none where all were complete by then
        print(f"Stopped: {names} {go_on}.", file=sys.stderr)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
