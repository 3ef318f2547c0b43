"""What the leading process tells its workers, and what they answer: plain data, no code.

It travels from process to process and is never stored.
"""

from dataclasses import dataclass
from typing import Any

from ..storage import errors
from ..storage.errors import SaePipeError
from ..storage.layout import Layout
from .masking import MaskConfig
from .row_map import KeepRule, Span


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The model that a worker loads.

    source: an absolute folder, or a Hub id with its commit; revision: what pins it; device: as
    asked for; spread: worker i takes the i-th GPU of the machine (workers that we started).
    """

    source: str
    commit: str | None
    revision: str
    layers: tuple[int, ...]
    hook: str
    dtype: str
    device: str
    spread: bool


@dataclass(frozen=True, kw_only=True)
class RowsSpec:
    """One `row_map.RowMap`. corpus: absolute path."""

    corpus: str
    split: str
    rule: KeepRule
    mask: MaskConfig
    shuffle_seed: int | None


@dataclass(frozen=True, kw_only=True)
class PassSpec:
    """One `harvest_run.Pass`. stores: layer -> absolute paths of the stores that take its rows."""

    label: str
    split: str
    rule: KeepRule
    mask: MaskConfig
    shuffle_seed: int | None
    cuts: tuple[int, ...]
    first_row: int
    layout: Layout
    batch_contexts: int
    stores: dict[int, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run of the harvest command: what all its blocks have in common.

    run: unlike that of any other run; digests: `rows_digest` of each store, by its absolute path.
    """

    run: str
    model: ModelSpec
    passes: tuple[PassSpec, ...]
    digests: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One block. attempt: unlike that of any other try of any block; threads: this worker's share
    of its machine's cores."""

    pass_number: int
    block: int
    span: Span
    missing: tuple[int, ...]
    attempt: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """A worker as it sees itself. device: its kind, cpu, cuda or mps; unseen: a store's manifest
    that it was asked to look for and cannot see as it is."""

    host: str
    cores: int
    memory_bytes: int
    device: str
    device_name: str
    versions: dict[str, str]
    unseen: str | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a task gives back: a value, or the sentence for the user and which error it is."""

    value: Any = None
    error: str | None = None
    message: str = ""

    def get(self) -> Any:
        """The value; raises the error."""
        if self.error is not None:
            kind: type[SaePipeError] = getattr(errors, self.error)
            raise kind(self.message)
        return self.value
