"""Progress of anything long: how much, how fast, how long still."""

import sys
from typing import Any

from tqdm import tqdm

_LINE_EVERY_S = 30.0  # where nobody watches, a line now and then instead of a moving bar


def progress(total: int | None, what: str, unit: str, *, show: bool = True) -> Any:
    """A tqdm bar on stderr with rate and ETA; sparse lines when stderr is not a terminal."""
    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        unit_scale=True,
        disable=not show,
        dynamic_ncols=is_terminal,
        mininterval=0.5 if is_terminal else _LINE_EVERY_S,
        maxinterval=_LINE_EVERY_S,
        smoothing=0.05,
        file=sys.stderr,
    )
