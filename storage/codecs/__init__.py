"""How rows become bytes: the registry of codecs.

A codec turns one chunk of rows into frames and back. Frames are exactly what the Zarr v3 codecs it
declares would write, so every Zarr reader that knows those gets right numbers without this package.
To add one: one file here, one line in CODECS; tests/test_codecs.py runs over the registry.
"""

from typing import Any

from ..errors import InputError
from ..values import value_type
from .base import Codec, Served
from .compact import Compact
from .lossless import Lossless
from .none import NoCompression

CODECS: dict[str, type[Codec]] = {
    "lossless": Lossless,
    "compact": Compact,
    "none": NoCompression,
}


def get_codec(spelling: str, store_dtype: str = "bfloat16") -> Codec:
    """The codec that `NAME` or `NAME:OPTION` spells; InputError lists the known ones."""
    name, colon, option = spelling.partition(":")
    if name not in CODECS:
        raise InputError(f"Unknown codec {spelling!r}: choose one of {', '.join(sorted(CODECS))}.")
    return CODECS[name].parse(option if colon else None, value_type(store_dtype))


def codec_of(manifest: dict[str, Any]) -> Codec:
    """The codec of a store as its manifest records it.

    KeyError, TypeError or ValueError (InputError is one) when the manifest cannot be right.
    """
    encoding = manifest.get("encoding", {})
    codec = get_codec(manifest["codec"], encoding.get("dtype", "bfloat16"))
    return codec.with_parameters(encoding.get("parameters", {}))


__all__ = ["CODECS", "Codec", "Served", "codec_of", "get_codec"]
