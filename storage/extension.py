"""A complete store that gets more training rows, in place.

The new shards, the tokens and everything else that changes are made in the folder `.extending` of
the store, which is a store of its own as far as a builder, a worker or a crash is concerned. Until
all of that is complete the store is untouched, and read as before. Then the files are put to their
places by renames: the manifest says `extending` first, so that nobody reads a mixture, and is itself
the last file to be replaced. Whatever interrupts that, `switch` goes on with it.
"""

import copy
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from . import provenance
from .before import manifests_before, not_kept
from .builder import (
    Measure,
    StoreBuilder,
    error_summary,
    layout_json,
    statistics_entry,
    vectors_of,
)
from .card import write_card
from .corpus import Corpus
from .errors import StoreError
from .extending_writer import ExtendingWriter
from .files import disk_error, fsync_folder
from .layout import Layout
from .manifest import (
    COMMITS,
    COMPLETE,
    EXTENDING,
    HARVESTING,
    MANIFEST,
    Manifest,
    content_digest,
    layout_of,
    read_manifest,
    read_manifest_of_any_state,
    write_manifest,
)
from .rows import SplitReader
from .signed import SIGNATURE
from .statistics import Distortion, Moments
from .store import ActivationStore
from .switched import STAGING
from .writer import SplitWriter, write_vectors

_ARRAYS = ("activations", "source", "masked")
# What stands in the folder of an extension and goes into the store; all of it is one or below one.
_PARTS = (*_ARRAYS, "heldout", "statistics", "corpus", "zarr.json")


