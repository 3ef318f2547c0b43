"""Blosc frames of zstd with byte shuffle: what Zarr's `blosc` codec writes and reads.

Two writers of the same format. `encode` is numcodecs' own. `encode_planes` gives zstd the planes
cut so that each of zstd's blocks lies inside one of them, and tells it to look for no matches: what
is left is Huffman coding of one kind of byte at a time, which packs activations better than zstd's
levels do and decodes faster (docs/architecture.md). Any blosc decoder reads both.

Format: c-blosc 1, README_CHUNK_FORMAT.rst.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numcodecs.blosc
import numpy as np
import zstandard
from numpy.typing import NDArray

# One frame is encoded by one of our threads; blosc's own pool would fight with them.
numcodecs.blosc.use_threads = False

_LEVEL = 1
_HEADER = struct.Struct("<BBBBIII")  # versions, flags, bytes a value; decoded, block, frame bytes
_FORMAT_VERSION, _ZSTD_VERSION = 2, 1
_SHUFFLED, _NOT_SPLIT, _ZSTD = 0x01, 0x10, 4 << 5
_ZSTD_BLOCK_BYTES = 1 << 17  # zstd's own limit


@dataclass(frozen=True, kw_only=True)
class BloscFrames:
    """type_bytes: how many byte planes are shuffled apart (a value, or several columns of values);
    block_bytes: 0 leaves the size to blosc.
    """

    type_bytes: int
    block_bytes: int

    def zarr_codecs(self) -> list[dict[str, Any]]:
        """The Zarr v3 metadata, ending with crc32c, which is not part of a frame here."""
        blosc = {
            "cname": "zstd",
            "clevel": _LEVEL,
            "shuffle": "shuffle",
            "typesize": self.type_bytes,
            "blocksize": self.block_bytes,
        }
        return [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": blosc},
            {"name": "crc32c"},
        ]

    def encode(self, values: NDArray[Any]) -> bytes:
        """One frame of a contiguous array, by blosc itself."""
        frame: bytes = numcodecs.blosc.compress(
            values, b"zstd", _LEVEL, numcodecs.blosc.SHUFFLE, self.block_bytes, self.type_bytes
        )
        return frame

    def encode_planes(self, values: NDArray[Any]) -> bytes:
        """One frame of a contiguous array, Huffman-coded plane by plane."""
        flat = values.reshape(-1).view(np.uint8)
        block_bytes = min(self.block_bytes, flat.size)
        starts, parts = [], []
        n_blocks = -(-flat.size // block_bytes)
        place = _HEADER.size + 4 * n_blocks
        for first in range(0, flat.size, block_bytes):
            block = flat[first : first + block_bytes]
            planes = np.ascontiguousarray(block.reshape(-1, self.type_bytes).T)
            packed = self._huffman(planes.shape[1]).compress(planes.reshape(-1).data)
            if len(packed) >= block.size:
                return self.encode(values)  # incompressible: blosc stores it as it is
            starts.append(place)
            parts += [struct.pack("<i", len(packed)), packed]
            place += 4 + len(packed)
        header = _HEADER.pack(
            _FORMAT_VERSION,
            _ZSTD_VERSION,
            _SHUFFLED | _NOT_SPLIT | _ZSTD,
            self.type_bytes,
            flat.size,
            block_bytes,
            place,
        )
        return b"".join([header, struct.pack(f"<{n_blocks}i", *starts), *parts])

    def _huffman(self, plane_bytes: int) -> zstandard.ZstdCompressor:
        """A compressor whose blocks do not reach over a plane's end.

        Matches are as good as never found: they have to be 7 bytes long and to meet in a table of
        64 entries. The window is what limits the size of a block.
        """
        block = min(plane_bytes, _ZSTD_BLOCK_BYTES)
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=min(max(block.bit_length() - 1, 10), 18),
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
        )
        # Compressors must not be shared between threads; one costs microseconds.
        return zstandard.ZstdCompressor(compression_params=parameters)

    def check_size(self, frame: memoryview, n_bytes: int) -> None:
        """ValueError unless a frame states that it decodes to so many bytes."""
        if len(frame) < _HEADER.size:
            raise ValueError(f"frame has {len(frame)} bytes, fewer than its header")
        stated = int.from_bytes(frame[4:8], "little")
        if stated != n_bytes:
            raise ValueError(f"frame holds {stated} bytes where {n_bytes} belong")

    def decode(self, frame: memoryview, values: NDArray[Any]) -> None:
        """Fill a contiguous array from one frame; ValueError if it is damaged or of another size.

        A blosc frame states its own size: it is checked before blosc writes a byte.
        """
        self.check_size(frame, values.nbytes)
        try:
            numcodecs.blosc.decompress(frame, values)
        except RuntimeError as error:
            raise ValueError(f"blosc cannot decode the frame ({error})") from error


# Of the arrays beside the activations: sources (int64) and mask flags.
PLAIN = BloscFrames(type_bytes=8, block_bytes=0)
