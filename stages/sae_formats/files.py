"""Reading what other tools have written, of which nothing is believed.

JSON is bounded; of tensors names, shapes and number formats are compared before any is read, and
what is read is checked to be finite. Only `read_pt` touches a pickle: with weights_only, from a zip
archive whose entries are stored as they are, so that nothing can be larger than the file.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...storage.errors import InputError
from ...storage.plain_json import parse_plain_json
from ..sae.weights import CONFIG_LIMIT_BYTES

Shapes = Mapping[str, tuple[int, ...]]
SLACK_BYTES = 1 << 20  # headers, names, padding
_LARGEST = torch.float64.itemsize
_PICKLE_LIMIT_BYTES = 1 << 16  # names and shapes of a dozen tensors
_ZIP_ENTRIES = 1000
_SAFE_TORCH = (2, 10)  # earlier ones believe what a .pt says about the length of its own entries
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises InputError."""
    check_file(file)
    if file.stat().st_size > CONFIG_LIMIT_BYTES:
        raise InputError(f"{file} is no config: it is larger than {CONFIG_LIMIT_BYTES:,} bytes.")
    try:
        text = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} could not be read ({error.strerror or error}).") from error
    found = parse_json(text, str(file))
    if not isinstance(found, dict):
        raise InputError(f"{file} is no config: it holds {type(found).__name__}, not an object.")
    return found


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON as it is defined. what: the beginning of a sentence. Raises InputError."""
    try:
        return parse_plain_json(text)
    except ValueError as error:
        raise InputError(f"{what} is damaged: it is not JSON ({error}). Fetch it again.") from error


def check_file(file: Path) -> None:
    """InputError unless it is there and a file."""
    if not file.is_file():
        raise InputError(f"{file.parent} is incomplete: {file.name} is missing. Fetch it again.")


def largest_bytes(d_in: int, d_sae: int) -> int:
    """What the weights of an SAE of that size can take on disk, whatever its format."""
    n_numbers = 2 * d_in * d_sae + 6 * d_sae + 4 * d_in
    return n_numbers * _LARGEST + SLACK_BYTES


def check_length(file: Path, d_in: int, d_sae: int) -> None:
    """InputError when the weights are longer than an SAE of the config's size can be."""
    check_file(file)
    length, limit = file.stat().st_size, largest_bytes(d_in, d_sae)
    if length > limit:
        raise InputError(
            f"{file} has {length:,} bytes, and the weights of an SAE of d_in={d_in} and "
            f"d_sae={d_sae}, which is what its config says, have at most {limit:,}. "
            "It was not read."
        )


def read_safetensors(file: Path, shapes: Shapes) -> dict[str, Tensor]:
    """Exactly the tensors of these names and shapes, on the CPU. Raises InputError."""
    check_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            headers = {
                name: (tuple(each.get_shape()), _FLOATS.get(each.get_dtype(), each.get_dtype()))
                for name, each in slices.items()
            }
            _compare(file, headers, shapes)
            tensors = {name: opened.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is damaged: it is not a safetensors file ({error}). Fetch it again."
        ) from error
    return _finite(file, tensors)


def read_pt(file: Path, shapes: Shapes) -> dict[str, Tensor]:
    """Exactly the tensors of these names and shapes, from a file of torch.save. Raises InputError.

    Shapes of () also stand for integers, which come as tensors of whatever type they have.
    """
    check_file(file)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise InputError(
            f"{file} is a pickle, which torch {torch.__version__} cannot read safely. "
            "Install torch 2.10 or newer."
        )
    _check_archive(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle provokes; torch then says how to run it
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200]
        raise InputError(
            f"{file} was not loaded: it holds something other than plain tensors, or is damaged "
            f"({type(error).__name__}: {reason})."
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds {type(found).__name__}, not a dictionary of tensors.")
    tensors = {str(name): value for name, value in found.items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not _is_plain(value):
            raise InputError(f"{file} holds {name[:100]!r}, which is not a plain tensor.")
    headers = {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()}
    _compare(file, headers, shapes)
    return _finite(file, {name: tensors[name].contiguous() for name in shapes})


def _check_archive(file: Path) -> None:
    """InputError unless it is a zip archive that cannot become larger by being read."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{file} is not a file of torch.save (a zip archive), or it is damaged. "
            "Save it again with a recent torch, or fetch it again."
        ) from error
    is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    stored = sum(entry.file_size for entry in entries)
    if (
        is_packed
        or len(entries) > _ZIP_ENTRIES
        or pickled > _PICKLE_LIMIT_BYTES
        or stored > file.stat().st_size
    ):
        raise InputError(
            f"{file} was not loaded: its archive is compressed or larger than an SAE needs, which "
            "torch.save does not write."
        )


def _is_plain(value: Tensor) -> bool:
    """Whether every number of a tensor has its own place in memory."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _compare(
    file: Path, headers: Mapping[str, tuple[tuple[int, ...], Any]], shapes: Shapes
) -> None:
    """InputError unless names and shapes are those expected, and all are numbers."""
    different = sorted(set(shapes) ^ set(headers))
    if different:
        missing = [name for name in different if name in shapes]
        extra = [name[:100] for name in different if name not in shapes]
        parts = [f"{', '.join(missing)} missing"] * bool(missing)
        parts += [f"{', '.join(extra[:10])} unknown"] * bool(extra)
        raise InputError(
            f"{file} does not hold the tensors of what its config describes: {'; '.join(parts)}."
        )
    for name, shape in shapes.items():
        found, dtype = headers[name]
        if found != shape:
            raise InputError(
                f"{file} holds {name} in shape {found}, but its config asks for {shape}."
            )
        is_count = shape in ((), (1,)) or name == "group_sizes"
        if dtype not in _FLOATS.values() and not (
            is_count and dtype in (torch.int32, torch.int64, torch.int16)
        ):
            raise InputError(
                f"{file} holds {name} as {dtype}, which is no number format of weights."
            )


def _finite(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise InputError(f"{file} holds NaN or Inf in {name}.")
    return tensors


def whole_number(config: Mapping[str, Any], name: str, file: Path) -> int:
    """A size of a config: positive, and not beyond what tensors can have. Raises InputError."""
    found = config.get(name)
    if type(found) is not int or not 0 < found < 2**31:
        raise InputError(f"{file} says {name} {str(found)[:100]!r}, which is no size of an SAE.")
    return found


def agree(
    config: Mapping[str, Any], own: Mapping[str, Any], names: Iterable[str], file: Path
) -> None:
    """InputError unless a config says of an SAE what its section for sae-pipe says."""
    for name in names:
        found, expected = config.get(name), own.get(name)
        same = found == expected and type(found) is type(expected)
        if isinstance(found, float) and isinstance(expected, float):
            same = math.isclose(found, expected)
        if not same:
            raise InputError(
                f"{file} contradicts itself: {name} is {str(found)[:100]!r} there and "
                f"{str(expected)[:100]!r} in its section sae_pipe. Remove that section to believe "
                "the rest."
            )
