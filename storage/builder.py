"""The life of a store that is being written: begun, laid out, filled, finished.

Every step leaves a folder that the next run of the same command can go on with.
"""

import json
import shutil
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Self

from . import provenance, zarr_metadata
from .codecs import get_codec
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
    read_manifest,
    write_manifest,
)
from .writer import SplitWriter, write_vectors


class StoreBuilder:
    """Writes one store. The caller holds the folder's lock (`storage.lock.sole_writer`)."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def begin(cls, path: Path, request: dict[str, Any], recipe: dict[str, Any], codec: str) -> Self:
        """Write the manifest of a new store: the recipe stands before the first row.

        request: what the user asked for, compared when the command is run again; recipe: the same
        with everything resolved (revisions, token ids), the part that is hashed.
        """
        path.mkdir(parents=True, exist_ok=True)
        manifest: Manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "state": TOKENISING,
            "request": request,
            "recipe": recipe,
            "codec": codec,
            "values": "bfloat16, round-to-nearest-even, in a float32 array",
            "provenance": {
                "command": provenance.command_line(),
                "versions": provenance.versions(),
                "runs": [],
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

    def lay_out(self, train: Layout, heldout: Layout, execution: dict[str, Any]) -> None:
        """Fix the sizes and how the rows are computed, once the corpus is there."""
        corpus = Corpus(self.path / "corpus")
        self.manifest |= {
            "state": HARVESTING,
            "execution": execution,
            "corpus": {"digest": corpus.digest},
            "train": {"layout": _as_json(train), "shards": []},
            "heldout": {"layout": _as_json(heldout), "shards": []},
        }
        self._write_zarr_metadata(train, heldout)
        write_manifest(self.path, self.manifest)

    def _write_zarr_metadata(self, train: Layout, heldout: Layout) -> None:
        codec = get_codec(self.manifest["codec"])
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
        corpus = {
            str(file.parent.relative_to(self.path)): json.loads(file.read_bytes())
            for file in sorted((self.path / "corpus").rglob("zarr.json"))
        }
        zarr_metadata.write_metadata(self.path, members, already_there=corpus)

    def layouts(self) -> tuple[Layout, Layout]:
        """Layouts of the training and the held-out rows."""
        train = layout_of(self.manifest["train"], self.path)
        return train, layout_of(self.manifest["heldout"], self.path)

    def writers(self, pool: Executor) -> tuple[SplitWriter, SplitWriter]:
        """Writers of the training and the held-out rows."""
        codec, (train, heldout) = get_codec(self.manifest["codec"]), self.layouts()
        return (
            SplitWriter(self.path, "", train, codec, pool, with_masked=True),
            SplitWriter(self.path, "heldout", heldout, codec, pool, with_masked=False),
        )

    def record_run(self, run: dict[str, Any]) -> None:
        """Note one run of the harvest: host, device, time."""
        self.manifest["provenance"]["runs"].append(run)
        write_manifest(self.path, self.manifest)

    def _other_files(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of what is neither a shard nor listed by corpus.json."""
        files = [*self.path.glob("*.json"), *self.path.glob("statistics/*/c/0")]
        files += [
            file
            for file in self.path.rglob("zarr.json")
            if file.relative_to(self.path).parts[0] != "corpus"
        ]
        files.append(self.path / "corpus" / CORPUS_JSON)
        named = {file.relative_to(self.path).as_posix(): file for file in files}
        named.pop(MANIFEST)
        return {name: _entry(file) for name, file in sorted(named.items())}

    def finish(self, train: SplitWriter, heldout: SplitWriter) -> None:
        """Fold the commit records into the manifest, write the statistics, declare it complete."""
        shards, moments = train.collect()
        heldout_shards, _ = heldout.collect()
        write_vectors(
            self.path,
            {"statistics/mean": moments.mean, "statistics/variance": moments.variance},
        )
        self.manifest["train"]["shards"] = shards
        self.manifest["heldout"]["shards"] = heldout_shards
        self.manifest["statistics"] = {
            "rows": moments.count,
            "mean_squared_norm": moments.mean_squared_norm,
            "norm_of_mean": float((moments.mean**2).sum() ** 0.5),
            "total_variance": float(moments.variance.sum()),
        }
        self.manifest["files"] = self._other_files()
        self.manifest["digest"] = content_digest(self.manifest)
        self.manifest["provenance"]["finished"] = provenance.now()
        self.manifest["state"] = COMPLETE
        write_manifest(self.path, self.manifest)
        shutil.rmtree(self.path / COMMITS)


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def _as_json(layout: Layout) -> dict[str, int]:
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
