"""No compression: the float32 container as it is, for those who want raw speed."""

from typing import Any

import numpy as np

from .base import Floats


class NoCompression:
    """Four bytes a value."""

    name = "none"
    description = "bfloat16 values as plain float32; largest, fastest to read"

    def zarr_codecs(self) -> list[dict[str, Any]]:
        return [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]

    def encode(self, values_RD: Floats) -> bytes:
        return values_RD.astype("<f4", copy=False).tobytes()

    def decode(self, frame: memoryview, values_RD: Floats) -> None:
        if len(frame) != values_RD.nbytes:
            raise ValueError(f"frame holds {len(frame)} bytes where {values_RD.nbytes} belong")
        values_RD[...] = np.frombuffer(frame, dtype="<f4").reshape(values_RD.shape)
