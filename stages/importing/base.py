"""What every kind of input for an import is: rows of equal width, readable by their numbers.

# R rows asked for, D d_in

Nothing here is trusted: sizes are checked against the files before memory is taken, headers are
parsed and never executed, and no name in a file leads out of its folder.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...storage.errors import InputError
from ...storage.plain_json import parse_plain_json
from ..sources.files import file_identity

Json = dict[str, Any]
# Rows as they stand in the input: float16, float32, float64, or bfloat16 bits as uint16.
RawRows = NDArray[Any]

HEADER_LIMIT_BYTES = 1 << 26
NUMBER_FORMATS = ("bfloat16", "float16", "float32", "float64")


class RowInput(ABC):
    """Activations that exist already.

    name: for messages; n_rows, d_in; context_size: positions of a context, None where rows stand by
    themselves; number_format: one of NUMBER_FORMATS; rows_together: how many neighbours cost as
    much to read as one of them; member: the tensor, column or array that was chosen.

    kind and selector: of the class; the latter is the flag that chooses a member, if it has one.
    """

    kind: ClassVar[str]
    about: ClassVar[str]
    selector: ClassVar[str | None] = None

    name: str
    n_rows: int
    d_in: int
    context_size: int | None = None
    number_format: str
    rows_together: int = 1
    member: str | None = None

    @classmethod
    @abstractmethod
    def takes(cls, path: Path) -> bool:
        """Whether this is the kind of input that stands at a path."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path, member: str | None) -> "RowInput":
        """The input at a path; InputError for one that cannot be read.

        member: which tensor, column or array, None for the only one.
        """

    @abstractmethod
    def files(self) -> Sequence[tuple[Path, str]]:
        """All files of the input, with their names in it."""

    def sampled(self) -> Sequence[tuple[Path, str]]:
        """The files whose samples identify the input."""
        return self.files()

    @abstractmethod
    def read(self, rows_R: NDArray[np.int64]) -> RawRows:
        """Rows by their numbers, which ascend: (R, D). Any thread may call."""

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path, _ in self.files())

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, d_in), or (contexts, positions, d_in)."""
        if self.context_size is None:
            return self.n_rows, self.d_in
        return self.n_rows // self.context_size, self.context_size, self.d_in

    def identity(self) -> Json:
        """What tells this input from another, for the recipe."""
        return {
            "kind": self.kind,
            "name": Path(self.name).name,
            "bytes": self.bytes,
            "shape": list(self.shape),
            "dtype": self.number_format,
            **({} if self.selector is None else {self.selector: self.member}),
            "parts": [file_identity(path, name) for path, name in self.sampled()],
        }


@dataclass(frozen=True)
class RawPart:
    """Rows that stand end to end in a file from `offset` on."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    number_format: str

    @property
    def n_rows(self) -> int:
        return int(np.prod([int(n) for n in self.shape[:-1]], dtype=object))


