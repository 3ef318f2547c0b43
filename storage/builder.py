"""The life of a store that is being written: begun, laid out, filled, finished.

Every step leaves a folder that the next run of the same command can go on with.
"""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from . import provenance, zarr_metadata
from .card import write_card
from .codecs import Codec, codec_of, get_codec
from .corpus import CORPUS_JSON, Corpus
from .files import file_digest
from .layout import Layout
from .manifest import (
    COMMITS,
    COMPLETE,
    FORMAT,
    FORMAT_VERSION,
    HARVESTING,
    MANIFEST,
    TOKENISING,
    Manifest,
    content_digest,
    layout_of,
    parse_json,
    read_manifest,
    write_manifest,
)
from .statistics import Distortion, Moments
from .store import ActivationStore
from .values import Floats
from .writer import SplitWriter, write_vectors

Vector = NDArray[np.float64]
Measure = Callable[[ActivationStore], dict[str, Any]]


class StoreBuilder:
    """Writes one store. The caller holds the folder's lock (`storage.lock.sole_writer`)."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def begin(
        cls,
        path: Path,
        request: dict[str, Any] | None,
        recipe: dict[str, Any],
        codec: str,
        store_dtype: str = "bfloat16",
        origin: dict[str, Any] | None = None,
    ) -> Self:
        """Write the manifest of a new store: the recipe stands before the first row.

        request: what the user asked a harvest for, compared when the command is run again, None
        where the rows come from elsewhere; recipe: the same with everything resolved (revisions,
        token ids), the part that is hashed; origin: for `provenance`, where the rows come from.
        """
        path.mkdir(parents=True, exist_ok=True)
        encoder, owner = get_codec(codec, store_dtype), provenance.owner()
        manifest: Manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "state": TOKENISING,
            **({} if request is None else {"request": request}),
            "recipe": recipe,
            "codec": encoder.spelling,
            "encoding": {
                "dtype": encoder.values.name,
                "rounding": encoder.values.rounding,
                "container": encoder.container,
            },
            "provenance": {
                "command": provenance.command_line(),
                **({} if owner is None else {"owner": owner}),
                "versions": provenance.versions(),
                "runs": [],
                **(origin or {}),
            },
        }
        write_manifest(path, manifest)
        return cls(path, manifest)

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Go on with a store that was begun; StoreError when its manifest is damaged."""
        return cls(path, read_manifest(path))

    @property
    def state(self) -> str:
        return str(self.manifest["state"])

    @property
    def uncalibrated_codec(self) -> Codec:
        """The codec as it was asked for."""
        return get_codec(self.manifest["codec"], self.manifest["encoding"]["dtype"])

    @property
    def codec(self) -> Codec:
        """The codec that the rows are stored with; there once the store is laid out."""
        return codec_of(self.manifest)

    def lay_out(
        self,
        train: Layout,
        heldout: Layout,
        execution: dict[str, Any],
        sample_RD: Floats | None = None,
        *,
        has_corpus: bool = True,
    ) -> None:
        """Fix the sizes and how the rows are computed and stored, once the corpus is there.

        sample_RD: rows that a codec with parameters is fitted to; the others do without.
        has_corpus: False for rows whose tokens are not known.
        """
        codec = self.uncalibrated_codec
        if codec.is_lossy:
            assert sample_RD is not None
            self.manifest["encoding"]["parameters"] = codec.calibrated(sample_RD).parameters
        corpus = Corpus(self.path / "corpus").digest if has_corpus else None
        self.manifest |= {
            "state": HARVESTING,
            "execution": execution,
            "corpus": {"digest": corpus},
            "train": {"layout": layout_json(train), "shards": []},
            "heldout": {"layout": layout_json(heldout), "shards": []},
        }
        self._write_zarr_metadata(train, heldout)
        write_manifest(self.path, self.manifest)

    def _write_zarr_metadata(self, train: Layout, heldout: Layout) -> None:
        members, corpus = self.zarr_members(train, heldout)
        zarr_metadata.write_metadata(self.path, members, already_there=corpus)

    def zarr_members(
        self, train: Layout, heldout: Layout
    ) -> tuple[dict[str, zarr_metadata.Metadata], dict[str, zarr_metadata.Metadata]]:
        """zarr.json of what stands below the root, by path; and of what the corpus brings along."""
        codec = self.codec
        group = zarr_metadata.group
        members = {
            "activations": zarr_metadata.activations_array(train, codec),
            "source": zarr_metadata.source_array(train),
            "masked": zarr_metadata.masked_array(train),
            "heldout": group(),
            "heldout/activations": zarr_metadata.activations_array(heldout, codec),
            "heldout/source": zarr_metadata.source_array(heldout),
            "statistics": group(),
            "statistics/mean": zarr_metadata.vector_array(train.d_in),
            "statistics/variance": zarr_metadata.vector_array(train.d_in),
        }
        if codec.is_lossy:
            members["statistics/relative_error"] = zarr_metadata.vector_array(train.d_in)
        corpus = {
            str(file.parent.relative_to(self.path)): parse_json(file.read_bytes(), str(file))
            for file in sorted((self.path / "corpus").rglob("zarr.json"))
        }
        return members, corpus

    def layouts(self) -> tuple[Layout, Layout]:
        """Layouts of the training and the held-out rows."""
        train = layout_of(self.manifest["train"], self.path)
        return train, layout_of(self.manifest["heldout"], self.path)

    def writers(self, pool: Executor) -> tuple[SplitWriter, SplitWriter]:
        """Writers of the training and the held-out rows."""
        codec, (train, heldout) = self.codec, self.layouts()
        return (
            SplitWriter(self.path, "", train, codec, pool, with_masked=True),
            SplitWriter(self.path, "heldout", heldout, codec, pool, with_masked=False),
        )

    def record_run(self, run: dict[str, Any]) -> None:
        """Note one run of the harvest: host, device, time."""
        self.manifest["provenance"]["runs"].append(run)
        write_manifest(self.path, self.manifest)

    def other_files(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of what is neither a shard nor listed by corpus.json."""
        files = [*self.path.glob("*.json"), *self.path.glob("statistics/*/c/0")]
        files += [
            file
            for file in self.path.rglob("zarr.json")
            if file.relative_to(self.path).parts[0] != "corpus"
        ]
        if self.manifest["corpus"]["digest"] is not None:
            files.append(self.path / "corpus" / CORPUS_JSON)
        named = {file.relative_to(self.path).as_posix(): file for file in files}
        named.pop(MANIFEST, None)  # a part of a store has none yet
        return {name: _entry(file) for name, file in sorted(named.items())}

    def finish(
        self, train: SplitWriter, heldout: SplitWriter, measure: Measure | None = None
    ) -> None:
        """Fold the commit records into the manifest, write the statistics, declare it complete.

        measure: gives the manifest's `shuffle` from the store as it will be; in the same write, so
        that a kill leaves either no complete store or one with its numbers.
        """
        collected = train.collect()
        moments = collected.moments
        if collected.distortion is not None:
            self.manifest["encoding"]["error"] = error_summary(collected.distortion, self.codec)
        write_vectors(self.path, vectors_of(moments, collected.distortion))
        self.manifest["train"]["shards"] = collected.shards
        self.manifest["heldout"]["shards"] = heldout.collect().shards
        self.manifest["statistics"] = statistics_entry(moments)
        self.manifest["files"] = self.other_files()
        self.manifest["digest"] = content_digest(self.manifest)
        self.manifest["provenance"]["finished"] = provenance.now()
        if measure is not None:
            self.manifest["shuffle"] = measure(ActivationStore(self.path, self.manifest))
        self.manifest["state"] = COMPLETE
        write_card(self.path, self.manifest)
        write_manifest(self.path, self.manifest)
        # What nothing reads may stay: a worker that was given up for dead can add to it just now.
        shutil.rmtree(self.path / COMMITS, ignore_errors=True)


def vectors_of(moments: Moments, distortion: Distortion | None) -> dict[str, Vector]:
    """The arrays of `statistics`, by name."""
    vectors: dict[str, Vector] = {
        "statistics/mean": moments.mean,
        "statistics/variance": moments.variance,
    }
    if distortion is not None:
        vectors["statistics/relative_error"] = distortion.relative_error_per_dimension
    return vectors


def statistics_entry(moments: Moments) -> dict[str, Any]:
    """What the manifest says of the training rows."""
    return {
        "rows": moments.count,
        "mean_squared_norm": moments.mean_squared_norm,
        "norm_of_mean": float((moments.mean**2).sum() ** 0.5),
        "total_variance": float(moments.variance.sum()),
    }


def error_summary(distortion: Distortion, codec: Codec) -> dict[str, Any]:
    """What the manifest says of a lossy codec's error; null for what is not a finite number."""
    values = distortion.given.count * len(distortion.squares)
    mean_square = float(distortion.squares.sum()) / max(values, 1)
    typical = codec.typical_deviation or math.nan
    per_dimension = distortion.relative_error_per_dimension
    numbers = {
        "relative": distortion.relative_error,
        "of_typical_variance": mean_square / typical**2,
        "per_dimension_median": float(np.median(per_dimension)),
        "per_dimension_max": float(per_dimension.max()),
    }
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {**finite, "clipped_values": distortion.clipped}


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def layout_json(layout: Layout) -> dict[str, int]:
    """A layout as the manifest has it."""
    return {
        "n_rows": layout.n_rows,
        "d_in": layout.d_in,
        "chunk_rows": layout.chunk_rows,
        "shard_rows": layout.shard_rows,
        "block_rows": layout.block_rows,
    }


def is_begun(path: Path) -> bool:
    """Whether a store stands, or was begun, at this path."""
    return (path / MANIFEST).is_file()
