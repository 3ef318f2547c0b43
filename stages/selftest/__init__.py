"""The self-test: planted cases whose answers are known, through the code that judges SAEs.

Whatever goes in is made here by hand, so small and plain that each answer can be worked out with
pencil and paper; the answers stand beside the data. To add a case: a function that yields a `Check`
for each number, and one line in CASES. Functions are named by strings, so that listing the names
imports nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from importlib import import_module

from ...storage.errors import InputError
from .base import Check, Outcome

CASES: dict[str, str] = {
    "reconstruction": "rows:reconstruction",
    "shrinkage": "rows:shrinkage",
    "other definitions": "rows:other_definitions",
    "pursuit": "rows:pursuit",
    "intervals": "rows:intervals",
    "absorption": "letters:absorption",
    "probing": "probing:probing",
    "shifted": "probing:shifted",
    "shortcut": "probing:shortcut",
    "ablated concepts": "ablated:concepts",
    "spurious label": "ablated:spurious",
    "language model": "language_model:downstream",
    "hier4": "toys:hier4",
    "tree20": "toys:tree20",
    "masked tokens": "toys:masked_tokens",
    "masked fits": "toys:masked_fits",
}


def run(names: Sequence[str] = ()) -> Iterator[Outcome]:
    """The cases of these names, or all of them, one number after another.

    A case that raises gives an outcome with the error, and the others go on. InputError lists the
    known names.
    """
    for name in names:
        if name not in CASES:
            raise InputError(f"Unknown case {name!r}: choose from {', '.join(CASES)}.")
    for name in names or CASES:
        begun = time.perf_counter()
        try:
            checks = list(_case(name))
        except Exception as error:  # a failure of ours is what is looked for
            failed = f"{type(error).__name__}: {error}"
            yield Outcome(case=name, error=failed, seconds=time.perf_counter() - begun)
            continue
        each = (time.perf_counter() - begun) / max(len(checks), 1)
        for check in checks:
            yield Outcome(case=name, check=check, seconds=each)


def _case(name: str) -> Iterator[Check]:
    module, _, function = CASES[name].partition(":")
    found: Iterator[Check] = getattr(import_module(f".{module}", __name__), function)()
    return found


__all__ = ["CASES", "Check", "Outcome", "run"]
