"""--cache-dir and --cache-size: where shards of a store at an address are kept, and how many."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..storage.shard_cache import CACHE_DIR, CACHE_SIZE, DEFAULT_SIZE, parse_bytes

_PANEL = "How it runs"

CacheDir = Annotated[
    Path | None,
    typer.Option(
        help="Where files of a store at an address are kept, to be read from there the next time. "
        f"Default: {CACHE_DIR}, or ~/.cache/sae-pipe.",
        rich_help_panel=_PANEL,
    ),
]
CacheSize = Annotated[
    str | None,
    typer.Option(
        help="What they may take, such as 50GB; the least recently used are given up. Default: "
        f"{CACHE_SIZE}, or {DEFAULT_SIZE}.",
        rich_help_panel=_PANEL,
    ),
]


def use_cache(folder: Path | None, size: str | None) -> None:
    """Set the cache of this process and of the workers that it starts."""
    if folder is not None:
        os.environ[CACHE_DIR] = str(folder.absolute())
    if size is not None:
        parse_bytes(size)  # a size that is none is told now
        os.environ[CACHE_SIZE] = size
