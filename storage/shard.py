"""One shard file: Zarr v3's `sharding_indexed` codec with the index at the end.

Format (Zarr v3 sharding codec 1.0): the frames of the inner chunks one after another, each followed
by its own crc32c when the inner codecs end with crc32c; then for each chunk the offset and the
length as two little-endian uint64 (both 2**64-1 for a chunk that is absent), then the crc32c of
that index. Frames are assembled here rather than by zarr-python because our threads encode and
decode them in parallel; tests/test_rows.py checks that zarr-python reads what we write and the
other way round.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from .files import write_whole

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4


def crc32c(data: bytes | memoryview) -> bytes:
    """CRC-32C, little endian, as the Zarr codec appends it."""
    # The library takes bytes and read-only arrays, but no memoryview.
    value: int = google_crc32c.value(np.frombuffer(data, np.uint8))
    return value.to_bytes(CRC_BYTES, "little")


def write_shard(path: Path, frames: Sequence[bytes], frames_per_shard: int) -> tuple[int, str]:
    """Write frames (checksums included) as one shard, whole or not at all.

    Returns the size in bytes and the SHA-256 of the file.
    """
    parts, size, digest = assemble_shard(frames, frames_per_shard)
    write_whole(path, *parts)
    return size, digest


def assemble_shard(frames: Sequence[bytes], frames_per_shard: int) -> tuple[list[bytes], int, str]:
    """The parts of a shard's file in order, its size in bytes and its SHA-256.

    A last shard may hold fewer frames than frames_per_shard; the rest of its index says absent.
    """
    index = np.full((frames_per_shard, 2), ABSENT, dtype="<u8")
    lengths = np.array([len(frame) for frame in frames], dtype=np.uint64)
    index[: len(frames), 0] = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    index[: len(frames), 1] = lengths
    tail = index.tobytes()
    tail += crc32c(tail)
    digest = hashlib.sha256()
    parts = [*frames, tail]
    for part in parts:
        digest.update(part)
    return parts, int(lengths.sum()) + len(tail), digest.hexdigest()


def index_bytes(frames_per_shard: int) -> int:
    """Size of the index at the end of a shard."""
    return 16 * frames_per_shard + CRC_BYTES


def packed_limit(n_bytes: int) -> int:
    """No frame of n bytes is longer, whatever its codec and however little it can be packed."""
    return n_bytes + n_bytes // 64 + 4096


def parse_index(tail: bytes, frames: int, file_bytes: int) -> NDArray[np.uint64]:
    """Offsets and lengths (frames, 2) of the first `frames` frames of a shard.

    Raises ValueError if the checksum fails or a frame would lie outside the file.
    """
    if crc32c(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:]:
        raise ValueError("its index fails its checksum")
    index = np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(-1, 2)[:frames].astype(np.uint64)
    if (index == ABSENT).any():
        raise ValueError("its index lacks a chunk")
    limit = np.uint64(file_bytes - len(tail))
    if (index > limit).any() or (index.sum(axis=1) > limit).any():
        raise ValueError("its index points outside the file")
    return index


def checked_frame(data: memoryview) -> memoryview:
    """The frame without its crc32c; ValueError when they disagree."""
    frame, stored = data[:-CRC_BYTES], bytes(data[-CRC_BYTES:])
    if len(data) <= CRC_BYTES or crc32c(frame) != stored:
        raise ValueError("a chunk fails its checksum")
    return frame
