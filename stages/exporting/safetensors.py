"""activations.safetensors: the tensors `activations` (rows, d_in) and `source` (rows,) int64.

Written by hand (a JSON header, then the data), because the library wants whole tensors in memory.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...storage.values import Rows
from .base import ACTIVATIONS, SOURCE, Exporter, little_endian

_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}


class SafetensorsExport(Exporter):
    """One file with two cursors: sizes are known, so both tensors have their place at once."""

    about = "activations.safetensors, with the tensors `activations` and `source`"
    number_formats = ("float32", "float16", "bfloat16")

    def __init__(
        self, folder: Path, shape: tuple[int, int], number_format: str, notes: dict[str, str]
    ) -> None:
        dtype, n_bytes = _DTYPES[number_format]
        end = shape[0] * shape[1] * n_bytes
        # The library wants tensors aligned to their type; rows of 2-byte values may end oddly.
        tensors = {
            SOURCE: ("I64", [shape[0]], [0, 8 * shape[0]]),
            ACTIVATIONS: (dtype, list(shape), [8 * shape[0], 8 * shape[0] + end]),
        }
        header: dict[str, object] = {"__metadata__": notes}
        for name, (kind, sizes, offsets) in tensors.items():
            header[name] = {"dtype": kind, "shape": sizes, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = folder / f"{ACTIVATIONS}.safetensors"
        self._source = path.open("wb")
        self._source.write(len(text).to_bytes(8, "little") + text)
        self._source.flush()
        self._rows = path.open("r+b")
        self._rows.seek(8 + len(text) + 8 * shape[0])

    def write(self, rows_RD: Rows, source_R: NDArray[np.int64]) -> None:
        self._rows.write(little_endian(rows_RD))
        self._source.write(little_endian(source_R))

    def close(self) -> None:
        self._rows.close()
        self._source.close()
