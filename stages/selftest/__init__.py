"""Metrics on planted cases whose answers are known: a user's proof that they are right here.

A case is a function that makes data with a known truth, judges it by the code that judges SAEs, and
yields a `Check` for each number. What goes in is so small and plain that each answer can be worked
out with pencil and paper; how stands beside it. To add a case: a function here below, one line in
CASES. Cases are named by strings, so that listing them imports no torch.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module

from ...storage.errors import InputError
from .base import CaseResult, Check

CASES: dict[str, str] = {
    "reconstruction": "of_rows:reconstruction",
    "shrinkage": "of_rows:shrinkage",
    "other definitions": "of_rows:other_definitions",
    "inference-time optimisation": "of_rows:pursuit",
    "intervals": "of_rows:intervals",
    "absorption": "of_letters:absorption",
    "probing": "of_labels:probing",
    "out of distribution": "of_labels:out_of_distribution",
    "shortcut": "of_labels:shortcut",
    "targeted perturbation": "of_ablation:targeted_perturbation",
    "spurious correlation removal": "of_ablation:spurious_correlation",
    "a language model by hand": "of_text:counting_model",
    "a language model as it was": "of_text:model_as_it_was",
    "toy hier4": "of_toys:hier4",
    "toy tree20": "of_toys:tree20",
    "toy masked_tokens": "of_toys:masked_tokens",
    "fits on masked_tokens": "of_toys:masked_fits",
}


def run_cases(names: Sequence[str] = ()) -> Iterator[CaseResult]:
    """The named cases, or all, one after another. InputError lists the known names.

    What a case raises is our bug and one of the answers: it is kept, and the others go on.
    """
    for name in names:
        if name not in CASES:
            raise InputError(f"Unknown case {name!r}: choose from {', '.join(CASES)}.")
    for name in names or CASES:
        module, _, function = CASES[name].partition(":")
        begun, error, checks = time.monotonic(), None, list[Check]()
        try:
            checks += getattr(import_module(f".{module}", __name__), function)()
        except Exception:  # noqa: BLE001 - kept, told, and the exit code is 1
            error = traceback.format_exc()
        yield CaseResult(
            case=name, checks=tuple(checks), seconds=time.monotonic() - begun, error=error
        )


__all__ = ["CASES", "CaseResult", "Check", "run_cases"]
