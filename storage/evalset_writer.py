"""Writing an evaluation set: manifest first, then everything but the activations, then those chunk
by chunk, then the manifest that declares it complete.

A chunk of activations is written whole or not at all, and all others before it are there already:
a set that was interrupted goes on at its first missing chunk, with nothing else to remember.
"""

# N rows, I items, D d_in, R rows of a chunk

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import provenance, zarr_metadata
from .errors import InputError
from .evalset import (
    BUILDING,
    COMPLETE,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    POOLINGS,
    TOKENIZER,
    EvalSet,
    Task,
    content_digest,
    open_evalset,
    read_manifest,
)
from .evalset_arrays import ACTIVATIONS, ARRAYS, Sizes, chunk_path, decode_chunk, encode_chunk
from .files import file_digest, remove_leftovers, write_json, write_whole
from .lock import sole_writer

CHUNK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All of a set but its activations. Arrays by item (I,) and by row (N,), as `EvalSet` has them.

    Raises AssertionError for what a builder must not make: items or tasks out of order, an item
    without a row, a label that its task does not name.
    """

    suite: str
    pooling: str
    tasks: Sequence[Task]
    texts: Sequence[str]
    item_task: ArrayLike
    item_label: ArrayLike
    item_split: ArrayLike
    item_document: ArrayLike
    row_item: ArrayLike
    row_token: ArrayLike
    row_position: ArrayLike
    item_group: ArrayLike | None = None

    def __post_init__(self) -> None:
        arrays = self.arrays()
        n_items, task_I = len(self.texts), arrays["items/task"]
        assert self.pooling in POOLINGS, self.pooling
        for name, values in arrays.items():
            if name.startswith("items/") and name != "items/text":
                assert values.shape == (n_items,), name
            assert not name.startswith("rows/") or len(values) == len(arrays["rows/item"]), name
        for numbers, n in ((arrays["rows/item"], n_items), (task_I, len(self.tasks))):
            if n:
                assert np.array_equal(np.unique(numbers), np.arange(n)), "a gap"
                assert (np.diff(numbers) >= 0).all(), "out of order"
        n_classes = np.array([*(len(task.classes) for task in self.tasks), 0])
        n_groups = np.array([*(len(task.groups or ()) for task in self.tasks), 0])
        assert (arrays["items/label"] < n_classes[task_I]).all()
        assert (arrays["items/group"] < n_groups[task_I]).all()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array but the activations, by name."""
        pieces = [text.encode() for text in self.texts]
        group = np.full(len(pieces), -1) if self.item_group is None else self.item_group
        found: dict[str, ArrayLike] = {
            "rows/item": self.row_item,
            "rows/token": self.row_token,
            "rows/position": self.row_position,
            "items/task": self.item_task,
            "items/label": self.item_label,
            "items/group": group,
            "items/split": self.item_split,
            "items/document": self.item_document,
            "items/text": np.frombuffer(b"".join(pieces), np.uint8),
            "items/text_end": np.cumsum([len(piece) for piece in pieces]),
        }
        return {name: np.asarray(found[name], ARRAYS[name].dtype) for name in found}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a set is made of. recipe: all that decides about its rows, with model {name, revision,
    architecture}, layer, hook, dtype and so on; tokenizer_json: the text of a tokenizer.json;
    request: what the user asked for; dropped, truncated: how many texts, by reason, were left out
    or cut; execution: how it is computed, kept when a run goes on.
    """

    recipe: Mapping[str, Any]
    tokenizer_json: str
    request: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    truncated: Mapping[str, int] = field(default_factory=dict)
    execution: Mapping[str, Any] = field(default_factory=dict)


class EvalSetWriter:
    """Writes one set. The caller holds the folder's lock (`storage.lock.sole_writer`).

    Begins the set, or goes on with one that has the same recipe and contents; InputError when what
    stands there has others. Raises DiskError when the disk is full.
    """

    def __init__(
        self, path: Path, origin: Origin, contents: Contents, *, d_in: int, chunk_rows: int
    ) -> None:
        self.path = path
        arrays = contents.arrays()
        self.sizes = Sizes(
            n_rows=len(arrays["rows/item"]),
            n_items=len(arrays["items/task"]),
            text_bytes=len(arrays["items/text"]),
            d_in=d_in,
            chunk_rows=chunk_rows,
        )
        begun = read_manifest(path) if (path / MANIFEST).is_file() else None
        self.manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "state": BUILDING,
            "request": dict(origin.request),
            "recipe": dict(origin.recipe),
            "suite": contents.suite,
            "pooling": contents.pooling,
            **asdict(self.sizes),
            "tasks": [asdict(task) for task in contents.tasks],
            "dropped": dict(origin.dropped),
            "truncated": dict(origin.truncated),
            "execution": dict(origin.execution),
            "provenance": begun["provenance"] if begun is not None else _provenance(),
        }
        if begun is None:
            write_json(path / MANIFEST, self.manifest)
        else:
            self._check_same(begun)
            remove_leftovers(path, deep=True)
        self._write_all_but_rows(arrays, origin.tokenizer_json)
        self.next_chunk = self._first_missing()

    @property
    def n_chunks(self) -> int:
        """Chunks of activations."""
        return self.sizes.n_chunks(ACTIVATIONS)

    def rows_of_chunk(self, chunk: int) -> tuple[int, int]:
        """First row, and the row behind the last one."""
        first = chunk * self.sizes.chunk_rows
        return first, min(first + self.sizes.chunk_rows, self.sizes.n_rows)

    def record_run(self, run: dict[str, Any]) -> None:
        """Note one run of the build: device, hardware, time."""
        self.manifest["provenance"]["runs"].append(run)
        write_json(self.path / MANIFEST, self.manifest)

    def write(self, values_RD: NDArray[np.float32]) -> None:
        """Write the next chunk of activations, whole or not at all."""
        first, last = self.rows_of_chunk(self.next_chunk)
        assert values_RD.shape == (last - first, self.sizes.d_in)
        data = encode_chunk(values_RD, self.sizes, ACTIVATIONS)
        write_whole(self.path / chunk_path(ACTIVATIONS, self.next_chunk), data)
        self.next_chunk += 1

    def finish(self) -> EvalSet:
        """Record every file and declare the set complete."""
        assert self.next_chunk == self.n_chunks
        files = [chunk_path(name, i) for name in ARRAYS for i in range(self.sizes.n_chunks(name))]
        files += [*(f"{name}/zarr.json" for name in self._members()), "zarr.json", TOKENIZER]
        self.manifest["files"] = {
            name: {
                "bytes": (self.path / name).stat().st_size,
                "sha256": file_digest(self.path / name),
            }
            for name in sorted(files)
        }
        self.manifest["digest"] = content_digest(self.manifest)
        self.manifest["provenance"]["finished"] = provenance.now()
        self.manifest["state"] = COMPLETE
        write_json(self.path / MANIFEST, self.manifest)
        return open_evalset(self.path)

    def _check_same(self, begun: dict[str, Any]) -> None:
        changing = ("format", "format_version", "state", "request", "provenance", "execution")
        names = [name for name in self.manifest if name not in changing]
        differing = [name for name in names if begun.get(name) != self.manifest[name]]
        if differing:
            raise InputError(
                f"Evaluation set {self.path} was begun with another {', '.join(differing)}. Pass "
                "what it was begun with, or another --out."
            )
        if begun["state"] != BUILDING:
            raise InputError(
                f"Evaluation set {self.path} was finished by another process just now. Run the same "
                "command again to see that."
            )

    def _members(self) -> dict[str, zarr_metadata.Metadata]:
        groups = {name: zarr_metadata.group() for name in ("rows", "items")}
        return groups | {name: self.sizes.metadata(name) for name in ARRAYS}

    def _write_all_but_rows(self, arrays: dict[str, NDArray[Any]], tokenizer_json: str) -> None:
        """What is there already is compared and not written again: it may be large."""
        files = {TOKENIZER: tokenizer_json.encode()}
        for name, values in arrays.items():
            size = self.sizes.chunk_shape(name)[0]
            for chunk in range(self.sizes.n_chunks(name)):
                part = values[chunk * size : (chunk + 1) * size]
                files[chunk_path(name, chunk)] = encode_chunk(part, self.sizes, name)
        for name, data in files.items():
            there = self.path / name
            if not there.is_file() or there.read_bytes() != data:
                if (self.path / chunk_path(ACTIVATIONS, 0)).exists() and there.is_file():
                    raise InputError(
                        f"Evaluation set {self.path} was begun with other texts or tokens: {name} "
                        "differs. Pass what it was begun with, or another --out."
                    )
                write_whole(there, data)
        zarr_metadata.write_metadata(self.path, self._members())

    def _first_missing(self) -> int:
        """The first chunk of activations that is not there, or not whole."""
        for chunk in range(self.n_chunks):
            try:
                decode_chunk(self.path / chunk_path(ACTIVATIONS, chunk), self.sizes, ACTIVATIONS)
            except (OSError, ValueError):
                return chunk
        return self.n_chunks


def write_evalset(
    path: Path,
    activations_ND: NDArray[np.float32],
    contents: Contents,
    origin: Origin,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> EvalSet:
    """Write a whole set of rows in memory, for toys and tests; what stands there is replaced."""
    shutil.rmtree(path, ignore_errors=True)
    with sole_writer(path, "Evaluation set"):
        d_in = activations_ND.shape[1]
        writer = EvalSetWriter(path, origin, contents, d_in=d_in, chunk_rows=chunk_rows)
        for chunk in range(writer.n_chunks):
            writer.write(activations_ND[slice(*writer.rows_of_chunk(chunk))])
        return writer.finish()


def _provenance() -> dict[str, Any]:
    return {
        "command": provenance.command_line(),
        "versions": provenance.versions(),
        "runs": [],
    }
