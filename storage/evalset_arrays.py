"""The arrays of an evaluation set: what there is, and how their chunks become bytes and back.

A chunk is a zstd frame followed by its crc32c, exactly what the declared Zarr v3 codecs write, so
that every Zarr reader gets the same numbers. Format: docs/store-format.md.
"""

# N rows, I items, U bytes of text, D d_in

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from .shard import CRC_BYTES, checked_frame, crc32c
from .zarr_metadata import Metadata, array

VECTOR_CHUNK = 1 << 20  # values of one chunk of a vector
# float32 noise hardly packs: higher levels cost time and gain nothing.
_ZSTD_LEVEL = 1
_CHUNK_LIMIT_BYTES = 1 << 28
_MOST_ITEMS = 1 << 27  # a vector of them is in memory as a whole: 1 GB of int64
_MOST_TEXT_BYTES = 1 << 30

ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Kind:
    """One array. along: what its length counts, "rows", "items" or "text"; fill_value: what a plain
    reader shows for a chunk that is missing.
    """

    dtype: str
    along: str
    fill_value: Any


ARRAYS: dict[str, Kind] = {
    ACTIVATIONS: Kind("float32", "rows", "NaN"),
    "rows/item": Kind("int64", "rows", -1),
    "rows/token": Kind("uint32", "rows", 2**32 - 1),
    "rows/position": Kind("int32", "rows", -1),
    "items/task": Kind("int32", "items", -2),
    "items/label": Kind("int32", "items", -2),
    "items/group": Kind("int32", "items", -2),
    "items/split": Kind("uint8", "items", 255),
    "items/document": Kind("int64", "items", -1),
    "items/text_end": Kind("int64", "items", -1),
    "items/text": Kind("uint8", "text", 255),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Lengths that all arrays follow from. Raises ValueError for what cannot be."""

    n_rows: int
    n_items: int
    text_bytes: int
    d_in: int
    chunk_rows: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < (0 if name == "text_bytes" else 1):
                raise ValueError(f"{name} is {value!r}")
        if self.chunk_rows * self.d_in * 4 > _CHUNK_LIMIT_BYTES:
            raise ValueError(f"a chunk of {self.chunk_rows} rows of {self.d_in} values")
        if max(self.n_items, self.n_rows) > _MOST_ITEMS or self.text_bytes > _MOST_TEXT_BYTES:
            raise ValueError("more rows, items or text than any set that is built")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        lengths = {"rows": self.n_rows, "items": self.n_items, "text": self.text_bytes}
        length = lengths[ARRAYS[name].along]
        return (length, self.d_in) if name == ACTIVATIONS else (length,)

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """Shape of its chunks; the last one of a vector is full, too."""
        if name == ACTIVATIONS:
            return (self.chunk_rows, self.d_in)
        return (max(1, min(self.shape(name)[0], VECTOR_CHUNK)),)

    def n_chunks(self, name: str) -> int:
        """Chunks, that is files, of an array."""
        return -(-self.shape(name)[0] // self.chunk_shape(name)[0])

    def metadata(self, name: str) -> Metadata:
        """zarr.json of an array."""
        codecs = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}},
            {"name": "crc32c"},
        ]
        kind = ARRAYS[name]
        if kind.dtype == "uint8":
            codecs[0] = {"name": "bytes"}
        shape, chunks = list(self.shape(name)), list(self.chunk_shape(name))
        return array(shape, chunks, kind.dtype, kind.fill_value, codecs)


def chunk_path(name: str, chunk: int) -> str:
    """File of a chunk, relative to the set."""
    return f"{name}/c/{chunk}/0" if name == ACTIVATIONS else f"{name}/c/{chunk}"


def encode_chunk(values: NDArray[Any], sizes: Sizes, name: str) -> bytes:
    """The file of one chunk; what stands behind the last value is zero."""
    chunk_shape = sizes.chunk_shape(name)
    dtype = np.dtype(ARRAYS[name].dtype).newbyteorder("<")
    whole = np.zeros(chunk_shape, dtype)
    whole[: len(values)] = values
    frame = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False).compress(whole.data)
    return frame + crc32c(frame)


def decode_chunk(file: Path, sizes: Sizes, name: str) -> NDArray[Any]:
    """The values of one chunk's file, full size.

    Raises ValueError or OSError for damage, before memory is taken for sizes that cannot be.
    """
    shape = sizes.chunk_shape(name)
    dtype = np.dtype(ARRAYS[name].dtype)
    expected = int(np.prod(shape)) * dtype.itemsize
    if file.stat().st_size > zstd_limit(expected):
        raise ValueError("it is larger than its chunk can be")
    data = unpacked(checked_frame(memoryview(file.read_bytes())), expected)
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


def unpacked(frame: memoryview, n_bytes: int) -> bytes:
    """What a zstd frame holds; ValueError, before memory is taken, unless that is n_bytes."""
    try:
        found = zstandard.frame_content_size(frame)
        if found != n_bytes:
            raise ValueError(f"it holds {found:,} bytes instead of {n_bytes:,}")
        data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=n_bytes)
    except zstandard.ZstdError as error:
        raise ValueError(f"it is not a zstd frame ({error})") from error
    if len(data) != n_bytes:
        raise ValueError(f"it holds {len(data):,} bytes instead of {n_bytes:,}")
    return data


def zstd_limit(n_bytes: int) -> int:
    """No zstd frame of n bytes is larger (ZSTD_compressBound, generously), checksum included."""
    return n_bytes + n_bytes // 128 + 1024 + CRC_BYTES
