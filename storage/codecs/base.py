"""What a codec is, and the bfloat16 arithmetic that codecs share.

# R rows of a chunk, D d_in

Inside sae-pipe a value travels as the 16 bits of its bfloat16 (uint16). In a store it stands in a
float32 array, because no released zarr-python knows bfloat16 and a plain reader must see the right
numbers; the low 16 bits are zero there and cost nothing once compressed.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]


class Codec(Protocol):
    """One way to turn a chunk of rows into bytes. Stateless, so threads may share it."""

    name: str
    description: str

    def zarr_codecs(self) -> list[dict[str, Any]]:
        """The Zarr v3 metadata of the codecs inside the shard, in order, ending with crc32c."""
        ...

    def encode(self, values_RD: Floats) -> bytes:
        """One frame, without the checksum that `zarr_codecs` ends with."""
        ...

    def decode(self, frame: memoryview, values_RD: Floats) -> None:
        """Fill `values_RD` (C-contiguous) from one frame; ValueError if the sizes do not agree."""
        ...


def widen(bits: Bits, out: Floats) -> None:
    """The float32 values of bfloat16 bits. `out` is overwritten, low halves included."""
    np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")


def narrow(values: Floats, out: Bits) -> None:
    """The bfloat16 bits of float32 values that are bfloat16 already (their low half is zero)."""
    high = values.view(np.uint16).reshape(*values.shape, 2)[..., 1]  # little-endian: high half last
    np.copyto(out, high)


def round_to_bfloat16(values: Floats) -> Bits:
    """bfloat16 bits of float32 values, round-to-nearest-even. NaN stays NaN."""
    as_int = np.ascontiguousarray(values).view(np.uint32)
    rounded = as_int + np.uint32(0x7FFF) + ((as_int >> np.uint32(16)) & np.uint32(1))
    bits = (rounded >> np.uint32(16)).astype(np.uint16)
    bits[np.isnan(values)] = 0x7FC0
    return bits
