"""Parquet: one record a row, read by row groups."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from ...storage.errors import InputError
from .base import Json, Row, RowStream
from .files import file_identity

_BATCH_ROWS = 256


class ParquetReader:
    """One .parquet file. A position is the number of the next row."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def identity(self) -> Json:
        return file_identity(self._path, self._name)

    def columns(self) -> list[str] | None:
        with _open(self._path) as file:
            return [str(name) for name in file.schema_arrow.names]

    def rows(self, position: int | None) -> RowStream:
        return _Rows(self._path, position or 0)


class _Rows(RowStream):
    def __init__(self, path: Path, row: int) -> None:
        self._path, self._row = path, row
        self._values = _values(path, row)

    def position(self) -> int:
        return self._row

    def __next__(self) -> Row:
        try:
            value = next(self._values)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self._path, error) from error
        self._row += 1
        return Row(value)


def _values(path: Path, start: int) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        group, skip = 0, start
        while group < file.num_row_groups and skip >= file.metadata.row_group(group).num_rows:
            skip -= file.metadata.row_group(group).num_rows
            group += 1
        groups = range(group, file.num_row_groups)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(groups)):
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            yield from batch.slice(skip).to_pylist()
            skip = 0


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"Text file {path} is no Parquet file, or it is truncated or damaged ({error}). "
        "Download it again, or leave it out."
    )
