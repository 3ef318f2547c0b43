"""Reading a store that is still being written: the part that is there, or all of it as it comes.

`open_prefix` takes the shards that are sealed now, up to the first that is not, as a smaller store.
`follow_store` takes the whole store as its sizes say it will be, and waits for each shard that is
not sealed yet. What either serves depends on the recipe and not on when it was opened: the digest
of a prefix is that of its shards' records, and that of a followed store leaves the shards out. Both
are of the store as it was harvested, even if it has been extended since (`before.py`).
"""

import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .before import manifests_before, not_kept
from .errors import InputError, StoreError
from .lock import has_writer
from .manifest import (
    COMMITS,
    COMPLETE,
    EXTENDING,
    HARVESTING,
    TOKENISING,
    Manifest,
    began_by,
    content_digest,
    layout_of,
    read_commit,
    read_manifest,
    read_manifest_of_any_state,
)
from .rows import SplitReader
from .statistics import Moments
from .store import ActivationStore, check_record

POLL_S = 0.5
_FIRST_WORD_S = 2.0  # a wait shorter than this is not spoken of
_NEXT_WORD_S = 60.0
_ARRAYS = {"train": {"activations", "source", "masked"}, "heldout": {"activations", "source"}}

Record = dict[str, Any]
Say = Callable[[str], object]


class WaitEnded(Exception):
    """A wait for a shard was ended by whoever waits for it; not an error of the user's."""


class _Unfinished(ActivationStore):
    """What both kinds have in common."""

    @cached_property
    def mean_squared_norm(self) -> float:
        """Mean of ||x||^2 over the rows of the first shard.

        Not over all rows that are there: it decides the norm factor of a fit, which must be the
        same whenever it is asked for. Rows are a fair sample in every shard.
        """
        layout = self._train.layout
        first, last = layout.rows_of_shard(0)
        moments = Moments.empty(layout.d_in)
        for start in range(first, last, layout.chunk_rows):
            rows = self._train.read(slice(start, min(start + layout.chunk_rows, last)))
            moments.merge(Moments.of(rows))
        return moments.mean_squared_norm

    def _identify(self) -> str:
        return content_digest(self.manifest)

    def _check_manifest(self) -> None:
        """Its digest and statistics come with its end."""

    def _vector(self, name: str) -> NDArray[np.float64]:
        if not (self.path / name / "c" / "0").is_file():
            raise StoreError(
                f"Store {self.path} is unfinished: the statistics of its rows are written when it "
                "is complete. Open it again then."
            )
        return super()._vector(name)


# --- a prefix ---


class PrefixStore(_Unfinished):
    """The first rows of a store, as a store of its own. n_shards: of the whole store."""

    def __init__(self, path: Path, manifest: Manifest, n_shards: int) -> None:
        super().__init__(path, manifest)
        self.n_shards = n_shards

    @property
    def pin(self) -> dict[str, Any]:
        return {"prefix_rows": self.n_rows, "prefix_heldout_rows": self.heldout.n_rows}

    def describe(self) -> str:
        """What of the store this is: its first 196,608 rows, 12 of 40 shards."""
        return (
            f"its first {self.n_rows:,} rows, {self._train.layout.n_shards:,} of "
            f"{self.n_shards:,} shards"
        )


