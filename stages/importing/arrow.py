"""A Hugging Face `datasets` folder (save_to_disk) of cached activations, as SAELens writes them.

Arrow files, one column of which holds a context a record (context_size, d_in) or a row a record
(d_in). Read with pyarrow from memory maps; no loading script is looked at, and the names of files in
state.json have to be plain names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...storage.errors import InputError
from .base import RawRows, RowInput, only_member, read_json

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_COPIED_BYTES = 1 << 26  # what opening a memory-mapped file may take in real memory


class ArrowInput(RowInput):
    """One column of the record batches of a dataset."""

    kind = "datasets"
    about = "a `datasets` folder of save_to_disk (SAELens' cached activations), or an .arrow file"
    selector = "column"

    def __init__(self, path: Path, files: Sequence[Path], member: str | None) -> None:
        self.name, self._files = str(path), files
        self._parts: list[RawRows] = []
        widths: set[tuple[int | None, int, str]] = set()
        for file in files:
            for batch in _batches(file):
                if member is None:
                    member = only_member(file, "column", "--column", _columns(batch), None)
                elif member not in _columns(batch):
                    only_member(file, "column", "--column", _columns(batch), member)
                context_size, values_RD = _rows(file, batch, member)
                widths.add((context_size, values_RD.shape[1], values_RD.dtype.name))
                if len(widths) > 1:
                    raise InputError(
                        f"Column {member!r} of {file} changes its shape or type: "
                        f"{' and '.join(str(w) for w in sorted(widths, key=str))}. "
                        "Pass a dataset of one shape."
                    )
                self._parts.append(values_RD)
        if not self._parts:
            raise InputError(f"{path} holds no record. Pass another dataset.")
        self.member = member
        self.context_size, self.d_in, self.number_format = widths.pop()
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self.n_rows = int(self._starts[-1])

    @classmethod
    def takes(cls, path: Path) -> bool:
        if path.is_file():
            return path.suffix == ".arrow"
        return (path / _STATE).is_file() or (path / _SPLITS).is_file()

    @classmethod
    def open(cls, path: Path, member: str | None) -> RowInput:
        return cls(path, [path] if path.is_file() else _data_files(path), member)

    def files(self) -> Sequence[tuple[Path, str]]:
        return [(file, file.name) for file in self._files]

    def read(self, rows_R: NDArray[np.int64]) -> RawRows:
        out = np.empty((len(rows_R), self.d_in), self._parts[0].dtype)
        parts_R = np.searchsorted(self._starts, rows_R, side="right") - 1
        cuts = np.flatnonzero(np.diff(parts_R)) + 1
        for places in np.split(np.arange(len(rows_R)), cuts):
            if len(places):
                part = int(parts_R[places[0]])
                here = slice(int(places[0]), int(places[-1]) + 1)
                np.take(self._parts[part], rows_R[here] - self._starts[part], 0, out=out[here])
        return out


def _data_files(folder: Path) -> list[Path]:
    """The Arrow files that state.json lists, which stand in the folder itself."""
    if not (folder / _STATE).is_file():
        splits = read_json(folder / _SPLITS).get("splits")
        shown = ", ".join(repr(s)[:40] for s in splits) if isinstance(splits, list) else "none"
        raise InputError(
            f"{folder} is a dataset of several splits ({shown}). Pass the folder of one of them."
        )
    state = read_json(folder / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise InputError(
            f"{folder} selects records by an index. Save it again after flatten_indices()."
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / _STATE} does not list the files of the dataset. Save it again."
        ) from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & {*name}:
            raise InputError(
                f"{folder / _STATE} names the file {name!r}, which is not a plain name in its "
                "folder. Do not use this dataset unless you know where it comes from."
            )
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}, of which {_STATE} speaks, is missing. Fetch it.")
    return [folder / name for name in names]


def _batches(path: Path) -> list[Any]:
    """All record batches of a memory-mapped file: no more than their descriptions are read."""
    batches = []
    try:
        mapped = pa.memory_map(str(path))
        before = pa.total_allocated_bytes()
        try:
            reader = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            file = pa.ipc.open_file(mapped)
            reader = (file.get_batch(i) for i in range(file.num_record_batches))
        for batch in reader:
            if pa.total_allocated_bytes() - before > _COPIED_BYTES:
                raise InputError(
                    f"{path} is compressed, so its rows cannot be read by their numbers. Save the "
                    "dataset again with save_to_disk."
                )
            if batch.num_rows:
                batches.append(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(path, error) from error
    return batches


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is no Arrow file that can be read, or it is cut off ({error}). Fetch it again."
    )


def _columns(batch: Any) -> list[str]:
    """Columns whose type is a list, or a list of lists, of floats."""
    return [field.name for field in batch.schema if _depth(field.type) is not None]


def _depth(of: Any) -> int | None:
    """How many lists a type of floats is wrapped in, 1 or 2, else None."""
    depth = 0
    of = getattr(of, "storage_type", of)  # the Array2D of `datasets`, where it is known
    while pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_fixed_size_list(of):
        of, depth = of.value_type, depth + 1
    return depth if depth in (1, 2) and pa.types.is_floating(of) else None


def _rows(path: Path, batch: Any, column: str) -> tuple[int | None, RawRows]:
    """Positions of a context (None for single rows) and all rows of a batch, (R, D), not copied."""
    array = batch.column(batch.schema.get_field_index(column))
    array = getattr(array, "storage", array)
    try:
        array.validate(full=True)  # offsets that lie would be read as they are
        sizes, values = [], array
        while not pa.types.is_floating(values.type):
            sizes.append(_length(values))
            values = values.flatten()
        if values.null_count:
            raise ValueError("some values are missing")
        flat = values.to_numpy(zero_copy_only=True)
    except (pa.ArrowException, ValueError) as error:
        raise InputError(
            f"Column {column!r} of {path} is not a table of numbers ({error}). Pass another "
            "--column, or save the dataset again."
        ) from error
    return (sizes[0] if len(sizes) == 2 else None), flat.reshape(-1, sizes[-1])


def _length(lists: Any) -> int:
    """The one length of all lists; ValueError when they differ."""
    if lists.null_count:
        raise ValueError("some records are missing")
    if pa.types.is_fixed_size_list(lists.type):
        length = int(lists.type.list_size)
    else:
        lengths = np.diff(np.asarray(lists.offsets))
        length = int(lengths[0])
        if (lengths != length).any():
            raise ValueError(f"its lists have {lengths.min()} to {lengths.max()} values")
    if length < 1:
        raise ValueError("its lists are empty")
    return length
