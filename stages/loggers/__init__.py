"""Where else the lines of metrics.jsonl go: LOGGERS is the one list.

To add one: one file here, one line in LOGGERS, one extra in pyproject.toml. Classes are named by
strings, and packages imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from ...storage.errors import InputError

if TYPE_CHECKING:
    from .base import Logger

# The name is that of the package and of the extra, too.
LOGGERS: dict[str, str] = {
    "tensorboard": "tensorboard:TensorBoard",
    "wandb": "wandb:Wandb",
}


def check_loggers(names: Sequence[str]) -> None:
    """InputError for a name that is not known."""
    for name in names:
        if name not in LOGGERS:
            known = ", ".join(sorted(LOGGERS))
            raise InputError(f"Unknown logger {name!r} for --log-to: choose from {known}.")


def get_logger(name: str) -> type[Logger]:
    """The class of a name. InputError with the command when its package is not installed."""
    check_loggers([name])
    if find_spec(name) is None:
        raise InputError(
            f"--log-to {name} needs the package {name}, which is not installed. Install it: "
            f"pip install 'sae-pipe[{name}]'."
        )
    module, _, attribute = LOGGERS[name].partition(":")
    return cast("type[Logger]", getattr(import_module(f".{module}", __name__), attribute))


__all__ = ["LOGGERS", "check_loggers", "get_logger"]