def open_prefix(
    path: Path, rows: int | None = None, heldout_rows: int | None = None
) -> PrefixStore:
    """The sealed shards up to the first that is not, of an unfinished or a complete store.

    rows, heldout_rows: take just so many, as an earlier `pin` says, which was of a store that had
    not been extended yet. Raises StoreError when no training row, or not so many rows, are there.
    """
    manifest, records = _sealed(path)
    asked = {"train": rows, "heldout": heldout_rows}
    derived = dict(manifest)
    if rows is not None and (before := manifests_before(manifest)):
        derived |= {name: before[0][name] for name in ("recipe", "corpus")}
    n_shards = layout_of(manifest["train"], path).n_shards
    for split, n_asked in asked.items():
        layout = layout_of(manifest[split], path)
        there = min(len(records[split]) * layout.shard_rows, layout.n_rows)
        n_rows = there if n_asked is None else n_asked
        if n_rows > there:
            raise StoreError(
                f"Store {path} has {there:,} {split} rows that are sealed, and {n_rows:,} were "
                "there before. It was begun anew: pass another --out to fit from it."
            )
        shards = records[split][: -(-n_rows // layout.shard_rows)]
        if n_rows % layout.shard_rows and shards[-1]["rows"] != n_rows % layout.shard_rows:
            raise StoreError(
                f"Store {path} had {n_rows:,} {split} rows before it was extended, and its shard "
                f"{len(shards) - 1} holds more by now. Pass another --out to fit from the store as it "
                "is."
            )
        derived[split] = {
            "layout": {**manifest[split]["layout"], "n_rows": n_rows},
            "shards": shards,
        }
    if derived["train"]["layout"]["n_rows"] == 0:
        raise StoreError(
            f"Store {path} has no sealed shard yet. Wait for the first one, or pass --follow to "
            "`sae-pipe fit`."
        )
    return PrefixStore(path, derived, n_shards)


def _sealed(path: Path) -> tuple[Manifest, dict[str, list[Record]]]:
    """The manifest and, by split, the records of the shards up to the first without one."""
    while True:
        manifest = read_manifest(path)
        if manifest.get("state") == COMPLETE:
            return manifest, {split: list(manifest[split]["shards"]) for split in _ARRAYS}
        if manifest.get("state") == TOKENISING:
            raise StoreError(
                f"Store {path} has no rows yet: its tokens are being made. Wait for its first "
                "shard, or pass --follow to `sae-pipe fit`."
            )
        records: dict[str, list[Record]] = {}
        for split in _ARRAYS:
            found: list[Record] = []
            while (record := read_commit(_commit(path, split, len(found)))) is not None:
                found.append(record)
            records[split] = found
        # Commit records are removed when the store is complete: what was read may lack some.
        if read_manifest(path).get("state") != COMPLETE:
            return manifest, records


def _commit(path: Path, split: str, shard: int) -> Path:
    return path / COMMITS / split / f"{shard:08d}.json"


# --- all of it, as it comes ---


class _Feed:
    """The records of a store's shards, waited for where they are not there yet."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self.is_asked_to_end: Callable[[], bool] = lambda: False
        self.say: Say = lambda line: None
        self._complete: Manifest | None = None
        self._lock = threading.Lock()
        self._spoken_at = 0.0

    def wait_for(self, split: str, shard: int, stopped: threading.Event) -> Record:
        """The record of a shard; WaitEnded when the wait is ended before it is there."""
        begun = time.monotonic()
        while (record := self._look(split, shard)) is None:
            if self.is_asked_to_end() or stopped.is_set():
                raise WaitEnded
            if time.monotonic() - begun > _FIRST_WORD_S:
                self._speak(split, shard)
            stopped.wait(POLL_S)
        return record

    def look_again(self, split: str, shard: int, stopped: threading.Event) -> Record | None:
        """The record of a shard whose files are not those that `wait_for` has given the record of:
        another one if the store was extended meanwhile. Waits while files are put to their places.
        """
        while True:
            with self._lock:
                manifest = read_manifest_of_any_state(self._path)
                if manifest.get("state") != EXTENDING:
                    manifest = self._as_followed(manifest)
                    if manifest["state"] != COMPLETE:
                        return None
                    self._complete = manifest
                    found: Record = manifest[split]["shards"][shard]
                    return found
            if self.is_asked_to_end() or stopped.is_set():
                raise WaitEnded
            self._speak(split, shard)
            stopped.wait(POLL_S)

    def _look(self, split: str, shard: int) -> Record | None:
        with self._lock:
            if self._complete is None:
                record = read_commit(_commit(self._path, split, shard))
                if record is not None:
                    return record
                # Not sealed yet, or all records are in the manifest now.
                manifest = read_manifest_of_any_state(self._path)
                if manifest.get("state") == EXTENDING:
                    return None
                manifest = self._as_followed(manifest)
                if manifest["state"] == COMPLETE:
                    self._complete = manifest
            if self._complete is None:
                return None
            found: Record = self._complete[split]["shards"][shard]
            return found

    def _as_followed(self, manifest: Manifest) -> Manifest:
        """A manifest, or of a store that was extended that of before, if it is of what is followed;
        StoreError otherwise.
        """
        found = _with_identity(manifest, self._identity)
        if manifest.get("state") in (HARVESTING, COMPLETE) and found is not None:
            return found
        raise StoreError(
            f"Store {self._path} was begun anew with another recipe while it was followed. "
            "Pass another --out to fit from it."
        )

    def is_followed(self, manifest: Manifest) -> bool:
        """Whether a manifest is of the store that is followed, perhaps extended."""
        return _with_identity(manifest, self._identity) is not None

    def _speak(self, split: str, shard: int) -> None:
        with self._lock:
            if time.monotonic() - self._spoken_at < _NEXT_WORD_S and self._spoken_at:
                return
            self._spoken_at = time.monotonic()
        what = "training" if split == "train" else "held-out"
        self.say(f"Waiting for {what} shard {shard} of {self._path}. {writer_of(self._path)}")


def writer_of(path: Path) -> str:
    """A sentence: whether somebody is writing a store."""
    if has_writer(path) is False:
        manifest = read_manifest_of_any_state(path)
        if manifest.get("state") == EXTENDING:
            return (
                "An extension of it was interrupted: run the `sae-pipe harvest --extend` command once "
                "more."
            )
        return (
            f"No process is writing it: run the `sae-pipe {began_by(manifest)}` command that began it "
            "once more."
        )
    return "It is being written."


class _FollowingReader(SplitReader):
    """Rows of one split, each shard as soon as it is sealed."""

    def __init__(self, feed: _Feed, *args: Any) -> None:
        super().__init__(*args)
        self._feed, self._stopped = feed, threading.Event()
        self._known: dict[int, Record] = {}

    def stop_waiting(self) -> None:
        self._stopped.set()

    def _index(self, shard: int) -> NDArray[np.uint64]:
        self._await(shard)
        return super()._index(shard)

    def _plain_shard(self, array: str, shard: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        self._await(shard)
        return super()._plain_shard(array, shard, dtype)

    def _record(self, shard: int) -> Record | None:
        return self._known.get(shard)

    def _is_same_store(self, manifest: Manifest, shard: int) -> bool:
        return self._feed.is_followed(manifest)

    def _take_record(self, shard: int, record: Record) -> None:
        self._known[shard] = record

    def _await(self, shard: int) -> None:
        if shard in self._known:
            return
        record = self._feed.wait_for(self._split, shard, self._stopped)
        try:
            self._check(shard, record)
        except StoreError:
            again = self._feed.look_again(self._split, shard, self._stopped)
            if again is None or again == record:
                raise
            record = again
            self._check(shard, record)
        self._known.setdefault(shard, record)

    def _check(self, shard: int, record: Record) -> None:
        try:
            check_record(record, _ARRAYS[self._split], self.layout, shard)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(shard, ValueError(f"its record cannot be ({error})")) from error
        self.check_shard(shard, record)


class FollowedStore(_Unfinished):
    """A store as it will be when it is complete; reading waits for what is not there yet.

    Rows are served in stored order of the shards, groups of them mixed, so that the first ones can
    be served while the last are still to be written. Open one with `follow_store`.
    """

    _in_stored_order = True

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._feed = _Feed(path, _identity(manifest))
        super().__init__(path, manifest)

    def _identify(self) -> str:
        return _identity(self.manifest)

    def _vector(self, name: str) -> NDArray[np.float64]:
        if layout_of(read_manifest(self.path)["train"], self.path).n_rows != self.n_rows:
            raise not_kept(self.path / name, self.n_rows)
        return super()._vector(name)

    @property
    def pin(self) -> dict[str, Any]:
        return {"follow": True}

    def while_waiting(self, is_asked_to_end: Callable[[], bool], say: Say) -> None:
        self._feed.is_asked_to_end, self._feed.say = is_asked_to_end, say

    def _reader(self, split: str, folder: str) -> SplitReader:
        layout = layout_of(self.manifest[split], self.path)
        return _FollowingReader(self._feed, self.path, folder, layout, [], self._codec)

    def _reader_of_batches(self) -> SplitReader:
        return self._reader("train", "")  # its own: ending one loader's waits ends no other's


def _identity(manifest: Manifest) -> str:
    """Recipe, sizes and encoding: what decides every row, whether it is there yet or not."""
    splits = {name: {"layout": manifest[name]["layout"], "shards": []} for name in _ARRAYS}
    return content_digest({**manifest, **splits})


def _with_identity(manifest: Manifest, identity: object) -> Manifest | None:
    """A manifest, or that of before one of the extensions of a store, if it has this identity."""
    try:
        candidates = (manifest, *manifests_before(manifest))
        return next((each for each in candidates if _identity(each) == identity), None)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def follow_store(
    path: str | Path, say: Say = lambda line: None, *, begun: object = None
) -> FollowedStore:
    """Open a store that is being written, or a complete one, to read all of it as it comes.

    Waits until its sizes are known, which is when its tokens are made. say: told about waiting.
    begun: the digest of a followed store; of one that was extended since, the rows of that time.
    Raises StoreError when there is no store or it is damaged.
    """
    path, spoken = Path(path), False
    while (manifest := read_manifest(path)).get("state") == TOKENISING:
        if not spoken:
            say(f"Waiting for the tokens of {path}. {writer_of(path)}")
        spoken = True
        time.sleep(POLL_S)
    if manifest.get("state") not in (HARVESTING, COMPLETE):
        raise InputError(
            f"Store {path} cannot be followed: its state is {manifest.get('state')!r}."
        )
    try:
        store = FollowedStore(path, _with_identity(manifest, begun) or manifest)
        store.while_waiting(lambda: False, say)  # the first shard is read before there is a trainer
        return store
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"The manifest of {path} is damaged: it lacks what every store has, or has it in "
            f"another form ({error}). Fetch or harvest the store again."
        ) from error