class ExtensionBuilder(StoreBuilder):
    """Makes an extension in its folder, as a `StoreBuilder` makes a store.

    path: the folder `.extending`; its manifest is that of the store as it will be, with the shards
    that are there, and `extends`: digest and number of rows of the store as it is.
    """

    @classmethod
    def begin_extension(
        cls, store: ActivationStore, request: dict[str, Any], recipe: dict[str, Any], n_rows: int
    ) -> Self:
        """Write the manifest of an extension to n_rows, whose tokens are there already."""
        folder = staging_of(store.path)
        for entry in folder.iterdir():  # an extension that was completed may have left something
            if entry.name != "corpus":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        old = copy.deepcopy(store.manifest)
        layout = replace(layout_of(old["train"], store.path), n_rows=n_rows)
        manifest: Manifest = {
            **{name: value for name, value in old.items() if name not in ("shuffle", "digest")},
            "state": HARVESTING,
            "request": request,
            "recipe": recipe,
            "corpus": {"digest": Corpus(folder / "corpus").digest},
            "train": {"layout": layout_json(layout), "shards": old["train"]["shards"]},
            "extends": {"digest": store.digest, "rows": store.n_rows},
        }
        builder = cls(folder, manifest)
        builder._write_zarr_metadata(*builder.layouts())
        write_manifest(folder, manifest)
        return builder

    @property
    def root(self) -> Path:
        """The store that is extended."""
        return self.path.parent

    @property
    def n_kept(self) -> int:
        """Its rows, which stay."""
        return int(self.manifest["extends"]["rows"])

    @property
    def digest_before(self) -> str:
        """Of the store that is extended."""
        if self.state == COMPLETE:
            return str(self.manifest["provenance"]["extensions"][-1]["digest"])
        return str(self.manifest["extends"]["digest"])

    def progress(self) -> str:
        """How far it is, of an extension that is not complete."""
        layout = self.layouts()[0]
        n_new = layout.n_shards - self.n_kept // layout.shard_rows
        sealed = len(list((self.path / COMMITS / "train").glob("[0-9]*.json")))
        return f"{sealed:,} of {n_new:,} new shards are sealed"

    def kept_rows(self) -> SplitReader:
        """The training rows that stay, as they are."""
        layout = replace(self.layouts()[0], n_rows=self.n_kept)
        return SplitReader(self.root, "", layout, self.manifest["train"]["shards"], self.codec)

    def writers(self, pool: Executor) -> tuple[SplitWriter, SplitWriter]:
        """Writers of the training rows, and of the held-out ones, which are all there."""
        codec, (train, heldout) = self.codec, self.layouts()
        committed = set(range(heldout.n_shards))
        return (
            ExtendingWriter(self.path, train, codec, pool, kept=self.kept_rows()),
            SplitWriter(
                self.path, "heldout", heldout, codec, pool, with_masked=False, committed=committed
            ),
        )

    def finish(
        self, train: SplitWriter, heldout: SplitWriter, measure: Measure | None = None
    ) -> None:
        """Complete the extension, and put it to its place."""
        assert isinstance(train, ExtendingWriter)
        train.close()
        manifest, n_whole = self.manifest, self.n_kept // train.layout.shard_rows
        added = train.collect(n_whole)
        moments = self._moments_before()
        if added.distortion is not None:
            distortion = self._distortion_before(moments)
            distortion.merge(added.distortion)
            manifest["encoding"]["error"] = error_summary(distortion, self.codec)
        else:
            distortion = None
        moments.merge(added.moments)
        write_vectors(self.path, vectors_of(moments, distortion))
        before = read_manifest(self.root)
        extended = {
            **manifest["extends"],
            "statistics": manifest["statistics"],
            "recipe": before["recipe"],
            "corpus": before["corpus"]["digest"],
        }
        manifest["train"]["shards"] = [*manifest["train"]["shards"][:n_whole], *added.shards]
        manifest["statistics"] = statistics_entry(moments)
        manifest["files"] |= self.other_files()
        manifest["digest"] = content_digest(manifest)
        if measure is not None:
            manifest["shuffle"] = measure(StagedStore(self.path, manifest, n_whole))
        now = provenance.now()
        manifest["provenance"]["finished"] = now
        manifest["provenance"].setdefault("extensions", []).append(
            {**extended, "finished": now, "command": provenance.command_line()}
        )
        del manifest["extends"]
        manifest["state"] = COMPLETE
        write_manifest(self.path, manifest)
        switch(self.root)

    def _moments_before(self) -> Moments:
        """Of the rows that stay, from what is stored of them."""
        store = ActivationStore(self.root, read_manifest(self.root))
        return Moments(self.n_kept, store.mean.copy(), store.variance * self.n_kept)

    def _distortion_before(self, stored: Moments) -> Distortion:
        """What the codec did to the rows that stay.

        Their spread before encoding is not stored, only that of what came out of it, which is nearly
        the same: it is scaled so that the totals, which are, come out right.
        """
        store = ActivationStore(self.root, read_manifest(self.root))
        error, codec = store.manifest["encoding"]["error"], self.codec
        squares, spread = store.relative_error * stored.deviations, stored.deviations.copy()
        squares[~np.isfinite(squares)] = 0.0
        relative, of_typical = error["relative"], error["of_typical_variance"]
        if relative and of_typical and codec.typical_deviation and squares.sum() > 0:
            total = of_typical * codec.typical_deviation**2 * self.n_kept * len(squares)
            squares *= total / squares.sum()
            spread *= total / relative / spread.sum()
        given = Moments(self.n_kept, stored.mean.copy(), spread)
        return Distortion(squares, int(error["clipped_values"]), given)


class _StagedReader(SplitReader):
    """Training rows of which the first shards stand in the store and the others in the extension."""

    def __init__(self, folder: Path, n_whole: int, *args: Any) -> None:
        self._staging, self._n_whole = folder, n_whole
        super().__init__(folder.parent, *args)

    def shard_path(self, shard: int, array: str = "activations") -> Path:
        path = super().shard_path(shard, array)
        if shard < self._n_whole:
            return path
        return self._staging / path.relative_to(self._root)


