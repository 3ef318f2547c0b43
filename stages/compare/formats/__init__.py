"""How a comparison is written: the registry of formats."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ....storage.errors import InputError

if TYPE_CHECKING:
    from ..table import Comparison

# "module:function" below this folder; the function gives the whole text.
FORMATS: dict[str, str] = {
    "terminal": "terminal:render",
    "markdown": "markdown:render",
    "csv": "csv:render",
    "latex": "latex:render",
}


def render(comparison: Comparison, form: str) -> str:
    """The comparison as text, ending in a newline. InputError lists the known formats."""
    if form not in FORMATS:
        raise InputError(f"Unknown format {form!r}: choose one of {', '.join(FORMATS)}.")
    module, _, function = FORMATS[form].partition(":")
    return str(getattr(import_module(f".{module}", __name__), function)(comparison))
