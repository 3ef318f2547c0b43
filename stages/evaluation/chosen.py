"""Which metrics are asked for: names and kinds of the command line, as instances to make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ...storage.errors import InputError
from ..metrics import METRICS, metric_class
from ..metrics.base import Needs
from .cases import Asked

KINDS: tuple[str, ...] = (*get_args(Needs), "all")
COMPAT = {"saebench": ("compat_saebench",)}  # what --compat adds


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Metrics by what they need; by_name: those that were named one by one."""

    rows: tuple[Asked, ...]
    items: tuple[Asked, ...]
    text: tuple[Asked, ...]
    by_name: frozenset[str]

    def for_suite(self, suite: str) -> list[Asked]:
        """Metrics over items that can judge on a suite."""
        return [asked for asked in self.items if suite in metric_class(asked.name).suites]

    def suites_of(self, name: str) -> str:
        """Which suites a metric over items can judge on, as a sentence names them."""
        return f"suite {' or '.join(metric_class(name).suites)}"

    @property
    def items_by_name(self) -> list[str]:
        """Metrics over items that were named, for which there has to be a set."""
        return [asked.name for asked in self.items if asked.name in self.by_name]


def choose_metrics(
    names: Sequence[str] | None,
    compat: Sequence[str] = (),
    *,
    rows: int | None = None,
    contexts: int | None = None,
    ito_k: Sequence[int] = (),
) -> Chosen:
    """The metrics of names and kinds; None is all over rows and items that are computed by default.

    rows: at most so many rows are looked at; contexts: so many contexts of text; ito_k: of
    inference-time optimisation. InputError for an unknown name.
    """
    chosen: dict[str, None] = {}
    for name in ("rows", "items") if names is None else names:
        if name in KINDS:
            of_kind = (
                each
                for each, entry in METRICS.items()
                if entry.by_default and name in (entry.needs, "all")
            )
            chosen |= dict.fromkeys(of_kind)
        elif name in METRICS:
            chosen[name] = None
        else:
            raise InputError(
                f"Unknown metric {name!r}: choose of {', '.join(sorted(METRICS))}, or a kind "
                f"({', '.join(KINDS)})."
            )
    for name in compat:
        if name not in COMPAT:
            raise InputError(
                f"Unknown suite {name!r} for --compat: choose one of {', '.join(COMPAT)}."
            )
        chosen |= dict.fromkeys(COMPAT[name])
    samples = {"rows": ("first_rows", rows), "items": ("", None), "text": ("contexts", contexts)}
    asked: dict[str, list[Asked]] = {needs: [] for needs in samples}
    for name in sorted(chosen):
        needs = METRICS[name].needs
        key, count = samples[needs]
        asked[needs].append(
            Asked(
                name=name,
                arguments={"ks": tuple(ito_k)} if name == "ito" else {},
                sample={} if count is None else {key: count},
            )
        )
    return Chosen(
        **{needs: tuple(found) for needs, found in asked.items()},
        by_name=frozenset(names or ()) & METRICS.keys(),
    )
