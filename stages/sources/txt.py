"""Plain text: a file is a document, or several with <|endoftext|> between them.

Such marks are how the files of TinyStories part their stories. What lies between two marks is cut
at line ends into documents of about a mebibyte, so that no file is too large for memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from .base import Json, Row, RowStream
from .files import file_identity

_MARK = b"<|endoftext|>"
_PIECE_BYTES = 2**20


class TxtReader:
    """One .txt file in UTF-8. A position is the byte offset of the next document."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def identity(self) -> Json:
        return file_identity(self._path, self._name)

    def columns(self) -> list[str] | None:
        return None

    def rows(self, position: int | None) -> RowStream:
        return _Documents(self._path, position or 0)


class _Documents(RowStream):
    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset
        self._rows = self._read()

    def position(self) -> int:
        return self._offset

    def __next__(self) -> Row:
        return next(self._rows)

    def _read(self) -> Iterator[Row]:
        # A generator, so that the file is closed when the stream is dropped half-way.
        with self._path.open("rb") as file:
            file.seek(self._offset)
            buffer = b""
            while True:
                # Enough to see a whole mark that begins at the very end of a piece.
                while len(buffer) < _PIECE_BYTES + len(_MARK):
                    more = file.read(_PIECE_BYTES)
                    if not more:
                        break
                    buffer += more
                if not buffer:
                    return
                piece, taken = _cut(buffer)
                encoding = "utf-8-sig" if self._offset == 0 else "utf-8"
                buffer = buffer[taken:]
                self._offset += taken
                yield _decode(piece, encoding)


def _decode(piece: bytes, encoding: str) -> Row:
    try:
        return Row(piece.decode(encoding))
    except UnicodeDecodeError:
        return Row(None, "not UTF-8")


def _cut(buffer: bytes) -> tuple[bytes, int]:
    """The next document, and how many bytes it and the mark behind it take."""
    end = buffer.find(_MARK, 0, _PIECE_BYTES + len(_MARK))
    if end >= 0:
        return buffer[:end], end + len(_MARK)
    if len(buffer) <= _PIECE_BYTES:
        return buffer, len(buffer)
    # At an empty line, else at a line's end, else where UTF-8 allows it.
    for separator in (b"\n\n", b"\n"):
        end = buffer.rfind(separator, _PIECE_BYTES // 2, _PIECE_BYTES)
        if end >= 0:
            taken = end + len(separator)
            return buffer[:taken], taken
    end = _PIECE_BYTES
    while end > _PIECE_BYTES - 3 and buffer[end] & 0xC0 == 0x80:
        end -= 1
    return buffer[:end], end
