"""SAEs as other tools keep them: FORMATS is the one list.

To add a format: one file here, one line in FORMATS; the contract tests in tests/test_sae_formats.py
run over the registry, and `sae-pipe export` and `import` derive their choices from it. Classes are
named by strings, so that listing the names at start-up does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

from ...storage.errors import InputError

if TYPE_CHECKING:
    from .base import SaeFormat


class FormatEntry(NamedTuple):
    """where: "module:Class" below this folder; about: what loads it, for the help text."""

    where: str
    about: str


FORMATS: dict[str, FormatEntry] = {
    "saelens": FormatEntry("saelens:SaeLens", "for SAELens 6"),
    "dictionary_learning": FormatEntry(
        "dictionary_learning:DictionaryLearning", "for dictionary_learning"
    ),
    "sparsify": FormatEntry("sparsify:Sparsify", "for sparsify (TopK only)"),
    "safetensors": FormatEntry("safetensors:Plain", "one file with everything in it"),
    "saebench": FormatEntry(
        "saebench:SaeBench", "dictionary_learning's layout, as SAEBench's loaders check it"
    ),
}


def get_format(name: str) -> SaeFormat:
    """The format of that name; InputError lists the known ones."""
    if name not in FORMATS:
        raise InputError(f"Unknown format {name!r}: choose one of {', '.join(FORMATS)}.")
    module, _, attribute = FORMATS[name].where.partition(":")
    return cast("SaeFormat", getattr(import_module(f".{module}", __name__), attribute)())


__all__ = ["FORMATS", "get_format"]
