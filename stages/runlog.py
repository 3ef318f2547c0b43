"""What running fits tell: lines for metrics.jsonl, a progress bar, or sparse lines in a log."""

import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .loggers.base import Logger
from .progress import progress
from .rundir import Line, RunFolder

_WRITE_EVERY_S = 5.0  # lines wait in memory that long, unless a checkpoint comes first


def to_numbers(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Read all tensors of a step with a single wait for the device."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    read = torch.stack([value.float() for value in tensors.values()]).tolist()
    numbers = dict(zip(tensors, read, strict=True))
    return {
        name: numbers[name] if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


class RunLog:
    """Collects the lines of one run and writes them in batches."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        first_step: int,
        batch_size: int,
        loggers: Sequence[Logger] = (),
    ) -> None:
        """first_step: updates done before; loggers: are given every line, too."""
        self._folder, self._batch_size, self._loggers = folder, batch_size, list(loggers)
        self._lines: list[Line] = []
        self._written = self._previous = time.monotonic()
        self._previous_step, self._previous_waited_s = first_step, 0.0

    def record(
        self, step: int, values: Mapping[str, float], heldout: Mapping[str, float], waited_s: float
    ) -> Line:
        """Add the line of a step: its losses, what held-out rows say, and the speed since the last.

        waited_s: seconds that this process has waited for data so far.
        """
        now = time.monotonic()
        seconds = max(now - self._previous, 1e-9)
        line: Line = {
            "step": step,
            "tokens": step * self._batch_size,
            **values,
            **{f"heldout_{name}": value for name, value in heldout.items()},
            "rows_per_s": (step - self._previous_step) * self._batch_size / seconds,
            "wait_share": min(1.0, (waited_s - self._previous_waited_s) / seconds),
        }
        self._previous, self._previous_step, self._previous_waited_s = now, step, waited_s
        self._lines.append(line)
        self._tell(line)
        if now - self._written > _WRITE_EVERY_S:
            self.flush()
        return line

    def _tell(self, line: Line) -> None:
        values = {name: value for name, value in line.items() if name != "step"}
        for logger in list(self._loggers):
            try:
                logger.log(line["step"], values)
            except Exception as error:  # noqa: BLE001 - a service that is down ends no fit
                self._loggers.remove(logger)
                name = type(logger).__name__
                print(
                    f"{self._folder.path}: {name} is left out from here on: {error}",
                    file=sys.stderr,
                )

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        for logger in self._loggers:
            logger.close()
        self._loggers = []

    def flush(self, *, durably: bool = False) -> None:
        """Put all lines into the file; durably: even if the power is cut."""
        self._folder.append_metrics(self._lines, durably=durably)
        self._lines, self._written = [], time.monotonic()


class SweepBar:
    """Where the runs of a sweep are, on standard error: one bar for all of them."""

    def __init__(self, what: str, *, steps: int, first_step: int, show: bool) -> None:
        """steps: of the longest run; first_step: updates of the one that is furthest behind."""
        self._bar = progress(steps, what, "steps", show=show)
        self._bar.initial = self._bar.n = first_step
        self._shown: list[Line] = []

    def show(self, step: int, lines: Sequence[Line]) -> None:
        """The batch that was given out last, and the last line of each run that took it; cheap."""
        self._bar.update(step - self._bar.n)
        if lines and lines != self._shown:
            self._shown = list(lines)
            self._bar.set_postfix_str(_status(lines), refresh=False)

    def say(self, line: str) -> None:
        """Show a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def _status(lines: Sequence[Line]) -> str:
    last = lines[-1]
    speed = f"{last['rows_per_s']:,.0f} rows/s, wait {last['wait_share']:.0%}"
    loss, ev, l0, dead = (
        _range([line[key] for line in lines], form)
        for key, form in (
            ("loss", ".4f"),
            ("explained_variance", ".3f"),
            ("l0", ".1f"),
            ("dead", ".0f"),
        )
    )
    return f"loss {loss}, EV {ev}, L0 {l0}, dead {dead}, {speed}"


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
