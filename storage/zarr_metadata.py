"""The zarr.json files of a store (Zarr core specification v3).

Fill values are chosen so that rows of a missing shard do not pass for data with a plain reader
either: NaN for activations, -1 for sources. The root carries consolidated metadata, so that listing the
group does not stumble over manifest.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .codecs import Codec
from .codecs.blosc import PLAIN
from .files import write_json
from .layout import Layout

# The zarr.json of one array or group.
Metadata = dict[str, Any]

ROW, VALUE = "row", "d_in"  # names of dimensions

# Of a shard's index and of vectors: uncompressed.
_RAW_CODECS: list[dict[str, Any]] = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]


def array(
    shape: list[int],
    chunk_shape: list[int],
    data_type: str,
    fill_value: Any,
    codecs: list[Any],
    dimension_names: Sequence[str] | None = None,
) -> Metadata:
    """An array on a regular grid of chunks. dimension_names: xarray opens no array without them."""
    named = {} if dimension_names is None else {"dimension_names": list(dimension_names)}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": codecs,
        "attributes": {},
        **named,
        "storage_transformers": [],
    }


def activations_array(layout: Layout, codec: Codec) -> Metadata:
    """(n_rows, d_in), sharded; float32 unless the values are float16."""
    codecs = codec.zarr_codecs(layout.d_in)
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [layout.chunk_rows, codec.columns(layout.d_in)],
            "codecs": codecs,
            "index_codecs": _RAW_CODECS,
            "index_location": "end",
        },
    }
    shard_shape = [layout.shard_rows, layout.d_in]
    return array(
        [layout.n_rows, layout.d_in], shard_shape, codec.container, "NaN", [sharding], (ROW, VALUE)
    )


def source_array(layout: Layout) -> Metadata:
    """int64 (n_rows,): context * context_size + position. One chunk a shard."""
    return array([layout.n_rows], [layout.shard_rows], "int64", -1, PLAIN.zarr_codecs(), (ROW,))


def masked_array(layout: Layout) -> Metadata:
    """bool (n_rows,): whether the row's token was replaced. One chunk a shard."""
    return array([layout.n_rows], [layout.shard_rows], "bool", False, PLAIN.zarr_codecs(), (ROW,))


def vector_array(length: int) -> Metadata:
    """float64 (length,), one chunk."""
    return array([length], [length], "float64", "NaN", _RAW_CODECS, (VALUE,))


def group(members: Mapping[str, Metadata] | None = None) -> Metadata:
    """A group; with `members`, its consolidated metadata."""
    metadata: Metadata = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    if members is not None:
        metadata["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": dict(members),
        }
    return metadata


def write_metadata(
    root: Path,
    members: Mapping[str, Metadata],
    already_there: Mapping[str, Metadata] | None = None,
) -> None:
    """Write the zarr.json of everything below a root group, then the root's, which lists them all.

    already_there: what is listed but has its zarr.json already.
    """
    for name, metadata in members.items():
        write_json(root / name / "zarr.json", metadata)
    write_json(root / "zarr.json", group({**members, **(already_there or {})}))
