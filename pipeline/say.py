"""The one way to the terminal: what commands say is escaped here, whatever names it holds."""

import typer

from ..storage.shown import shown_lines


def say(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print lines on stdout, or stderr; only line ends keep their meaning (`storage/shown.py`)."""
    typer.echo(shown_lines(text), err=err, nl=nl)
