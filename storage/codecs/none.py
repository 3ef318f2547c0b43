"""No compression: the container as it is, for those who want raw speed."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..values import Floats, Rows
from .base import Codec


@dataclass(frozen=True, kw_only=True)
class NoCompression(Codec):
    """Four bytes a value (two for float16)."""

    name = "none"
    description = "no compression; largest, fastest to read from a fast disk"

    def zarr_codecs(self, d_in: int) -> list[dict[str, Any]]:
        return [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]

    def encode(self, values_RD: Floats) -> list[bytes]:
        return [values_RD.astype(self.stored.newbyteorder("<"), copy=False).tobytes()]

    def decode(self, frame: memoryview, stored_RK: Rows) -> None:
        if len(frame) != stored_RK.nbytes:
            raise ValueError(f"frame holds {len(frame)} bytes where {stored_RK.nbytes} belong")
        little = np.frombuffer(frame, dtype=self.stored.newbyteorder("<"))
        stored_RK[...] = little.reshape(stored_RK.shape)
