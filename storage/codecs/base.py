"""What a codec is.

# R rows of a chunk, D d_in, K columns of a frame

A chunk of rows is stored as one frame for each run of K columns (K = D for most codecs). A frame is
exactly what the Zarr v3 codecs that the codec declares would accept, so every Zarr reader that
knows those gets right numbers without this package.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from ..errors import InputError
from ..values import BFLOAT16, Floats, Rows, ValueType


@dataclass(frozen=True)
class Served:
    """How a reader hands rows over: `memory` arrays, whose numbers are `step` times their values.

    name: a number format of storage/values.py, or "steps" for whole multiples of `step`.
    """

    name: str
    memory: np.dtype[Any]
    step: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """One way to turn chunks of rows into bytes. Immutable, so threads may share it."""

    name: ClassVar[str]
    description: ClassVar[str]
    is_lossy: ClassVar[bool] = False

    values: ValueType = field(default=BFLOAT16)

    @classmethod
    def parse(cls, option: str | None, values: ValueType) -> Self:
        """The codec of `NAME` or `NAME:option`; InputError for an option it does not take."""
        if option is not None:
            raise InputError(
                f"Codec {cls.name!r} takes no option, found {cls.name}:{option}. "
                f"Pass --codec {cls.name}."
            )
        return cls(values=values)

    @property
    def spelling(self) -> str:
        """What --codec takes to get this codec."""
        return self.name

    @property
    def container(self) -> str:
        """Zarr data type of the array, which is what a plain reader shows."""
        return self.values.container

    @property
    def stored(self) -> np.dtype[Any]:
        """Type of the numbers inside a frame."""
        return np.dtype(self.container)

    @property
    def served(self) -> Served:
        """What `serve` writes."""
        return Served(self.values.name, self.values.memory)

    @property
    def typical_deviation(self) -> float | None:
        """What a lossy codec found to be the standard deviation of an ordinary dimension."""
        return None

    @property
    def parameters(self) -> dict[str, Any]:
        """What calibration has found, for the manifest."""
        return {}

    def calibrated(self, sample_RD: Floats) -> Self:
        """This codec fitted to a sample of the rows it will store."""
        return self

    def with_parameters(self, parameters: dict[str, Any]) -> Self:
        """This codec as the manifest of a store records it; ValueError for what cannot be."""
        return self

    def columns(self, d_in: int) -> int:
        """Columns K of a frame; divides d_in."""
        return d_in

    def chunk_rows(self, d_in: int) -> int | None:
        """Rows of a chunk where the codec needs a number of its own."""
        return None

    def kept(self, values_RD: Floats) -> Floats:
        """What a reader will see of these values: themselves, unless the codec is lossy."""
        return values_RD

    @abstractmethod
    def zarr_codecs(self, d_in: int) -> list[dict[str, Any]]:
        """The Zarr v3 metadata of the codecs inside the shard, in order, ending with crc32c."""

    @abstractmethod
    def encode(self, values_RD: Floats) -> list[bytes]:
        """The frames of one chunk, columns ascending, without the checksums that stand behind."""

    @abstractmethod
    def decode(self, frame: memoryview, stored_RK: Rows) -> None:
        """Fill `stored_RK` (contiguous, type `stored`) from one frame.

        ValueError if the frame is damaged or of another size.
        """

    def serve(self, stored_RK: Rows, out_RK: Rows) -> None:
        """The rows of a decoded frame as `served` says; out_RK may be columns of a wider array."""
        if self.values is BFLOAT16:
            np.right_shift(stored_RK.view(np.uint32), 16, out=out_RK, casting="unsafe")
        else:
            np.copyto(out_RK, stored_RK)

    def to_floats(self, served_RD: Rows, out_RD: Floats) -> None:
        """float32 of served rows: bit for bit what a plain Zarr reader shows."""
        self.values.to_floats(served_RD, out_RD)
