"""What every metric is: its kinds, and the values that it gives. Imports no torch.

# I items of a task, D d_in, S d_sae

A metric is a class in a file of its own that begins with its definition, and a line in METRICS. Its
kind says what it needs: rows (activations), items (labelled texts or words), or text (the language
model). The class says in one line each what it is (`definition`), which way is better
(`direction`), and counts `version` up when its numbers change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_array
    from torch import Tensor

    from ..evaluation.judged import Judged
    from ..evaluation.text import TextBatch
    from .rows import Moments, RowBatch

Direction = Literal["up", "down", "none"]
Needs = Literal["rows", "items", "text"]


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number with its 95 % interval. None: not defined, or no interval.

    replicates: the value in each bootstrap resample, None where a resample does not define it.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    replicates: tuple[float | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """What a metric found: values by name, of how much, with what interval.

    sample: how many rows, documents, words ... it is over; interval: how intervals were made;
    details: anything else worth keeping, as JSON has it.
    """

    values: Mapping[str, Value]
    sample: Mapping[str, int]
    interval: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Metric(Protocol):
    """What all kinds have."""

    definition: ClassVar[str]
    direction: ClassVar[Direction]
    version: ClassVar[int]

    @property
    def options(self) -> Mapping[str, Any]:
        """What decides the numbers beside data and seed, as JSON has it."""
        ...


class RowMetric(Metric, Protocol):
    """Judges activations and their reconstructions; one fresh instance for each SAE and source."""

    def observe(self, batch: RowBatch) -> None:
        """Count one batch."""
        ...

    def values(self, data: Moments) -> dict[str, float]:
        """The values over all rows so far; NaN where the rows do not define one.

        data: moments of the same rows.
        """
        ...

    def result(self, data: Moments, *, seed: int) -> MetricResult:
        """The same with intervals."""
        ...


@dataclass
class TaskData:
    """One task of an evaluation set, shared by all SAEs and metrics.

    x_ID: activations, float32, pooled (last token, marked word, or mean over tokens); label_I,
    group_I: -1 is none; split_I: 0 train, 1 test, 2 out of distribution; texts: of each item;
    cache: what is worked out once for all SAEs, such as ground-truth probes.
    """

    name: str
    suite: str
    classes: list[str]
    groups: list[str] | None
    x_ID: NDArray[np.float32]
    label_I: NDArray[np.int32]
    group_I: NDArray[np.int32]
    split_I: NDArray[np.uint8]
    document_I: NDArray[np.int64]
    texts: Sequence[str]
    seed: int
    cache: dict[str, Any] = field(default_factory=dict)


class ItemMetric(Metric, Protocol):
    """Judges latents on labelled items; one fresh instance for each SAE and evaluation set."""

    suites: ClassVar[tuple[str, ...]]  # which suites of evaluation sets it can judge on

    def observe(self, task: TaskData, judged: Judged, latents_IS: csr_array) -> None:
        """One task: latents of its items, pooled as the activations are, float32 (I, S)."""
        ...

    def result(self, *, seed: int) -> MetricResult:
        """Over all tasks so far."""
        ...


class TextMetric(Metric, Protocol):
    """Judges what reconstructions do to the language model; one instance for all SAEs of a source,
    so that what does not depend on the SAE is done once."""

    def observe(self, text: TextBatch, judged: Sequence[Judged]) -> None:
        """One batch of contexts."""
        ...

    def result(self, judged: Judged, *, seed: int) -> MetricResult:
        """Of one SAE, over all contexts so far."""
        ...


def to_float64(values: Tensor) -> Tensor:
    """float64, for sums; on the CPU where the device (Apple's) has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()
