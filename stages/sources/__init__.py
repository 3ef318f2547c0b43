"""Text sources: from --dataset to numbered records of text. SOURCES is the one list of kinds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...storage.errors import InputError
from .base import Reader, Record, RecordStream, TextConfig, TextSource
from .files import find_files, looks_local, suffix_of
from .hub import HubReader, is_hub_id, unknown_dataset
from .jsonl import JsonlReader
from .parquet import ParquetReader
from .recipes import RECIPES, apply_recipe
from .txt import TxtReader

__all__ = [
    "DEFAULT_COLUMN",
    "DEFAULT_SPLIT",
    "RECIPES",
    "SOURCES",
    "Record",
    "RecordStream",
    "TextConfig",
    "TextSource",
    "open_text",
]

# A kind with suffixes reads local files of that name, as KIND(path, relative name).
SOURCES: dict[str, type[Reader]] = {
    "hub": HubReader,
    "jsonl": JsonlReader,
    "parquet": ParquetReader,
    "txt": TxtReader,
}

DEFAULT_COLUMN = "text"
DEFAULT_SPLIT = "train"


def open_text(config: TextConfig) -> TextSource:
    """The records of a recipe's name, local text (file, folder or glob), or a Hub dataset."""
    config = apply_recipe(config)
    suffixes = {suffix: kind for kind in SOURCES.values() for suffix in kind.suffixes}
    column = config.text_column or DEFAULT_COLUMN
    has_suffix = suffix_of(Path(config.dataset), list(suffixes)) is not None
    if has_suffix or looks_local(config.dataset):
        for flag, value in (("--split", config.split), ("--revision", config.revision)):
            if value is not None:
                raise InputError(
                    f"Dataset {config.dataset!r} is local text, which has no {flag[2:]} {value!r}. "
                    f"Leave {flag} out, or pass a Hub dataset id."
                )
        readers = _file_readers(config.dataset, suffixes)
        return TextSource(config.dataset, "files", readers, column, config.filter)
    if not is_hub_id(config.dataset):
        raise unknown_dataset(config.dataset)
    hub = HubReader(config.dataset, config.split or DEFAULT_SPLIT, config.revision)
    return TextSource(config.dataset, "hub", [hub], column, config.filter)


def _file_readers(dataset: str, kinds: Mapping[str, Any]) -> list[Reader]:
    readers = []
    for path, name in find_files(dataset, list(kinds)):
        suffix = suffix_of(path, list(kinds))
        assert suffix is not None  # find_files gives no other
        readers.append(kinds[suffix](path, name))
    return readers
