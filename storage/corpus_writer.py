"""Writing a token corpus: the arrays slice by slice, then corpus.json, which declares it complete.

Zarr writes each chunk to a temporary name and renames it, but does not flush it to the disk; that
is done here, before corpus.json is written.
"""

# C contexts, T positions in a context.

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from .corpus import CORPUS_FORMAT, CORPUS_JSON, TokenTable, chunk_contexts, corpus_digest
from .disk import link_or_copy
from .files import disk_error, file_digest, fsync_folder, write_json

# Level 3 packs real token ids 3.25 times at 110 MB/s; level 9 gives 3.75 times at 20 MB/s.
_ZSTD_LEVEL = 3

Slices = Callable[[int, int], dict[str, NDArray[np.uint32]]]


def create_groups(folder: Path) -> None:
    """Make the Zarr groups of an empty corpus."""
    root = zarr.open_group(folder, mode="w", zarr_format=3)
    root.create_group("train")
    root.create_group("heldout")


def write_split(
    folder: Path,
    split: str,
    n_contexts: int,
    context_size: int,
    slices: Slices,
    *,
    there: TokenTable | None = None,
) -> None:
    """Write the four arrays of a split.

    slices(start, stop) gives the stored contexts of that range, as `tokens` and `document` (C, T)
    and `length` and `origin` (C,). there: contexts that the first ones are; whole chunks of them are
    taken over as files, and not asked for.
    """
    group = zarr.open_group(folder / split, mode="r+")
    step = chunk_contexts(context_size)
    shapes = {
        "tokens": (n_contexts, context_size),
        "document": (n_contexts, context_size),
        "length": (n_contexts,),
        "origin": (n_contexts,),
    }
    arrays = {name: _create(group, name, shape, step) for name, shape in shapes.items()}
    try:
        n_there = 0 if there is None else there.n_contexts // step
        if there is not None:
            for name in arrays:
                _take_over(there.folder / split / name, folder / split / name, n_there)
        # Whole chunks at a time: a chunk is written once.
        for start in range(n_there * step, n_contexts, step):
            stop = min(start + step, n_contexts)
            for name, values in slices(start, stop).items():
                arrays[name][start:stop] = values
    except OSError as error:
        raise disk_error(error, folder / split) from error


def _take_over(there: Path, array: Path, n_chunks: int) -> None:
    """Give an array the files of the first chunks of another."""
    for file in sorted(path for path in (there / "c").rglob("*") if path.is_file()):
        below = file.relative_to(there)
        if int(below.parts[1]) < n_chunks:
            (array / below).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, array / below)


def _create(group: zarr.Group, name: str, shape: tuple[int, ...], step: int) -> "zarr.Array[Any]":
    return group.create_array(
        name,
        shape=shape,
        chunks=(step, *shape[1:]),
        dtype="uint32",
        compressors=[ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()],
        dimension_names=("context", "position")[: len(shape)],
        # Without this a chunk of zeros is not written, and cannot be told from a lost one.
        config={"write_empty_chunks": True},
    )


def complete(folder: Path, info: dict[str, Any]) -> None:
    """Flush every file and write corpus.json: `info`, the list of files, and the digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    recorded = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        recorded[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inner)
    whole = {"format": CORPUS_FORMAT, **info, "files": recorded}
    write_json(folder / CORPUS_JSON, {**whole, "digest": corpus_digest(whole)})
