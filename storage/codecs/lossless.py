"""The default: blosc frames that lose nothing after the rounding to the store's number format.

The values of a chunk are cut into planes of like bytes, and each plane is Huffman-coded. Blocks of
1 MiB hold planes of at least 128 KiB, the largest block that zstd codes with one table; with blosc's
default block size two planes share a table, which costs an eighth of the size (docs/log.md).
"""

from dataclasses import dataclass
from typing import Any

from ..values import Floats, Rows
from .base import Codec
from .blosc import BloscFrames

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Lossless(Codec):
    """About 1.49 times smaller than raw bfloat16 on residual streams."""

    name = "lossless"
    description = "byte-shuffled and Huffman-coded; nothing lost after rounding"

    @property
    def _frames(self) -> BloscFrames:
        return BloscFrames(type_bytes=self.stored.itemsize, block_bytes=_BLOCK_BYTES)

    def zarr_codecs(self, d_in: int) -> list[dict[str, Any]]:
        return self._frames.zarr_codecs()

    def encode(self, values_RD: Floats) -> list[bytes]:
        return [self._frames.encode_planes(values_RD.astype(self.stored, copy=False))]

    def decode(self, frame: memoryview, stored_RK: Rows) -> None:
        self._frames.decode(frame, stored_RK)
