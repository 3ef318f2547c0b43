"""Plain text: a file is a document, or several with <|endoftext|> between them.

Such marks are how the files of TinyStories part their stories. What lies between two marks is cut
at line ends into documents of about a mebibyte, so that no file is too large for memory.
"""

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
        self._offset = offset
        self._file = path.open("rb")
        self._file.seek(offset)
        self._buffer = b""

    def position(self) -> int:
        return self._offset

    def __next__(self) -> Row:
        # Enough to see a whole mark that begins at the very end of a piece.
        while len(self._buffer) < _PIECE_BYTES + len(_MARK):
            more = self._file.read(_PIECE_BYTES)
            if not more:
                break
            self._buffer += more
        if not self._buffer:
            self._file.close()
            raise StopIteration
        text, taken = self._cut()
        is_first = self._offset == 0
        self._buffer = self._buffer[taken:]
        self._offset += taken
        try:
            return Row(text.decode("utf-8-sig" if is_first else "utf-8"))
        except UnicodeDecodeError:
            return Row(None, "not UTF-8")

    def _cut(self) -> tuple[bytes, int]:
        """The next document, and how many bytes it and the mark behind it take."""
        end = self._buffer.find(_MARK, 0, _PIECE_BYTES + len(_MARK))
        if end >= 0:
            return self._buffer[:end], end + len(_MARK)
        if len(self._buffer) <= _PIECE_BYTES:
            return self._buffer, len(self._buffer)
        # At an empty line, else at a line's end, else where UTF-8 allows it.
        for separator in (b"\n\n", b"\n"):
            end = self._buffer.rfind(separator, _PIECE_BYTES // 2, _PIECE_BYTES)
            if end >= 0:
                taken = end + len(separator)
                return self._buffer[:taken], taken
        end = _PIECE_BYTES
        while end > _PIECE_BYTES - 3 and self._buffer[end] & 0xC0 == 0x80:
            end -= 1
        return self._buffer[:end], end
