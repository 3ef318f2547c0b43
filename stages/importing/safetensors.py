""".safetensors files, one or a folder of them, with one tensor or several of equal width.

Format (safetensors 0.4): 8 bytes of header length, a JSON header of name -> dtype, shape and
data_offsets, then the data. Parsed here, because rows are read by slices of the file, and bfloat16
without torch.
"""

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.errors import InputError
from ...storage.plain_json import parse_plain_json
from .base import (
    HEADER_LIMIT_BYTES,
    RawInput,
    RawPart,
    RowInput,
    check_shape,
    check_size,
    files_with,
    natural,
    only_member,
)

# Memory type and number format of each dtype that can be rows.
_FLOATS: dict[str, tuple[np.dtype[Any], str]] = {
    "BF16": (np.dtype("<u2"), "bfloat16"),
    "F16": (np.dtype("<f2"), "float16"),
    "F32": (np.dtype("<f4"), "float32"),
    "F64": (np.dtype("<f8"), "float64"),
}


class SafetensorsInput(RawInput):
    """Tensors whose names match --tensor, file by file, in natural order of their names."""

    kind = "safetensors"
    about = ".safetensors files (one, or a folder of them)"
    selector = "tensor"

    @classmethod
    def takes(cls, path: Path) -> bool:
        return bool(files_with(path, ".safetensors"))

    @classmethod
    def open(cls, path: Path, member: str | None) -> RowInput:
        parts: list[RawPart] = []
        for file in files_with(path, ".safetensors"):
            tensors, start = _header(file)
            # Tensors of other shapes than rows, such as biases, are no candidates.
            names = [name for name, entry in tensors.items() if _could_be_rows(entry)]
            chosen = sorted(fnmatch.filter(names, member or "?"), key=natural) if member else []
            if not chosen:
                chosen = [only_member(file, "tensor", "--tensor", names, member)]
            parts += [_part(file, name, tensors[name], start) for name in chosen]
        return cls(str(path), parts, member)


def _could_be_rows(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("dtype") not in _FLOATS:
        return False
    shape = entry.get("shape")
    return isinstance(shape, list) and len(shape) in (2, 3)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries by tensor name, and where the data begins."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
                raise ValueError(f"its header claims {length:,} of {size:,} bytes")
            header: dict[str, Any] = parse_plain_json(file.read(length))
        header.pop("__metadata__", None)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no .safetensors file that can be read ({error}). Fetch it again."
        ) from error
    return header, 8 + length


def _part(path: Path, name: str, entry: dict[str, Any], start: int) -> RawPart:
    what = f"Tensor {name!r}"
    sizes = check_shape(entry["shape"], f"{what} of {path}")
    dtype, number_format = _FLOATS[entry["dtype"]]
    offsets = entry.get("data_offsets")
    data_bytes = path.stat().st_size - start
    if (
        not isinstance(offsets, list)
        or [type(n) for n in offsets] != [int, int]
        or not 0 <= offsets[0] <= offsets[1] <= data_bytes
    ):
        raise InputError(
            f"{what} of {path} is said to stand at {offsets} of {data_bytes:,} bytes of data: the "
            "file is cut off or damaged. Fetch it again."
        )
    part = RawPart(path, start + offsets[0], sizes, dtype, number_format)
    check_size(path, what, part.n_rows * sizes[-1] * dtype.itemsize, offsets[1] - offsets[0])
    return part
