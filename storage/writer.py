"""Writing the shards of one split of a store.

# R rows of a shard, D d_in

A shard is three files under one number: activations, source and (for training rows) masked. Each is
written whole; then a commit record names their sizes and digests. A shard without its record does
not exist: it is written again, to the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from . import zarr_metadata
from .codecs import Codec
from .codecs.base import Bits, widen
from .files import write_json, write_whole
from .layout import Layout
from .manifest import COMMITS
from .shard import crc32c, write_shard
from .statistics import Moments


class SplitWriter:
    """Writes shards of one split, in any order, from any thread."""

    def __init__(
        self,
        root: Path,
        split: str,
        layout: Layout,
        codec: Codec,
        pool: Executor,
        *,
        with_masked: bool,
    ) -> None:
        """root: the store; split: "" for training rows, "heldout" for the held-out ones.

        committed: numbers of the shards that are written, by this writer or one before it.
        """
        self.root, self.split, self.layout, self.codec = root, split, layout, codec
        self._pool, self._with_masked = pool, with_masked
        self._folder = root / split if split else root
        self._commits = root / COMMITS / (split or "train")
        self._commits.mkdir(parents=True, exist_ok=True)
        self.committed = {int(file.stem) for file in self._commits.glob("[0-9]*.json")}

    def metadata(self) -> dict[str, zarr_metadata.Metadata]:
        """zarr.json of each array, by its path below the root."""
        prefix = f"{self.split}/" if self.split else ""
        members = {
            f"{prefix}activations": zarr_metadata.activations_array(self.layout, self.codec),
            f"{prefix}source": zarr_metadata.source_array(self.layout),
        }
        if self._with_masked:
            members[f"{prefix}masked"] = zarr_metadata.masked_array(self.layout)
        return members

    def write(
        self,
        shard: int,
        bits_RD: Bits,
        source_R: NDArray[np.int64],
        masked_R: NDArray[np.bool_] | None = None,
    ) -> None:
        """Encode, write and commit one shard. Raises DiskError; a partial shard is never seen.

        bits_RD: bfloat16 bits; masked_R is left out where the split has no such array.
        """
        first, last = self.layout.rows_of_shard(shard)
        assert bits_RD.shape == (last - first, self.layout.d_in)
        assert source_R.shape == (last - first,)
        step = self.layout.chunk_rows
        jobs = [
            self._pool.submit(self._encode_chunk, bits_RD[start : start + step])
            for start in range(0, len(bits_RD), step)
        ]
        moments = Moments.empty(self.layout.d_in)
        frames = []
        for job in jobs:
            frame, of_chunk = job.result()
            frames.append(frame)
            moments.merge(of_chunk)
        files = {"source": self._write_plain("source", shard, source_R.astype("<i8"))}
        if self._with_masked:
            assert masked_R is not None
            files["masked"] = self._write_plain("masked", shard, masked_R.astype("u1"))
        path = self._folder / "activations" / "c" / str(shard) / "0"
        size, digest = write_shard(path, frames, self.layout.chunks_per_shard)
        files["activations"] = {"bytes": size, "sha256": digest}
        record = {"rows": last - first, "files": files, "moments": moments.to_json()}
        write_json(self._commits / f"{shard:08d}.json", record)
        self.committed.add(shard)

    def _encode_chunk(self, bits_RD: Bits) -> tuple[bytes, Moments]:
        # Zarr stores edge chunks at full size: the rows beyond the end are zeros.
        values = np.zeros((self.layout.chunk_rows, self.layout.d_in), np.float32)
        widen(bits_RD, values[: len(bits_RD)])
        frame = self.codec.encode(values)
        return frame + crc32c(frame), Moments.of(values[: len(bits_RD)])

    def _write_plain(
        self, name: str, shard: int, values: NDArray[np.int64] | NDArray[np.uint8]
    ) -> dict[str, Any]:
        padded = np.full(self.layout.shard_rows, -1 if name == "source" else 0, values.dtype)
        padded[: len(values)] = values
        frame = numcodecs.blosc.compress(padded, b"zstd", 1, numcodecs.blosc.SHUFFLE, 0, 8)
        frame += crc32c(frame)
        write_whole(self._folder / name / "c" / str(shard), frame)
        return {"bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()}

    def collect(self) -> tuple[list[dict[str, Any]], Moments]:
        """All commit records in order, and the moments of all rows."""
        records, moments = [], Moments.empty(self.layout.d_in)
        for shard in range(self.layout.n_shards):
            record = json.loads((self._commits / f"{shard:08d}.json").read_bytes())
            moments.merge(Moments.from_json(record["moments"]))
            records.append({"rows": record["rows"], "files": record["files"]})
        return records, moments


def write_vectors(root: Path, vectors: Mapping[str, NDArray[np.float64]]) -> None:
    """Write float64 vectors as one-chunk Zarr arrays, whole."""
    for name, vector in vectors.items():
        frame = vector.astype("<f8").tobytes()
        write_whole(root / name / "c" / "0", frame + crc32c(frame))
