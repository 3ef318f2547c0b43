"""How errors reach the user: one sentence and exit code 2; our own bugs keep their traceback.

Of several processes that torchrun has started for one command, the first tells what all of them meet.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

USER_ERROR, HELD, INTERRUPTED = 2, 3, 130  # HELD: a catalogue has what was to be harvested
_LONGEST = 4000  # characters of an error that are printed


def told_to_the_user(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: errors of the user's making are printed as `Error: ...` on stderr."""
    return _told(command, lambda: True)


def told_once(command: Callable[P, R]) -> Callable[P, R]:
    """The same for a command that torchrun may start several times, with the same flags.

    What those have in common, wrong flags and Ctrl-C, is told by the first process. Once they know
    of one another, in `fitting.in_group`, it is told there.
    """
    return _told(command, _is_first)


def _is_first() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _told(command: Callable[P, R], may_speak: Callable[[], bool]) -> Callable[P, R]:
    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        from ..storage.errors import SaePipeError
        from ..storage.interrupts import ctrl_c_reaches_threads

        try:
            with ctrl_c_reaches_threads():
                return command(*args, **kwargs)
        except SaePipeError as error:
            if may_speak():
                tell(error)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            if may_speak():
                print(
                    "Interrupted. What is done is kept: run the same command again to go on.",
                    file=sys.stderr,
                )
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def tell(error: Exception) -> None:
    """Print an error as the user is to see it."""
    from ..storage.shown import shown

    text = shown(str(error))
    if len(text) > _LONGEST:  # a name from a file can have any length; what to do stands at the end
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    print(f"Error: {text}", file=sys.stderr, flush=True)
