"""Evaluation sets: what can be built, each from a draft (tokens and labels, no activations yet).

To add a suite: one file here with a function `draft(making) -> Draft`, one line in SUITES. Functions are named by
strings, so that listing the names imports neither torch nor transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...storage.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One kind of evaluation set. where: module and function of its draft; about: a line for help;
    poolings: those it can have, its own first; limits: what `--limit` counts; seed: of its draws
    unless another is given.
    """

    where: str
    about: str
    poolings: tuple[str, ...]
    limits: str
    seed: int = 0

    @property
    def draft(self) -> Callable[[Any], Any]:
        """The function that drafts it."""
        module, _, name = self.where.partition(":")
        found: Callable[[Any], Any] = getattr(import_module(f".{module}", __name__), name)
        return found


# The published protocol of sae-probes draws with seed 42.
SUITES: dict[str, Suite] = {
    "letters": Suite(
        where="letters:draft",
        about="words of the tokenizer's vocabulary, labelled by their first letter",
        poolings=("marked",),
        limits="words",
    ),
    "ood": Suite(
        where="ood:draft",
        about="the out-of-distribution sets of sae-probes",
        poolings=("last", "mean"),
        limits="training texts of a task",
        seed=42,
    ),
    "probes": Suite(
        where="probes:draft",
        about="the binary tasks of sae-probes",
        poolings=("last", "mean"),
        limits="training texts of a task, and its test texts",
        seed=42,
    ),
    "core": Suite(
        where="core:draft",
        about="held-out text without labels",
        poolings=("all",),
        limits="rows",
    ),
    "csv": Suite(
        where="labelled:draft",
        about="your own labelled texts (--csv)",
        poolings=("last", "mean", "marked"),
        limits="texts of a file",
    ),
}


def get_suite(name: str) -> Suite:
    """The suite of that name; InputError lists the known ones."""
    if name not in SUITES:
        raise InputError(f"Unknown suite {name!r}: choose one of {', '.join(SUITES)}.")
    return SUITES[name]


__all__ = ["SUITES", "Suite", "get_suite"]
