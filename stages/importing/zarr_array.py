"""A Zarr array, version 2 or 3: (rows, d_in) or (contexts, positions, d_in).

The metadata is looked at before zarr-python opens it: only arrays of floats, and only codecs that
are known to do arithmetic. numcodecs has some that unpickle.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ...storage.errors import InputError
from .base import RawRows, RowInput, check_shape, only_member, read_json

# Without bz2 and lzma, which pack a million bytes of one kind into one.
_CODECS = {"blosc", "gzip", "lz4", "zlib", "zstd", "shuffle", "delta", "bytes"} | {
    "crc32",
    "crc32c",
    "adler32",
    "bitround",
    "fixedscaleoffset",
    "sharding_indexed",
    "transpose",
}
_FLOATS = {"f2": "float16", "f4": "float32", "f8": "float64"}
_MOST_BYTES_TOGETHER = 1 << 30
_MOST_IN_SHARD = 1 << 20  # chunks, of which its index says where they are
_METADATA_BYTES = 1 << 22
_METADATA = ("zarr.json", ".zarray")


class ZarrInput(RowInput):
    """One array, or one of a group by --array."""

    kind = "zarr"
    about = "a Zarr array, or a group with --array"
    selector = "array"

    def __init__(self, path: Path, folder: Path, member: str | None) -> None:
        """folder: of the array itself."""
        self.name, self._folder, self.member = str(path), folder, member
        shape, chunk, self.number_format = _checked(folder)
        sizes = check_shape(shape, f"Array {folder}")
        self.context_size = sizes[1] if len(sizes) == 3 else None
        self.d_in = sizes[-1]
        positions = sizes[1] if len(sizes) == 3 else 1
        self.n_rows = sizes[0] * positions
        self._slices_together = min(chunk[0], sizes[0])
        self._positions = positions
        self.rows_together = self._slices_together * positions
        # A chunk is unpacked whole, also where it reaches beyond the array.
        n_bytes = chunk[0] * positions * self.d_in * np.dtype(self.number_format).itemsize
        if n_bytes > _MOST_BYTES_TOGETHER:
            raise InputError(
                f"One chunk of {folder} holds {n_bytes:,} bytes of rows, more than is read at once "
                f"({_MOST_BYTES_TOGETHER:,}). Write it again with smaller chunks."
            )
        try:
            # Of the metadata that were looked at, should those of another version be there too.
            is_third = (folder / "zarr.json").is_file()
            self._array: Any = zarr.open_array(folder, mode="r", zarr_format=3 if is_third else 2)
            missing = _missing(self._array)
            self._check_lengths()
        except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise _unreadable(folder, error) from error
        if missing:
            raise InputError(
                f"Array {folder} lacks {missing:,} of its chunks, which would be read as its fill "
                "value. Fetch them."
            )

    def _check_lengths(self) -> None:
        """InputError for a file that is longer than its chunks, packed or not, can be."""
        unit = self._array.shards or self._array.chunks
        n_bytes = math.prod(unit) * self._array.dtype.itemsize
        limit = n_bytes + n_bytes // 8 + _METADATA_BYTES
        for file, name in self.files():
            if file.is_symlink():
                raise InputError(f"{file} is a symbolic link, and only plain files are read.")
            if file.stat().st_size > limit:
                raise InputError(
                    f"Array {self._folder} has {name} of {file.stat().st_size:,} bytes, and what it "
                    f"holds takes at most {limit:,}. Fetch it again."
                )

    @classmethod
    def takes(cls, path: Path) -> bool:
        return any((path / name).is_file() for name in (*_METADATA, ".zgroup"))

    @classmethod
    def open(cls, path: Path, member: str | None) -> RowInput:
        if _is_array(path):
            if member is not None:
                raise InputError(f"{path} is an array by itself. Leave --array out.")
            return cls(path, path, None)
        if member is not None and (
            PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts
        ):
            raise InputError(f"--array is {member!r}, and has to be a name inside {path}.")
        found = sorted(
            Path(root).relative_to(path).as_posix()
            for root, _, names in os.walk(path)
            if set(_METADATA) & set(names) and _is_array(Path(root)) and _could_be_rows(Path(root))
        )
        name = only_member(path, "array", "--array", found, member)
        return cls(path, path / name, name)

    def files(self) -> Sequence[tuple[Path, str]]:
        walked = ((Path(root), name) for root, _, names in os.walk(self._folder) for name in names)
        found = sorted((root / name for root, name in walked))
        return [(file, file.relative_to(self._folder).as_posix()) for file in found]

    def sampled(self) -> Sequence[tuple[Path, str]]:
        # One of them is the metadata: `.zarray` sorts first, `zarr.json` last.
        every = self.files()
        return [every[i] for i in sorted({0, len(every) // 2, len(every) - 1})]

    def read(self, rows_R: NDArray[np.int64]) -> RawRows:
        out = np.empty((len(rows_R), self.d_in), np.dtype(self.number_format))
        groups_R = rows_R // self.rows_together
        cuts = np.flatnonzero(np.diff(groups_R)) + 1
        for places in np.split(np.arange(len(rows_R)), cuts):
            if len(places) == 0:
                continue
            group, here = int(groups_R[places[0]]), slice(int(places[0]), int(places[-1]) + 1)
            first = group * self._slices_together
            try:
                part = self._array[first : first + self._slices_together]
            except (ValueError, TypeError, KeyError, OSError, RuntimeError, MemoryError) as error:
                raise _unreadable(self._folder, error) from error
            values = np.asarray(part).reshape(-1, self.d_in)
            out[here] = values[rows_R[here] - group * self.rows_together]
        return out


def _unreadable(folder: Path, error: Exception) -> InputError:
    return InputError(f"Array {folder} cannot be read ({error}). Fetch it again.")


def _is_array(folder: Path) -> bool:
    if (folder / ".zarray").is_file():
        return True
    file = folder / "zarr.json"
    return file.is_file() and read_json(file).get("node_type") == "array"


def _could_be_rows(folder: Path) -> bool:
    try:
        shape, _, _ = _checked(folder)
    except InputError:
        return False
    return len(shape) in (2, 3)


def _checked(folder: Path) -> tuple[list[int], list[int], str]:
    """Shape, chunk shape and number format; InputError for anything that is not plain floats."""
    try:
        if (folder / "zarr.json").is_file():
            return _checked_v3(folder, read_json(folder / "zarr.json"))
        return _checked_v2(folder, read_json(folder / ".zarray"))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"Array {folder} has metadata that cannot be understood ({error!r}). Fetch it again."
        ) from error


def _checked_v3(folder: Path, meta: dict[str, Any]) -> tuple[list[int], list[int], str]:
    number_format = meta["data_type"]
    if number_format not in _FLOATS.values():
        raise _not_floats(folder, number_format)
    codecs, outer = meta["codecs"], meta["chunk_grid"]["configuration"]["chunk_shape"]
    chunk = outer
    _check_codecs(folder, [codec["name"] for codec in codecs])
    for codec in codecs:
        if codec["name"] == "sharding_indexed":
            inside = codec["configuration"]
            chunk = inside["chunk_shape"]
            names = [each["name"] for each in [*inside["codecs"], *inside.get("index_codecs", [])]]
            _check_codecs(folder, names)
            if "sharding_indexed" in names:
                raise TypeError("shards inside shards")
    shape = _sizes(meta["shape"])
    _check_grid(folder, shape, _sizes(chunk), _sizes(outer))
    return shape, chunk, str(number_format)


def _checked_v2(folder: Path, meta: dict[str, Any]) -> tuple[list[int], list[int], str]:
    dtype = meta["dtype"]
    if not isinstance(dtype, str) or dtype[1:] not in _FLOATS or dtype[0] not in "<>|=":
        raise _not_floats(folder, dtype)
    codecs = [*(meta.get("filters") or []), *([meta["compressor"]] if meta["compressor"] else [])]
    _check_codecs(folder, [codec["id"] for codec in codecs])
    shape, chunk = _sizes(meta["shape"]), _sizes(meta["chunks"])
    _check_grid(folder, shape, chunk, chunk)
    return shape, chunk, _FLOATS[dtype[1:]]


def _check_grid(folder: Path, shape: list[int], chunk: list[int], outer: list[int]) -> None:
    """InputError for chunks that reach far beyond the array: what they claim would be allocated.

    outer: the shape of shards of chunks, that of chunks where there are none. The first axis, of
    rows, may be longer than the array; how many bytes it takes is looked at elsewhere.
    """
    if not len(shape) == len(chunk) == len(outer):
        raise TypeError(f"{len(shape)} sizes in chunks of {len(chunk)} and shards of {len(outer)}")
    whole = [-(-n // size) * size for n, size in zip(shape, chunk, strict=True)]
    pairs = zip(shape[1:], chunk[1:], whole[1:], outer[1:], strict=True)
    n_chunks = math.prod(out // size for out, size in zip(outer, chunk, strict=True))
    if any(size > n or out > most for n, size, most, out in pairs) or n_chunks > _MOST_IN_SHARD:
        shards = "" if outer == chunk else f" and shards of {str(outer)[:80]}"
        raise InputError(
            f"Array {folder} of shape {str(shape)[:80]} is in chunks of {str(chunk)[:80]}{shards}, "
            "larger than what they are of. Write it again with chunks that fit."
        )


def _not_floats(folder: Path, found: Any) -> InputError:
    return InputError(
        f"Array {folder} holds values of type {str(found)[:80]}, and activations are float16, "
        "float32 or float64."
    )


def _check_codecs(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if str(name).removeprefix("numcodecs.") not in _CODECS:
            raise InputError(
                f"Array {folder} is packed with {str(name)[:80]!r}, which is not read here. Write "
                "it again with one of blosc, gzip, zstd or none."
            )


def _sizes(values: Any) -> list[int]:
    if not isinstance(values, list) or any(type(n) is not int or n < 1 for n in values):
        raise TypeError(f"sizes {values!r:.80}")
    return values


def _missing(array: Any) -> int:
    """How many files of chunks, or of shards of chunks, are not there."""
    unit = array.shards or array.chunks
    wanted = math.prod(-(-n // size) for n, size in zip(array.shape, unit, strict=True))
    a_file = math.prod(n // size for n, size in zip(unit, array.chunks, strict=True))
    return int(wanted - array.nchunks_initialized // a_file)
