"""Writing the shards of one split of a store.

# R rows of a shard, D d_in

A shard is three files under one number: activations, source and (for training rows) masked. Each is
written whole; then a commit record names their sizes and digests. A shard without its record does
not exist: it is written again, to the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import zarr_metadata
from .codecs import Codec
from .codecs.blosc import PLAIN
from .errors import NonFiniteError
from .files import write_json, write_whole
from .layout import Layout
from .manifest import COMMITS
from .shard import crc32c, write_shard
from .statistics import Distortion, Moments
from .values import Floats, Rows


@dataclass(frozen=True)
class _Chunk:
    """One encoded chunk: frames with their checksums, and statistics of its rows."""

    frames: list[bytes]
    moments: Moments
    distortion: Distortion | None


@dataclass(frozen=True)
class Collected:
    """What the commit records of a split add up to.

    shards: the manifest's records; moments: of the rows as a reader sees them; distortion: what a
    lossy codec has done to them.
    """

    shards: list[dict[str, Any]]
    moments: Moments
    distortion: Distortion | None


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
        committed: set[int] | None = None,
    ) -> None:
        """root: the store; split: "" for training rows, "heldout" for the held-out ones.

        committed: numbers of the shards that are written, by this writer or one before it; None
        looks for their commit records. before_commit: called with a shard and its record once the
        files are written; what it raises leaves the shard uncommitted.
        """
        self.root, self.split, self.layout, self.codec = root, split, layout, codec
        self._pool, self._with_masked = pool, with_masked
        self.before_commit: Callable[[int, dict[str, Any]], object] | None = None
        self._folder = root / split if split else root
        self._commits = root / COMMITS / (split or "train")
        if committed is None:
            self._commits.mkdir(parents=True, exist_ok=True)
            committed = {int(file.stem) for file in self._commits.glob("[0-9]*.json")}
        self.committed = committed

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
        rows_RD: Rows,
        source_R: NDArray[np.int64],
        masked_R: NDArray[np.bool_] | None = None,
    ) -> None:
        """Encode, write and commit one shard; a partial one is never seen.

        rows_RD: in the memory type of the codec's `values` (bfloat16: uint16 bits); masked_R is
        left out where the split has no such array. Raises DiskError, and NonFiniteError for NaN or
        Inf.
        """
        frames, moments, distortion = self._encode(shard, rows_RD)
        first, last = self.layout.rows_of_shard(shard)
        assert source_R.shape == (last - first,)
        files = {"source": self._write_plain("source", shard, source_R)}
        if self._with_masked:
            assert masked_R is not None
            files["masked"] = self._write_plain("masked", shard, masked_R)
        size, digest = write_shard(self._path("activations", shard), frames, self._frames_per_shard)
        files["activations"] = {"bytes": size, "sha256": digest}
        record = {"rows": len(source_R), "files": files, "moments": moments.to_json()}
        if distortion is not None:
            record["distortion"] = distortion.to_json()
        if self.before_commit is not None:
            self.before_commit(shard, record)
        write_json(self._commits / f"{shard:08d}.json", record)
        self.committed.add(shard)

    def _encode(self, shard: int, rows_RD: Rows) -> tuple[list[bytes], Moments, Distortion | None]:
        """Frames of a shard with their checksums, and the statistics of its rows."""
        first, last = self.layout.rows_of_shard(shard)
        assert rows_RD.shape == (last - first, self.layout.d_in)
        return self._encode_chunks(shard, rows_RD)

    def _encode_chunks(
        self, shard: int, rows_RD: Rows, before_RD: Floats | None = None
    ) -> tuple[list[bytes], Moments, Distortion | None]:
        """Encode chunks in threads. before_RD: rows of the first chunk that stand before rows_RD and
        do not count in the statistics.
        """
        assert rows_RD.dtype == self.codec.values.memory
        step = self.layout.chunk_rows
        n_before = 0 if before_RD is None else len(before_RD)
        jobs = [
            self._pool.submit(
                self._encode_chunk,
                shard,
                rows_RD[max(start, 0) : start + step],
                before_RD if start < 0 else None,
            )
            for start in range(-n_before, len(rows_RD), step)
        ]
        moments = Moments.empty(self.layout.d_in)
        distortion = Distortion.empty(self.layout.d_in) if self.codec.is_lossy else None
        frames: list[bytes] = []
        for job in jobs:
            of_chunk = job.result()
            frames += of_chunk.frames
            moments.merge(of_chunk.moments)
            if distortion is not None and of_chunk.distortion is not None:
                distortion.merge(of_chunk.distortion)
        return frames, moments, distortion

    def _path(self, array: str, shard: int) -> Path:
        path = self._folder / array / "c" / str(shard)
        return path / "0" if array == "activations" else path

    @property
    def _frames_per_shard(self) -> int:
        columns = self.codec.columns(self.layout.d_in)
        return self.layout.chunks_per_shard * (self.layout.d_in // columns)

    def _encode_chunk(self, shard: int, rows_RD: Rows, before_RD: Floats | None = None) -> "_Chunk":
        # Zarr stores edge chunks at full size: the rows beyond the end are zeros.
        values = np.zeros((self.layout.chunk_rows, self.layout.d_in), np.float32)
        n_before = 0
        if before_RD is not None:
            n_before = len(before_RD)
            values[:n_before] = before_RD
        given = values[n_before : n_before + len(rows_RD)]
        self.codec.values.to_floats(rows_RD, given)
        # Both ends propagate NaN, and need no memory, as isfinite over all values would.
        if not (np.isfinite(given.max()) and np.isfinite(given.min())):
            raise NonFiniteError(
                f"Shard {shard} of {self._folder} was given rows with NaN or Inf. "
                "Find out where they come from: a store cannot hold them."
            )
        frames = [frame + crc32c(frame) for frame in self.codec.encode(values)]
        if not self.codec.is_lossy:
            return _Chunk(frames, Moments.of(given), None)
        kept = self.codec.kept(given)
        distortion = Distortion.of(given, kept, self.codec.served.step)
        return _Chunk(frames, Moments.of(kept), distortion)

    def _write_plain(
        self, array: str, shard: int, values_R: NDArray[np.int64] | NDArray[np.bool_]
    ) -> dict[str, Any]:
        frame = plain_frame(array, values_R, self.layout.shard_rows)
        write_whole(self._path(array, shard), frame)
        return {"bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()}

    def collect(self, first_shard: int = 0) -> "Collected":
        """The commit records from a shard on, in order, and what they say of its rows and all later."""
        records, moments = [], Moments.empty(self.layout.d_in)
        distortion = Distortion.empty(self.layout.d_in) if self.codec.is_lossy else None
        for shard in range(first_shard, self.layout.n_shards):
            record = json.loads((self._commits / f"{shard:08d}.json").read_bytes())
            moments.merge(Moments.from_json(record["moments"]))
            if distortion is not None:
                distortion.merge(Distortion.from_json(record["distortion"]))
            records.append({"rows": record["rows"], "files": record["files"]})
        return Collected(records, moments, distortion)


def plain_frame(
    array: str, values_R: NDArray[np.int64] | NDArray[np.bool_], shard_rows: int
) -> bytes:
    """The file of one shard of `source` or `masked`."""
    dtype, fill = ("<i8", -1) if array == "source" else ("u1", 0)
    padded = np.full(shard_rows, fill, dtype)
    padded[: len(values_R)] = values_R
    frame = PLAIN.encode(padded)
    return frame + crc32c(frame)


def write_vectors(root: Path, vectors: Mapping[str, NDArray[np.float64]]) -> None:
    """Write float64 vectors as one-chunk Zarr arrays, whole."""
    for name, vector in vectors.items():
        frame = vector.astype("<f8").tobytes()
        write_whole(root / name / "c" / "0", frame + crc32c(frame))
