"""What a running fit tells: lines for metrics.jsonl, a progress bar, or sparse lines in a log."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
    """Collects lines, writes them in batches, and shows where the run is."""

    def __init__(
        self, folder: RunFolder, *, steps: int, first_step: int, batch_size: int, show: bool
    ) -> None:
        """first_step: updates done before; show: whether anything goes to standard error."""
        self._folder, self._batch_size = folder, batch_size
        self._lines: list[Line] = []
        self._written = self._previous = time.monotonic()
        self._previous_step, self._previous_waited_s = first_step, 0.0
        self._bar = progress(steps, folder.path.name, "steps", show=show)
        self._bar.initial = self._bar.n = first_step

    def advance(self) -> None:
        """Count one step; cheap."""
        self._bar.update()

    def say(self, line: str) -> None:
        """Show a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=sys.stderr)

    def record(
        self, step: int, values: Mapping[str, float], heldout: Mapping[str, float], waited_s: float
    ) -> None:
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
        if now - self._written > _WRITE_EVERY_S:
            self.flush()
        self._bar.set_postfix_str(_status(line), refresh=False)

    def flush(self, *, durably: bool = False) -> None:
        """Put all lines into the file; durably: even if the power is cut."""
        self._folder.append_metrics(self._lines, durably=durably)
        self._lines, self._written = [], time.monotonic()

    def close(self) -> None:
        """Write what is left and end the bar."""
        self.flush()
        self._bar.close()


def _status(line: Mapping[str, Any]) -> str:
    return (
        f"loss {line['loss']:.4f}, EV {line['explained_variance']:.3f}, L0 {line['l0']:.1f}, "
        f"dead {line['dead']:.0f}, {line['rows_per_s']:,.0f} rows/s, wait {line['wait_share']:.0%}"
    )
