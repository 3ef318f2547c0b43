"""An activation store on disk, opened for reading."""

import hashlib
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .address import Address, Place, place
from .codecs import Codec, codec_of
from .corpus import MOST_POSITIONS, Corpus
from .errors import InputError, StoreError
from .files import is_sha256, plain_size
from .layout import Layout
from .loader import BatchLoader
from .manifest import (
    COMPLETE,
    HARVESTING,
    TOKENISING,
    Manifest,
    began_by,
    layout_of,
    read_manifest,
)
from .rows import RowIndex, SplitReader
from .shard import CRC_BYTES, checked_frame
from .values import Floats
from .verify import wrong_in_manifest, wrong_vector

_ERROR = "statistics/relative_error"  # infinite where an error meets no spread


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


def check_record(record: Any, arrays: set[str], layout: Layout, shard: int) -> None:
    """ValueError or TypeError unless a shard's record has the form that readers rely on.

    Its rows have to be those of the layout: what stands behind them in the last shard is padding,
    which would be read as rows.
    """
    first, last = layout.rows_of_shard(shard)
    if record["rows"] != last - first:
        raise ValueError(
            f"shard {shard} has {record['rows']!r} rows, and the sizes ask for {last - first}"
        )
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
    of the content; heldout: the held-out split; name: the folder's name without its suffix; path:
    where its files are, or come to be; place: what the user calls it, a path or an address.
    """

    _in_stored_order = False

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.name = store_name(self.place)
        try:
            self._codec = codec_of(manifest)
            self._train = self._reader("train", "")
            self.heldout = HeldOut(self._reader("heldout", "heldout"))
            self.recipe: dict[str, Any] = manifest["recipe"]
            self.digest = self._identify()
            self._check_manifest()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise StoreError(
                f"The manifest of {self.place} is damaged or names what this sae-pipe does not know "
                f"({error}). Fetch or harvest the store again."
            ) from error
        self.n_rows, self.d_in = self._train.n_rows, self._train.d_in

    @property
    def place(self) -> Place:
        return self.path

    def _identify(self) -> str:
        """The digest; KeyError, TypeError or ValueError for a manifest that cannot be."""
        norm = self.manifest["statistics"]["mean_squared_norm"]
        if type(norm) not in (int, float) or not 0 <= norm < math.inf:
            raise ValueError(f"a mean squared norm of {norm!r}")
        if not is_sha256(self.manifest["digest"]):
            raise ValueError("its digest is no SHA-256")
        return str(self.manifest["digest"])

    def _check_manifest(self) -> None:
        """ValueError for a manifest that is not the one that was written: what the digest covers,
        and by what it covers the codec and the statistics, by which a fit scales rows.
        """
        what = wrong_in_manifest(self.path, self.manifest)
        if what is not None:
            raise ValueError(what)
        wrong = wrong_vector(self.path, self.manifest)
        if wrong is not None:
            name, what = wrong
            raise StoreError(
                f"{self.path / name} is not the one that was written ({what}), so that nothing vouches "
                "for the statistics. If the store was extended or repaired just now, open it again; "
                f"else run `sae-pipe store repair {self.path}`: it makes damaged files again and "
                "touches nothing else."
            )

    @cached_property
    def mean_squared_norm(self) -> float:
        """Mean of ||x||^2 over the training rows; of an unfinished store, over its first shard."""
        return float(self.manifest["statistics"]["mean_squared_norm"])

    @property
    def pin(self) -> dict[str, Any]:
        """What a fit records to get the same rows again, beside the digest: of a complete store
        nothing.
        """
        return {}

    def while_waiting(
        self, is_asked_to_end: Callable[[], bool], say: Callable[[str], object]
    ) -> None:
        """Of a store that is followed: when to end a wait, and whom to tell about it."""

    def _reader(self, split: str, folder: str) -> SplitReader:
        entry = self.manifest[split]
        layout = layout_of(entry, self.place)
        arrays = {"activations", "source"} | ({"masked"} if split == "train" else set())
        for shard, record in enumerate(entry["shards"][: layout.n_shards]):
            check_record(record, arrays, layout, shard)
        reader = self._open_reader(folder, layout, entry["shards"])
        if len(entry["shards"]) != layout.n_shards:
            raise StoreError(
                f"The manifest of {self.place} lists {len(entry['shards'])} {split} shards, and its "
                f"sizes ask for {layout.n_shards}. Fetch or harvest the store again."
            )
        reader.check_files()
        return reader

    def _open_reader(self, folder: str, layout: Layout, shards: list[Any]) -> SplitReader:
        return SplitReader(self.path, folder, layout, shards, self._codec)

    def read(self, rows: RowIndex) -> Floats:
        """Training rows as float32 (len(rows), d_in), in the order asked for.

        rows: a slice, whole numbers in [0, n_rows), or n_rows booleans. Raises InputError for rows that are not
        there and StoreError, naming the shard, for damaged data.
        """
        return self._train.read(rows)

    def source(self, rows: RowIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Context and position of training rows, each int64 (len(rows),)."""
        context, position = np.divmod(self._train.read_source(rows), self.context_size)
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
        world_size: int = 1,
        rank: int = 0,
    ) -> BatchLoader:
        """Shuffled batches without end, in the memory type of the codec for speed.

        With the default codec that is bfloat16 bits as uint16; `BatchLoader.to_floats` widens a
        batch, and `sae_pipe.stages.batches.TorchBatches` gives float32 tensors. The order is a pure
        function of the store, the seed, the world size and the rank; `start` is the batch to begin
        with. The ranks together serve every row once an epoch.
        """
        return BatchLoader(
            self._reader_of_batches(),
            batch_size=batch_size,
            seed=seed,
            start=start,
            threads=threads,
            window_rows=window_rows,
            world_size=world_size,
            rank=rank,
            in_stored_order=self._in_stored_order,
        )

    @property
    def train_reader(self) -> SplitReader:
        """The training rows as they are stored, chunk by chunk."""
        return self._train

    @property
    def codec(self) -> Codec:
        """How the rows are stored."""
        return self._codec

    def _reader_of_batches(self) -> SplitReader:
        return self._train

    @property
    def has_corpus(self) -> bool:
        """Whether the tokens that the rows come from are there; imported rows are without."""
        entry = self.manifest.get("corpus")
        return not isinstance(entry, dict) or entry.get("digest") is not None

    @cached_property
    def corpus(self) -> Corpus:
        """The tokens that the rows come from; InputError where they are not known."""
        if not self.has_corpus:
            raise InputError(
                f"Store {self.place} was imported without its tokens, so they cannot be looked up. "
                "Harvest a store to see the text behind its rows."
            )
        return self._open_corpus()

    def _open_corpus(self) -> Corpus:
        return Corpus(self.path / "corpus")

    @property
    def context_size(self) -> int:
        """Positions of a context: what divides a source index into context and position."""
        try:
            size = self.recipe["corpus"]["config"]["context_size"]
        except (KeyError, TypeError):
            size = self.corpus.train.context_size
        if type(size) is not int or not 1 <= size <= MOST_POSITIONS:
            raise StoreError(
                f"The manifest of {self.place} is damaged: its contexts have {size!r} positions. "
                "Fetch or harvest the store again."
            )
        return size

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the training rows, float64 (d_in,)."""
        return self._vector("statistics/mean")

    @cached_property
    def variance(self) -> NDArray[np.float64]:
        """Population variance of the training rows, float64 (d_in,)."""
        return self._vector("statistics/variance")

    @cached_property
    def relative_error(self) -> NDArray[np.float64]:
        """Of each dimension, what a lossy codec has cost, float64 (d_in,); zeros for the others.

        sum (x - x_hat)^2 / sum (x - mean)^2 over the training rows.
        """
        if not self._codec.is_lossy:
            return np.zeros(self.d_in)
        return self._vector(_ERROR)

    def _vector(self, name: str) -> NDArray[np.float64]:
        file = self.file(f"{name}/c/0")
        try:
            if plain_size(self.path, f"{name}/c/0") != 8 * self.d_in + CRC_BYTES:
                raise ValueError("its size is wrong")
            data = file.read_bytes()
            frame = checked_frame(memoryview(data))
            vector_D = np.frombuffer(frame, dtype="<f8").astype(np.float64)
            if name != _ERROR and not np.isfinite(vector_D).all():
                raise ValueError("it holds numbers that are none")
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{file} is damaged ({error}). Run `sae-pipe store repair {self.path}`: it makes "
                "damaged files again and touches nothing else."
            ) from error
        recorded = self.manifest.get("files", {}).get(f"{name}/c/0", {}).get("sha256")
        if recorded is not None and hashlib.sha256(data).hexdigest() != recorded:
            raise StoreError(
                f"{file} is not the one that was there when {self.place} was opened: the store was "
                "extended or repaired since. Open it again."
            )
        return vector_D

    def file(self, name: str) -> Path:
        """A file of the store by its name below it, such as tokenizer.json; it need not be there."""
        return self.path / name

    def close(self) -> None:
        """Close the files that reading has opened."""
        self._train.close()
        self.heldout._reader.close()


def store_name(path: Place) -> str:
    """A folder's name, or the last part of an address, without its suffix."""
    return path.name.removesuffix(".zarr") or "store"


def open_store(path: str | Path | Address, *, unfinished: bool = False) -> ActivationStore:
    """Open a complete activation store for reading.

    path: a folder, or an address such as s3://bucket/acts.zarr (docs/sharing.md), whose shards are
    fetched when they are read.
    unfinished: of a store that is being written, open the shards that are sealed now, up to the
    first that is not. Blocks are uniform samples of the text, so that is a fair, smaller store.

    Raises StoreError: there is no store, it is unfinished, a shard is missing or of another size,
    or its format is newer than this package; NetworkError for an address that cannot be reached.
    """
    path = place(path)
    if isinstance(path, Address):
        from .remote_store import open_remote

        return open_remote(path)
    manifest = read_manifest(path)
    if manifest.get("state") == COMPLETE:
        return ActivationStore(path, manifest)
    if unfinished and manifest.get("state") in (HARVESTING, TOKENISING):
        from .unfinished import open_prefix

        return open_prefix(path)
    raise StoreError(
        f"Store {path} is not finished: its state is {manifest.get('state')!r}. "
        f"Run the `sae-pipe {began_by(manifest)}` command that began it once more; it goes on where "
        "it stopped."
    )
