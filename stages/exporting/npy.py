"""activations.npy (rows, d_in) and source.npy (rows,), for numpy.load, also with mmap_mode."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...storage.values import Rows
from .base import ACTIVATIONS, SOURCE, Exporter, little_endian


class NpyExport(Exporter):
    """Headers first, then rows as they come."""

    about = "activations.npy and source.npy"
    number_formats = ("float32", "float16")
    missing = {"bfloat16": "numpy has no bfloat16"}  # noqa: RUF012 - never changed

    def __init__(
        self, folder: Path, shape: tuple[int, int], number_format: str, notes: dict[str, str]
    ) -> None:
        dtype = np.dtype(number_format).newbyteorder("<")
        self._rows = _begin(folder / f"{ACTIVATIONS}.npy", shape, dtype)
        self._source = _begin(folder / f"{SOURCE}.npy", shape[:1], np.dtype("<i8"))

    def write(self, rows_RD: Rows, source_R: NDArray[np.int64]) -> None:
        self._rows.write(little_endian(rows_RD))
        self._source.write(little_endian(source_R))

    def close(self) -> None:
        self._rows.close()
        self._source.close()


def _begin(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> BinaryIO:
    file = path.open("wb")
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file
