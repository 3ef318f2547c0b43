"""An SAE on disk: sae.safetensors (weights on raw activations) and config.json.

config.json has `format`, `format_version` and a key `sae` with architecture, d_in, d_sae, k and
what else the architecture's constructor takes; a run's config.json holds the recipe beside it.
Nothing is ever pickled.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...storage.errors import StoreError
from ...storage.files import write_json, write_whole
from ...storage.plain_json import parse_plain_json
from . import ARCHITECTURES, get_architecture
from .base import Sae

FORMAT = "sae-pipe run"
FORMAT_VERSION = 1
CONFIG_LIMIT_BYTES = 1 << 24  # a config is a few kB
DTYPES = (torch.float32, torch.float64)
_DTYPE_NAMES = {  # as safetensors has them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def describe_sae(sae: Sae) -> dict[str, Any]:
    """The `sae` section of config.json: what rebuilds the module."""
    here = f"{type(sae).__module__.rpartition('.')[2]}:{type(sae).__qualname__}"
    architecture = next(name for name, each in ARCHITECTURES.items() if each.where == here)
    sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.k}
    return {"architecture": architecture, **sizes, **sae.options}


def write_weights(sae: Sae, folder: Path) -> None:
    """sae.safetensors, whole or not at all. Raises DiskError."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}
    write_whole(folder / "sae.safetensors", save(tensors, {"format": "pt"}))


def save_sae(sae: Sae, folder: Path) -> None:
    """A folder that load_sae reads, for an SAE that takes raw activations. Raises DiskError."""
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json(folder / "config.json", header | {"sae": describe_sae(sae)})
    write_weights(sae, folder)


def read_sae(folder: Path, device: torch.device) -> Sae:
    """The SAE of a folder, with frozen parameters.

    Raises StoreError: missing, unfinished, damaged, of a newer format.
    """
    config = read_config(folder)
    file = folder / "sae.safetensors"
    if not file.is_file():
        raise StoreError(
            f"Run {folder} has no weights: the fit is not finished. "
            "Run the same `sae-pipe fit` command again to finish it."
        )
    sae = _rebuild(folder, config.get("sae"))
    tensors = _read_tensors(file, sae)
    sae.load_state_dict(tensors, assign=True)
    return sae.to(device).requires_grad_(False).eval()


def load_config(folder: Path) -> Any:
    """config.json of a folder, whatever it holds. Raises StoreError when it is not there or JSON."""
    file = folder / "config.json"
    if not file.is_file():
        raise StoreError(
            f"There is no run at {folder}: it has no config.json. "
            "Pass the folder that `sae-pipe fit --out` wrote."
        )
    if file.stat().st_size > CONFIG_LIMIT_BYTES:
        raise StoreError(f"{file} is damaged: a config of that size cannot be. Fit the run again.")
    try:
        return parse_plain_json(file.read_bytes())
    except ValueError as error:
        raise StoreError(
            f"{file} is damaged: it is not JSON ({error}). Fit the run again."
        ) from error


def is_run_config(config: Any) -> bool:
    """Whether a config.json is that of a run, of whatever format version."""
    return isinstance(config, dict) and config.get("format") == FORMAT


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder, checked to be one."""
    config = load_config(folder)
    if not is_run_config(config):
        raise StoreError(
            f"{folder} is not a run: config.json does not name the format {FORMAT!r}. "
            "Pass the folder that `sae-pipe fit --out` wrote."
        )
    version = config.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise StoreError(
            f"Run {folder} has format version {version}, and this sae-pipe reads up to "
            f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade sae-pipe."
        )
    return dict(config)


def _rebuild(folder: Path, section: Any) -> Sae:
    try:
        return rebuild_sae(section)
    except ValueError as error:
        raise StoreError(
            f"Run {folder} cannot be loaded: config.json describes no SAE ({error}). "
            "Fit the run again."
        ) from error


def rebuild_sae(section: Any) -> Sae:
    """The module that `describe_sae` described, without storage: shapes are known, no memory taken.

    Raises ValueError when the section describes none.
    """
    try:
        options = dict(section)
        architecture = get_architecture(options.pop("architecture"))
        sizes = [options[name] for name in ("d_in", "d_sae", "k")]
        given = sizes if sizes[2] is not None else sizes[:2]  # k: of those that have one
        if any(type(size) is not int or not 0 < size < 2**31 for size in given):
            raise ValueError(f"sizes {sizes}")
        if sizes[2] is not None and sizes[2] > sizes[1]:
            raise ValueError(f"{sizes[2]} latents of {sizes[1]} in a row")
        _check_types(architecture, options)
        with torch.device("meta"):
            return architecture(**options)
    except (KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _check_types(architecture: type[Sae], options: dict[str, Any]) -> None:
    """ValueError for a value that JSON allows and the constructor does not expect."""
    for name, parameter in inspect.signature(architecture).parameters.items():
        expected, value = _TYPES.get(str(parameter.annotation)), options.get(name)
        is_default = name not in options or value is parameter.default
        if expected is not None and not is_default and not expected(value):
            raise ValueError(f"{name} is {str(value)[:100]!r}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(kind(each) for each in value)


# Annotations of constructors, which are texts there, and whether a value is one.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "float": _is_number,
    "Sequence[int]": _is_list_of(lambda value: type(value) is int),
    "Sequence[float] | None": _is_list_of(_is_number),
}


def weights_limit_bytes(sae: Sae) -> int:
    """What sae.safetensors can take at most: float64, and a header."""
    n_numbers = sum(math.prod(shape) for shape in sae.parameter_shapes().values())
    return n_numbers * torch.float64.itemsize + (1 << 20)


def _read_tensors(file: Path, sae: Sae) -> dict[str, Tensor]:
    expected = sae.parameter_shapes()
    headers = _read_headers(file)
    missing = sorted(set(expected) ^ set(headers))
    if missing:
        raise StoreError(
            f"{file} does not hold the tensors of its architecture: {', '.join(missing)} "
            "should not be there or are missing. Fit the run again."
        )
    for name, shape in expected.items():
        found_shape, dtype = headers[name]
        if found_shape != shape or dtype not in DTYPES:
            raise StoreError(
                f"{file} holds {name} as {dtype} {found_shape}, but config.json asks "
                f"for float32 {shape}. Fit the run again."
            )
    tensors = read_safetensors(file)
    for name, found in tensors.items():
        if not found.isfinite().all():
            raise StoreError(f"{file} holds NaN or Inf in {name}. Fit the run again.")
    return tensors


def _read_headers(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | str]]:
    """Shape and number format of every tensor of a file, none of which is read."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: (
                    tuple(each.get_shape()),
                    _DTYPE_NAMES.get(each.get_dtype(), each.get_dtype()),
                )
                for name, each in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise damaged_weights(file, error) from error


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises StoreError when it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged_weights(file, error) from error


def damaged_weights(file: Path, error: Exception) -> StoreError:
    """The sentence for a file that safetensors cannot read."""
    return StoreError(
        f"{file} is damaged: it is not a safetensors file ({error}). Fit the run again."
    )
