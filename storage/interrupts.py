"""Ctrl-C, told to threads that wait: the main thread is only free once they have ended."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = threading.Event()


@contextmanager
def ctrl_c_reaches_threads() -> Iterator[None]:
    """Set `INTERRUPTED` on Ctrl-C, before KeyboardInterrupt is raised as ever.

    Leaves handlers alone that somebody else has set.
    """
    INTERRUPTED.clear()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        INTERRUPTED.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