class StagedStore(ActivationStore):
    """The store as it will be, before its files are at their places. n_whole: shards that stay."""

    def __init__(self, folder: Path, manifest: Manifest, n_whole: int) -> None:
        self._n_whole = n_whole
        super().__init__(folder, manifest)

    def _open_reader(self, folder: str, layout: Layout, shards: list[Any]) -> SplitReader:
        if folder:
            return SplitReader(self.path.parent, folder, layout, shards, self._codec)
        return _StagedReader(self.path, self._n_whole, folder, layout, shards, self._codec)


class StoreBefore(ActivationStore):
    """The rows that a store had before it was extended: the same rows, served in the same order."""

    def _check_manifest(self) -> None:
        """What it was made from was checked when the store was opened."""

    def _vector(self, name: str) -> NDArray[np.float64]:
        raise not_kept(self.path / name, self.n_rows)


def store_before(store: ActivationStore, digest: object) -> StoreBefore | None:
    """What a store was when it had this digest, if that was before an extension."""
    for before in manifests_before(store.manifest):
        if before["digest"] == digest:
            return StoreBefore(store.path, before)
    return None


def resume_any(path: Path) -> StoreBuilder:
    """The builder of what is being made in a folder: a store, or an extension of one."""
    builder = StoreBuilder.resume(path)
    return ExtensionBuilder(path, builder.manifest) if "extends" in builder.manifest else builder


def staging_of(path: Path) -> Path:
    """The folder in which a store's extension is made."""
    return path / STAGING


def remove_staging(path: Path) -> None:
    """Remove what an extension has left, or what one of another size has prepared."""
    shutil.rmtree(staging_of(path), ignore_errors=True)


def extension_begun(path: Path) -> ExtensionBuilder | None:
    """The extension of a store that was begun and is not at its place yet; its state may be complete.

    StoreError when the store is another one since.
    """
    folder = staging_of(path)
    if not (folder / MANIFEST).is_file():
        return None
    builder = ExtensionBuilder.resume(folder)
    there, before = read_manifest(path)["digest"], builder.digest_before
    if there != before:
        raise StoreError(
            f"Store {path} is another one than when its extension was begun: its digest is {there}, "
            f"and was {before}. Remove {folder} and extend it again."
        )
    return builder


def is_being_switched(path: Path) -> bool:
    """Whether a completed extension was interrupted while its files were put to their places."""
    return read_manifest_of_any_state(path).get("state") == EXTENDING


def switch(path: Path) -> None:
    """Put a completed extension to its place. The caller holds the store's lock.

    Can be interrupted at any instant and called again. Until the new manifest is there a reader is
    told that the store is being extended; one that has opened it before goes on with its rows, which
    stand where they stood.
    """
    folder = staging_of(path)
    if not (folder / MANIFEST).is_file():
        raise StoreError(
            f"Store {path} was interrupted while it was extended, and {folder}, where the rest of its "
            "new files was, has gone. Put that folder back, or harvest the store again."
        )
    manifest = read_manifest_of_any_state(path)
    if manifest["state"] != EXTENDING:
        write_manifest(path, manifest | {"state": EXTENDING})
    try:
        folders = set()
        for file in _finished_files(folder):
            target = path / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
            folders |= {target.parent, target.parent.parent}
        for each in sorted(folders):
            fsync_folder(each)
        write_card(path, read_manifest(folder))
        (path / SIGNATURE).unlink(missing_ok=True)  # it is of the manifest before
        os.replace(folder / MANIFEST, path / MANIFEST)
        fsync_folder(path)
    except OSError as error:
        raise disk_error(error, path) from error
    remove_staging(path)  # nothing reads what may be left of it


def _finished_files(folder: Path) -> Iterator[Path]:
    for name in _PARTS:
        part = folder / name
        if part.is_file():
            yield part
        yield from sorted(
            file for file in part.rglob("*") if file.is_file() and file.name != ".lock"
        )
