"""How the values of rows stand in memory, and the bfloat16 arithmetic.

# R rows, D d_in

numpy has no bfloat16: its 16 bits travel as uint16. In a store such a value stands in a float32
array, because no released zarr-python knows bfloat16 and a plain reader must see the right numbers;
the low 16 bits are zero there and cost nothing once compressed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]
# Rows in the memory type of their number format: uint16 bits, float16, float32 or whole steps.
Rows = NDArray[Any]


def widen(bits: Bits, out: Floats) -> None:
    """The float32 values of bfloat16 bits. `out` is overwritten, low halves included."""
    np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")


def narrow(values: Floats, out: Bits) -> None:
    """The bfloat16 bits of float32 values that are bfloat16 already (their low half is zero)."""
    # Twice as fast as copying the high halves, which stand four bytes apart.
    np.right_shift(values.view(np.uint32), 16, out=out, casting="unsafe")


def round_to_bfloat16(values: Floats) -> Bits:
    """bfloat16 bits of float32 values, round-to-nearest-even. NaN stays NaN."""
    as_int = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = as_int + np.uint32(0x7FFF) + ((as_int >> np.uint32(16)) & np.uint32(1))
    bits = (rounded >> np.uint32(16)).astype(np.uint16)
    bits[np.isnan(values)] = 0x7FC0
    return bits


@dataclass(frozen=True)
class ValueType:
    """A number format of rows.

    memory: numpy type in which a value travels; container: Zarr data type in which it is stored.
    """

    name: str
    memory: np.dtype[Any]
    container: str
    rounding: str

    @property
    def bytes(self) -> int:
        """Of one value, raw."""
        return self.memory.itemsize

    def to_floats(self, rows: Rows, out: Floats) -> None:
        """Widen rows to float32, exactly."""
        if self.name == "bfloat16":
            widen(rows, out)
        else:
            np.copyto(out, rows)

    def of_floats(self, values: Floats) -> Rows:
        """Round float32 values to this format, to nearest, ties to even."""
        if self.name == "bfloat16":
            return round_to_bfloat16(values)
        with np.errstate(over="ignore"):  # becomes Inf, which a writer refuses
            return np.ascontiguousarray(values, dtype=self.memory)


_ROUNDED = "round to nearest, ties to even"

VALUE_TYPES: dict[str, ValueType] = {
    "bfloat16": ValueType("bfloat16", np.dtype(np.uint16), "float32", _ROUNDED),
    "float16": ValueType("float16", np.dtype(np.float16), "float16", _ROUNDED),
    "float32": ValueType("float32", np.dtype(np.float32), "float32", "none"),
}
BFLOAT16 = VALUE_TYPES["bfloat16"]


def value_type(name: str) -> ValueType:
    """The number format of that name; InputError lists the known ones."""
    if name not in VALUE_TYPES:
        raise InputError(
            f"Unknown number format {name!r} of stored values: choose one of "
            f"{', '.join(sorted(VALUE_TYPES))}."
        )
    return VALUE_TYPES[name]
