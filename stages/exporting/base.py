"""What a format of an export is: a folder that takes rows with their sources, front to back.

# R rows of a part, D d_in
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...storage.values import Rows

ACTIVATIONS, SOURCE = "activations", "source"


class Exporter(ABC):
    """One export being written. about, number_formats, missing: of the class.

    missing: why a number format of stores is none of this format's, by its name.
    """

    about: ClassVar[str]
    number_formats: ClassVar[tuple[str, ...]]
    missing: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def __init__(
        self, folder: Path, shape: tuple[int, int], number_format: str, notes: dict[str, str]
    ) -> None:
        """Begin with the headers. shape: (rows, d_in) in all; notes: for a place in the file."""

    @abstractmethod
    def write(self, rows_RD: Rows, source_R: NDArray[np.int64]) -> None:
        """Append rows; bfloat16 as uint16 bits. Raises OSError."""

    @abstractmethod
    def close(self) -> None:
        """Finish the files; also called after an error, more than once."""


def little_endian(values: NDArray[Any]) -> memoryview:
    """The bytes of an array as files have them."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).view(np.uint8).data