class RawInput(RowInput):
    """Rows of one or several plain arrays in files, one after another, read by pread.

    Not by a memory map: a file that is cut off meanwhile would be a signal instead of an error, and
    what was read would count as memory.
    """

    def __init__(self, name: str, parts: Sequence[RawPart], member: str | None = None) -> None:
        self.name, self.member, self._parts = name, member, parts
        first = parts[0]
        for part in parts:
            same = (part.shape[1:], part.dtype, part.number_format)
            if same != (first.shape[1:], first.dtype, first.number_format):
                raise InputError(
                    f"{part.path} holds {_describe(part)}, and {first.path} {_describe(first)}. "
                    "Pass files of one width and number format."
                )
        self.number_format = first.number_format
        self.d_in = first.shape[-1]
        self.context_size = first.shape[1] if len(first.shape) == 3 else None
        self._starts = np.cumsum([0, *(part.n_rows for part in parts)])
        self.n_rows = int(self._starts[-1])
        self._descriptors: dict[Path, int] = {}
        for part in parts:
            if part.path not in self._descriptors:
                self._descriptors[part.path] = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def files(self) -> Sequence[tuple[Path, str]]:
        return [(path, path.name) for path in self._descriptors]

    def read(self, rows_R: NDArray[np.int64]) -> RawRows:
        out = np.empty((len(rows_R), self.d_in), self._parts[0].dtype)
        # Runs of neighbours, also cut where one part ends.
        parts_R = np.searchsorted(self._starts, rows_R, side="right") - 1
        cuts = np.flatnonzero((np.diff(rows_R) != 1) | (np.diff(parts_R) != 0)) + 1
        for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows_R)], strict=True):
            if start == stop:
                continue
            part = int(parts_R[start])
            self._fill(self._parts[part], int(rows_R[start] - self._starts[part]), out[start:stop])
        return out.astype(out.dtype.newbyteorder("="), copy=False)

    def _fill(self, part: RawPart, row: int, out_RD: RawRows) -> None:
        """Read the rows from `row` of a part on, as many as out_RD has."""
        place = part.offset + row * out_RD.shape[1] * out_RD.itemsize
        left = memoryview(out_RD.view(np.uint8).reshape(-1).data)
        while left:
            try:
                n = os.preadv(self._descriptors[part.path], [left], place)
            except OSError as error:
                raise InputError(
                    f"{part.path} cannot be read ({error.strerror}). Check the disk it is on."
                ) from error
            if n == 0:
                raise InputError(
                    f"{part.path} became shorter while it was read. Import it again when it is "
                    "complete."
                )
            left, place = left[n:], place + n


def _describe(part: RawPart) -> str:
    return f"{part.number_format} of shape {part.shape}"


def check_shape(shape: Any, what: str) -> tuple[int, ...]:
    """(rows, d_in) or (contexts, positions, d_in), as whole numbers above zero."""
    try:
        sizes = tuple(shape)
    except TypeError:
        sizes = ()
    if len(sizes) not in (2, 3) or any(type(n) is not int or n < 1 for n in sizes):
        raise InputError(
            f"{what} has shape {shape}, and activations are (rows, d_in) or (contexts, positions, "
            "d_in) with at least one of each."
        )
    return sizes


def check_size(path: Path, what: str, needed: int, there: int) -> None:
    """InputError unless an array takes exactly the bytes that are there for it."""
    if needed != there:
        raise InputError(
            f"{what} of {path} needs {needed:,} bytes by its header, and {there:,} are there: it "
            "is cut off or damaged. Fetch it again."
        )


def only_member(path: Path, what: str, flag: str, names: Sequence[str], asked: str | None) -> str:
    """The member that was asked for, or the only one there is."""
    if asked is not None:
        if asked not in names:
            raise InputError(
                f"{path} has no {what} {asked!r} of floats. Pass one of {_listed(names)} as {flag}."
            )
        return asked
    if len(names) != 1:
        found = f"several {what}s" if names else f"no {what}"
        raise InputError(
            f"{path} has {found} of floats that could be rows"
            + (f": {_listed(names)}. Pass one as {flag}." if names else ". Pass another input.")
        )
    return names[0]


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name)[:80] for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read_json(path: Path, limit_bytes: int = HEADER_LIMIT_BYTES) -> Json:
    """A JSON object of a file of bounded size."""
    try:
        if path.stat().st_size > limit_bytes:
            raise ValueError(f"it has more than {limit_bytes:,} bytes")
        value = parse_plain_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object. Fetch it again.")
    return value


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which part 10 comes after part 9."""
    parts: list[tuple[int, str]] = []
    digits = ""
    for char in [*name, ""]:
        if char.isdigit() and char.isascii():
            digits += char
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, char))
    return parts


def files_with(path: Path, suffix: str) -> list[Path]:
    """The file itself, or the files of a folder with a suffix, in natural order."""
    if path.is_file():
        return [path] if path.suffix == suffix else []
    if not path.is_dir():
        return []
    found = [file for file in path.iterdir() if file.suffix == suffix and file.is_file()]
    return sorted(found, key=lambda file: natural(file.name))
