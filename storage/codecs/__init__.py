"""How rows become bytes: the registry of codecs.

A codec turns one chunk of rows into one frame and back. Frames are exactly what the Zarr v3 codecs
it declares would write, so every Zarr reader gets right numbers without this package. To add one:
one file here, one line in CODECS; the contract tests in tests/test_rows.py run over the registry.
"""

from ..errors import InputError
from .base import Codec
from .lossless import Lossless
from .none import NoCompression

CODECS: dict[str, Codec] = {
    "lossless": Lossless(),
    "none": NoCompression(),
}


def get_codec(name: str) -> Codec:
    """The codec of that name; InputError lists the known ones."""
    if name not in CODECS:
        raise InputError(f"Unknown codec {name!r}: choose one of {', '.join(sorted(CODECS))}.")
    return CODECS[name]


__all__ = ["CODECS", "Codec", "get_codec"]
