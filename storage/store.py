"""An activation store on disk, opened for reading."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import get_codec
from .codecs.base import Floats
from .corpus import Corpus
from .errors import StoreError
from .loader import BatchLoader
from .manifest import COMPLETE, Manifest, layout_of, read_manifest
from .rows import RowIndex, SplitReader
from .shard import CRC_BYTES, checked_frame


class HeldOut:
    """The unmasked rows of documents that no training row comes from, in text order."""

    def __init__(self, reader: SplitReader) -> None:
        self._reader = reader
        self.n_rows, self.d_in = reader.n_rows, reader.d_in

    def read(self, start: int, stop: int) -> Floats:
        """Rows start to stop, float32 (stop - start, d_in)."""
        return self._reader.read(slice(start, stop))

    def source(self, start: int, stop: int) -> NDArray[np.int64]:
        """context * context_size + position in the corpus's held-out table, int64."""
        return self._reader.read_source(slice(start, stop))


def _check_record(record: Any, arrays: set[str]) -> None:
    """ValueError or TypeError unless a shard's record has the form that readers rely on."""
    files = record["files"]
    if set(files) != arrays:
        raise ValueError(f"a shard has the arrays {', '.join(sorted(files))}")
    for entry in files.values():
        if type(entry["bytes"]) is not int or entry["bytes"] < 1:
            raise ValueError(f"a shard has {entry['bytes']!r} bytes")
        if not isinstance(entry["sha256"], str):
            raise TypeError("a shard has no SHA-256")


class ActivationStore:
    """A complete store. Open one with `open_store`.

    n_rows: training rows; d_in: values a row; manifest: the parsed manifest.json; digest: identity
    of the content; heldout: the held-out split; name: the folder's name without its suffix.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.name = path.name.removesuffix(".zarr") or "store"
        try:
            self._codec = get_codec(manifest["codec"])
            self._train = self._reader("train", "")
            self.heldout = HeldOut(self._reader("heldout", "heldout"))
            self.digest = str(manifest["digest"])
            self.recipe: dict[str, Any] = manifest["recipe"]
            self.mean_squared_norm = float(manifest["statistics"]["mean_squared_norm"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"The manifest of {path} is damaged or names what this sae-pipe does not know "
                f"({error}). Fetch or harvest the store again."
            ) from error
        self.n_rows, self.d_in = self._train.n_rows, self._train.d_in

    def _reader(self, split: str, folder: str) -> SplitReader:
        entry = self.manifest[split]
        layout = layout_of(entry, self.path)
        arrays = {"activations", "source"} | ({"masked"} if split == "train" else set())
        for shard in entry["shards"]:
            _check_record(shard, arrays)
        reader = SplitReader(self.path, folder, layout, entry["shards"], self._codec)
        if len(entry["shards"]) != layout.n_shards:
            raise StoreError(
                f"The manifest of {self.path} lists {len(entry['shards'])} {split} shards, and its "
                f"sizes ask for {layout.n_shards}. Fetch or harvest the store again."
            )
        reader.check_files()
        return reader

    def read(self, rows: RowIndex) -> Floats:
        """Training rows as float32 (len(rows), d_in), in the order asked for.

        rows: a slice, whole numbers in [0, n_rows), or n_rows booleans. Raises InputError for rows that are not
        there and StoreError, naming the shard, for damaged data.
        """
        return self._train.read(rows)

    def source(self, rows: RowIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Context and position of training rows, each int64 (len(rows),)."""
        context, position = np.divmod(self._train.read_source(rows), self.corpus.train.context_size)
        return context, position

    def masked(self, rows: RowIndex) -> NDArray[np.bool_]:
        """Whether the token of each training row was replaced by the mask token."""
        return self._train.read_masked(rows)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        threads: int | None = None,
        window_rows: int = 0,
    ) -> BatchLoader:
        """Shuffled batches without end, as bfloat16 bits (uint16) for speed.

        `sae_pipe.stages.batches.TorchBatches` gives them as float32 tensors. The order is a pure
        function of the store and the seed; `start` is the batch to begin with.
        """
        return BatchLoader(
            self._train,
            batch_size=batch_size,
            seed=seed,
            start=start,
            threads=threads,
            window_rows=window_rows,
        )

    @cached_property
    def corpus(self) -> Corpus:
        """The tokens that the rows come from."""
        return Corpus(self.path / "corpus")

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the training rows, float64 (d_in,)."""
        return self._vector("statistics/mean")

    @cached_property
    def variance(self) -> NDArray[np.float64]:
        """Population variance of the training rows, float64 (d_in,)."""
        return self._vector("statistics/variance")

    def _vector(self, name: str) -> NDArray[np.float64]:
        file = self.path / name / "c" / "0"
        try:
            if file.stat().st_size != 8 * self.d_in + CRC_BYTES:
                raise ValueError("its size is wrong")
            frame = checked_frame(memoryview(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{file} is damaged ({error}). Fetch that file again, or harvest the store again."
            ) from error
        return np.frombuffer(frame, dtype="<f8").astype(np.float64)

    def files(self) -> list[tuple[Path, str]]:
        """Every file with its recorded SHA-256, but for those that the corpus verifies itself."""
        readers = (self._train, self.heldout._reader)
        shards = [(path, digest) for reader in readers for _, path, digest in reader.files()]
        others = [
            (self.path / name, str(entry["sha256"]))
            for name, entry in self.manifest.get("files", {}).items()
        ]
        return [*others, *shards]

    def close(self) -> None:
        """Close the files that reading has opened."""
        self._train.close()
        self.heldout._reader.close()


def open_store(path: str | Path) -> ActivationStore:
    """Open a complete activation store for reading.

    Raises StoreError: there is no store, it is unfinished, a shard is missing or of another size,
    or its format is newer than this package.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.get("state") != COMPLETE:
        raise StoreError(
            f"Store {path} is not finished: its state is {manifest.get('state')!r}. "
            "Run the `sae-pipe harvest` command that began it once more; it goes on where it stopped."
        )
    return ActivationStore(path, manifest)
