"""How errors reach the user: one sentence and exit code 2; our own bugs keep their traceback."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

USER_ERROR, INTERRUPTED = 2, 130


def told_to_the_user(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: errors of the user's making are printed as `Error: ...` on stderr."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        from ..storage.errors import SaePipeError
        from ..storage.interrupts import ctrl_c_reaches_threads

        try:
            with ctrl_c_reaches_threads():
                return command(*args, **kwargs)
        except SaePipeError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            print(
                "Interrupted. What is done is kept: run the same command again to go on.",
                file=sys.stderr,
            )
            raise typer.Exit(INTERRUPTED) from None

    return wrapped
