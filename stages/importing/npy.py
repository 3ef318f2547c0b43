""".npy files, one or a folder of them: (rows, d_in) or (contexts, positions, d_in).

The header is parsed as literals (numpy.lib.format); object arrays, which are pickles, are refused.
"""

import io
from pathlib import Path

import numpy as np

from ...storage.errors import InputError
from .base import RawInput, RawPart, RowInput, check_shape, check_size, files_with

_HEADER_BYTES = 1 << 16  # numpy itself refuses headers of more than 10,000 characters


class NpyInput(RawInput):
    """Arrays that numpy.save has written."""

    kind = "npy"
    about = ".npy files (one, or a folder of them)"

    @classmethod
    def takes(cls, path: Path) -> bool:
        return bool(files_with(path, ".npy"))

    @classmethod
    def open(cls, path: Path, member: str | None) -> RowInput:
        return cls(str(path), [_part(file) for file in files_with(path, ".npy")])


def _part(path: Path) -> RawPart:
    try:
        with path.open("rb") as file:
            head = io.BytesIO(file.read(_HEADER_BYTES))
        version = np.lib.format.read_magic(head)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"version {version} of the format is for named columns")
        shape, is_fortran, dtype = readers[version](head)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no .npy file that can be read ({error}).") from error
    if dtype.hasobject:
        raise InputError(
            f"{path} holds pickled Python objects, which are not read. Save the activations as an "
            "array of float16 or float32."
        )
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise InputError(
            f"{path} holds values of type {dtype}, and activations are float16, float32 or "
            "float64. bfloat16 has no place in .npy files: use .safetensors for it."
        )
    sizes = check_shape(shape, str(path))
    if is_fortran:
        raise InputError(
            f"{path} is stored column by column (Fortran order), so no row can be read by itself. "
            "Save it again with numpy.ascontiguousarray."
        )
    part = RawPart(path, head.tell(), sizes, dtype, dtype.newbyteorder("=").name)
    needed = part.n_rows * sizes[-1] * dtype.itemsize
    check_size(path, f"The array {sizes}", needed, path.stat().st_size - part.offset)
    return part
