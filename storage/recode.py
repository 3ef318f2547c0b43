"""A store written again with another codec: the same rows in the same places, other bytes.

# R rows of a shard, D d_in

Shard by shard, each with a commit record, so that a kill costs one shard. Every file of the source
is compared with its SHA-256 before it is used, and every new shard is read back before it counts.
Where nothing was rounded on the way, the result is byte for byte what a harvest with that codec
writes, and a harvest with that codec finds it complete. What a lossy codec has taken stays taken:
the manifest of the copy then names both losses.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import provenance
from .address import Place, described
from .bar import OpenBar, no_bar
from .builder import StoreBuilder, is_begun
from .codecs import Codec, get_codec
from .disk import check_room, human_bytes, link_or_copy, link_tree
from .errors import InputError
from .files import is_leftover, plain_size, remove_leftovers
from .layout import Layout, default_chunk_rows
from .lock import sole_writer
from .manifest import COMPLETE, TOKENISING, read_manifest
from .recode_shards import SplitCopier, check_digest, rounded
from .store import ActivationStore, open_store
from .values import Floats

# Of a store to be, to which codecs are fitted. Contexts are permuted, so that their spread is that of
# the store within about a percent.
CALIBRATION_ROWS = 16_384
_SOURCE_BYTES = 10  # a row's source and mask flag, at most
_SPARE = 1.02  # the estimate comes from the first rows


def recode(
    source: Place,
    target: Path,
    codec: str,
    store_dtype: str | None = None,
    *,
    say: Callable[[str], object] = print,
    open_bar: OpenBar = no_bar,
) -> None:
    """Write the store `source` to `target` with another codec, or go on with it.

    store_dtype: number format of the copy, None for the source's. Raises InputError for a copy that
    would be pointless or in the way of something, StoreError when the source is damaged or a shard
    does not read back, DiskError before anything is written when the disk is too small.
    """
    if isinstance(source, Path) and source.resolve() == target.resolve():
        raise InputError(
            f"{source} cannot be recoded into itself. Pass another place for the copy; the store "
            "can be deleted once that is complete."
        )
    if isinstance(source, Path) and source.resolve() in target.resolve().parents:
        raise InputError(
            f"{target} would stand inside {source}, which is left alone. Pass another place for "
            "the copy."
        )
    store = open_store(source)
    job = _Recode(store, target, _wanted_codec(store, codec, store_dtype))
    if job.is_complete():
        open_store(target)  # a shard that has gone is found here
        say(f"{target} is complete: {store.n_rows:,} rows in {job.encoded_as}. Nothing to do.")
        return
    with sole_writer(target, "Store"):
        remove_leftovers(target, deep=is_begun(target))
        builder = job.begin(say)
        job.run(builder, open_bar)
    say(_about(open_store(target), store))


def _wanted_codec(store: ActivationStore, spelling: str, store_dtype: str | None) -> Codec:
    old = store._codec
    new = get_codec(spelling, store_dtype or old.values.name)
    if new.spelling == old.spelling and (new.is_lossy or new.values == old.values):
        raise InputError(
            f"Store {store.place} is already stored with codec {old.spelling} in {old.values.name}. "
            "Pass another --codec or --store-dtype."
        )
    return new


def _encoding(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"codec": manifest["codec"], **manifest["encoding"]}


@dataclass
class _Recode:
    """One store on its way to another codec; codec: of the copy, before calibration."""

    store: ActivationStore
    target: Path
    codec: Codec

    @property
    def encoded_as(self) -> str:
        return f"codec {self.codec.spelling}, {self.codec.values.name}"

    @cached_property
    def is_exact(self) -> bool:
        """Whether the copy has the rows that a harvest with its codec would have stored."""
        old, new = self.store._codec, self.codec.values.name
        recipe = self.store.recipe
        computed_in = recipe.get("dtype") or recipe.get("imported", {}).get("dtype")
        return not old.is_lossy and old.values.name in (new, "float32", computed_in)

    @property
    def _recipe(self) -> dict[str, Any]:
        recipe = self.store.recipe | self._changes
        return recipe if self.is_exact else recipe | {"recoded_from": self._old_name}

    @property
    def _changes(self) -> dict[str, Any]:
        return {"codec": self.codec.spelling, "store_dtype": self.codec.values.name}

    @property
    def _old_name(self) -> str:
        before = self.store.manifest["encoding"].get("before")
        old = self.store._codec
        name = f"{old.spelling} in {old.values.name}"
        return name if before is None else f"{self.store.recipe.get('recoded_from')}, then {name}"

    @property
    def _request(self) -> dict[str, Any] | None:
        """What a harvest compares its flags with; None for rows that no harvest has made."""
        asked: dict[str, Any] | None = self.store.manifest.get("request")
        if not asked:
            return None
        asked = asked | self._changes
        return asked if self.is_exact else asked | {"recoded_from": self._old_name}

    @property
    def _origin(self) -> dict[str, Any]:
        return {
            "recoded": {
                "store": Path(described(self.store.place)).name,
                "digest": self.store.digest,
                "encoding": _encoding(self.store.manifest),
            }
        }

    # --- what is there already ---

    def is_complete(self) -> bool:
        """Whether the copy stands already; InputError when something else does."""
        if not is_begun(self.target):
            if self.target.exists() and not is_free(self.target):
                raise InputError(
                    f"{self.target} exists and is not an activation store. Pass another place for "
                    "the copy, or move it away."
                )
            return False
        manifest = read_manifest(self.target)
        found = manifest.get("provenance", {}).get("recoded", {}).get("digest")
        if found != self.store.digest:
            raise InputError(
                f"{self.target} is not a copy of {self.store.place}: it is "
                + (f"one of the store with digest {found}. " if found else "another store. ")
                + "Pass another place for the copy, or move it away."
            )
        there = manifest.get("codec"), manifest.get("encoding", {}).get("dtype")
        if there != (self.codec.spelling, self.codec.values.name):
            raise InputError(
                f"{self.target} was begun with codec {there[0]} in {there[1]}. Pass the same "
                "--codec and --store-dtype to go on with it, or another place for the copy."
            )
        return bool(manifest["state"] == COMPLETE)

    # --- the run ---

    def begin(self, say: Callable[[str], object]) -> StoreBuilder:
        """The copy, begun and laid out."""
        builder = StoreBuilder.resume(self.target) if is_begun(self.target) else None
        if builder is None or builder.state == TOKENISING:
            sample_RD = self._sample()
            self._check_disk(sample_RD, say)
            if not self.is_exact:
                say(self._warning())
            if builder is None:
                builder = StoreBuilder.begin(
                    self.target,
                    None,
                    self._recipe,
                    self.codec.spelling,
                    self.codec.values.name,
                    self._origin,
                )
            self._add_tokens()
            if not self.is_exact:
                builder.manifest["encoding"]["before"] = _encoding(self.store.manifest)
            train, heldout = (
                _layout_for(reader.layout, self.codec)
                for reader in (self.store._train, self.store.heldout._reader)
            )
            builder.lay_out(
                train,
                heldout,
                self.store.manifest.get("execution", {}),
                sample_RD,
                has_corpus=self.store.has_corpus,
            )
        else:
            say(f"{self.target} goes on.")
        run = {"started": provenance.now(), "hardware": provenance.hardware(), "device": "cpu"}
        builder.record_run(run | {"versions": provenance.versions()})
        return builder

    def _warning(self) -> str:
        old = self.store._codec
        if old.is_lossy:
            error = self.store.manifest["encoding"].get("error", {}).get("relative")
            lost = (
                "an unknown relative error" if error is None else f"a relative error of {error:.3g}"
            )
            return (
                f"note      {self.store.place} has lost {lost} to codec {old.spelling}, which stays "
                "lost; the copy's own error comes on top"
            )
        return (
            f"note      values that were rounded to {old.values.name} are rounded again, to "
            f"{self.codec.values.name}"
        )

    def _sample(self) -> Floats:
        """The rows that a codec is fitted to, as the copy's number format has them: (R, D).

        The first ones in the order in which a harvest computes them, which its sources tell; of
        imported rows, whose sources are those of the input, the first ones stored.
        """
        reader = self.store._train
        n_rows = min(CALIBRATION_ROWS, reader.n_rows)
        rows = np.arange(n_rows)
        if self.store.has_corpus:
            blocks = -(-n_rows // reader.layout.block_rows)  # each is a run of those rows
            source_R = reader.read_source(slice(blocks * reader.layout.block_rows))
            rows = np.argsort(source_R, kind="stable")[:n_rows]
        values = self.codec.values
        given_RD = reader.read(rows)
        sample_RD = np.empty(given_RD.shape, np.float32)
        values.to_floats(rounded(given_RD, values, self.store.place, rows), sample_RD)
        return sample_RD

    def _check_disk(self, sample_RD: Floats, say: Callable[[str], object]) -> None:
        layout = _layout_for(self.store._train.layout, self.codec)
        some_RD = sample_RD[: layout.chunk_rows]
        codec = self.codec.calibrated(sample_RD)
        a_value = sum(map(len, codec.encode(some_RD))) / max(some_RD.size, 1)
        rows = self.store.n_rows + self.store.heldout.n_rows
        needed = int(rows * (self.store.d_in * a_value + _SOURCE_BYTES) * _SPARE)
        say(f"disk      about {human_bytes(needed)} for {rows:,} rows in {self.encoded_as}")
        check_room(self.target, needed)

    def _add_tokens(self) -> None:
        """The token corpus and tokenizer.json, checked and shared."""
        source, target = self.store.file("tokenizer.json"), self.target / "tokenizer.json"
        recorded = self.store.manifest.get("files", {})
        if source.is_file() and not target.is_file():
            entry = recorded.get("tokenizer.json")
            if entry is not None:
                plain_size(source.parent, source.name)
                check_digest(source, entry["sha256"], self.store.place)
                link_or_copy(source, target)
        if self.store.has_corpus and not (self.target / "corpus").is_dir():
            self.store.corpus.verify()
            link_tree(self.store.path / "corpus", self.target / "corpus")

    def run(self, builder: StoreBuilder, open_bar: OpenBar) -> None:
        """Write the shards that are missing, and declare the copy complete."""
        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="recode") as pool:
            writers = builder.writers(pool)
            readers = self.store._train, self.store.heldout._reader
            parts = [
                SplitCopier(reader, writer, self.store.place, pool)
                for reader, writer in zip(readers, writers, strict=True)
            ]
            total = sum(reader.n_rows for reader in readers)
            done = sum(part.rows_done() for part in parts)
            with open_bar(total, done) as bar:
                for part in parts:
                    part.run(bar)
            if self._request is not None:
                builder.manifest["request"] = self._request
            if (licence := self.store.manifest.get("licence")) is not None:
                builder.manifest["licence"] = licence
            if (measured := self.store.manifest.get("shuffle")) is not None:
                builder.finish(*writers, lambda _: measured)  # the order is the same
            else:
                builder.finish(*writers)


def is_free(path: Path) -> bool:
    """Whether a folder holds nothing but what a writer leaves that is killed before the manifest."""
    if not path.is_dir():
        return False
    return all(entry.name == ".lock" or is_leftover(entry.name) for entry in path.iterdir())


def _layout_for(layout: Layout, codec: Codec) -> Layout:
    """The same shards and blocks, with the chunks that the codec asks for, where they divide them."""
    wanted = codec.chunk_rows(layout.d_in) or default_chunk_rows(layout.d_in)
    fitting = math.gcd(wanted, layout.shard_rows)
    if fitting < min(wanted, layout.shard_rows):  # odd sizes of shards: the source's divide them
        fitting = max(fitting, layout.chunk_rows)
    return replace(layout, chunk_rows=fitting)


def _about(copy: ActivationStore, source: ActivationStore) -> str:
    """One line: what stands there now, and what was lost."""
    sizes = [_stored_bytes(store) for store in (copy, source)]
    line = (
        f"{copy.path} is complete: {copy.n_rows:,} training and {copy.heldout.n_rows:,} held-out "
        f"rows, {human_bytes(sizes[0])} of activations instead of {human_bytes(sizes[1])}"
    )
    encoding = copy.manifest["encoding"]
    losses = [
        f"{each['error']['relative']:.3g} {when}"
        for each, when in ((encoding.get("before", {}), "before"), (encoding, "now"))
        if each.get("error", {}).get("relative") is not None
    ]
    return line + (f"; relative error {', '.join(losses)}." if losses else ".")


def _stored_bytes(store: ActivationStore) -> int:
    splits = (store.manifest["train"], store.manifest["heldout"])
    return sum(s["files"]["activations"]["bytes"] for split in splits for s in split["shards"])
