"""JSON Lines, plain or compressed with gzip or Zstandard: one record a line."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import zstandard

from ...storage.errors import InputError
from .base import Json, Row, RowStream
from .files import file_identity

# A longer line is not a document: mostly one JSON array under the wrong name.
_MAX_LINE_BYTES = 256 * 2**20
_READ_BYTES = 256 * 1024
_PIECE_BYTES = 4096  # of zstd, decompressed at once: 128 MiB at the very most


class JsonlReader:
    """One .jsonl file. A position is the offset of the next line in the decompressed bytes."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def identity(self) -> Json:
        return file_identity(self._path, self._name)

    def columns(self) -> list[str] | None:
        return None

    def rows(self, position: int | None) -> RowStream:
        return _Lines(self._path, position or 0)


class _Lines(RowStream):
    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset
        self._lines = self._read()

    def position(self) -> int:
        return self._offset

    def __next__(self) -> Row:
        return next(self._lines)

    def _read(self) -> Iterator[Row]:
        # A generator, so that the file is closed when the stream is dropped half-way.
        with _clear_errors(self._path, self), _open(self._path) as file:
            # Compressed files are read up to the offset, which is far faster than tokenising them.
            file.seek(self._offset)
            while line := file.readline(_MAX_LINE_BYTES):
                is_whole = line.endswith(b"\n") or len(line) < _MAX_LINE_BYTES
                row = _parse(line) if is_whole else Row(None, "line too long")
                self._offset += len(line)
                while line and not line.endswith(b"\n"):
                    line = file.readline(_READ_BYTES)
                    self._offset += len(line)
                yield row


def _parse(line: bytes) -> Row:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Row(None, "not UTF-8")
    text = text.removeprefix("\ufeff")
    if text.isspace() or not text:
        return Row(None, "empty")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Row(None, "malformed JSON")
    return Row(value) if isinstance(value, dict) else Row(None, "not a JSON object")


def _open(path: Path) -> gzip.GzipFile | io.BufferedIOBase:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), _READ_BYTES)
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of every frame of a .zst file.

    Not zstandard's own stream reader, which takes a truncated file for a complete one.
    """

    def __init__(self, path: Path) -> None:
        self._chunks = _decompressed(path)
        self._rest = memoryview(b"")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Forwards only, by reading."""
        assert whence == io.SEEK_SET
        assert offset >= self._at
        skipped = bytearray(_READ_BYTES)
        while self._at < offset:
            if not self.readinto(memoryview(skipped)[: offset - self._at]):
                break
        return self._at

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        self._at += n
        return n


def _decompressed(path: Path) -> Iterator[bytes]:
    # 2 GiB: what `zstd --long=31` writes and the Pile's shards stay below.
    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    with path.open("rb") as file:
        frame, started = context.decompressobj(), False
        while data := file.read(_READ_BYTES):
            # In small pieces: zstd packs up to 32,768 bytes of one kind into one.
            pieces = [data[at : at + _PIECE_BYTES] for at in range(0, len(data), _PIECE_BYTES)]
            for piece in pieces:
                while piece:
                    yield frame.decompress(piece)
                    started, rest = True, b""
                    if frame.eof:
                        rest = frame.unused_data
                        frame, started = context.decompressobj(), False
                    piece = rest
        if started:
            raise EOFError("the last Zstandard frame is not complete")


@contextmanager
def _clear_errors(path: Path, lines: _Lines) -> Iterator[None]:
    """Turn a decompressor's errors into one sentence with the file and how far it was read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise InputError(
            f"Text file {path} is truncated or damaged after {lines.position()} decompressed "
            f"bytes ({error}). Download it again, or leave it out."
        ) from error
