"""A catalogue: the stores below a folder or a bucket prefix, found by their manifests.

There is no server and no database. A store is a folder with a manifest.json of ours, in whatever
folder below the place it is; a manifest is written last and whole, so that a store is listed as it
is or not at all. What the manifests said is kept in the cache folder (`catalogue_index.py`), so that
those that have not changed are not read again.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from .address import Address, Place, expanded, place
from .catalogue_folders import Folder, Folders, Found, folders_of
from .catalogue_index import Known, read_index, write_index
from .errors import StoreError
from .evalset import FORMAT as EVALUATION_SET
from .listing import StoreEntry, StoreFilter, facts_of
from .manifest import COMPLETE, FORMAT, HARVESTING, MANIFEST, checked_manifest, parse_json
from .remote import tell
from .shown import shown

CATALOG = "SAE_PIPE_CATALOG"  # environment variable
MAX_DEPTH = 6  # folders below the place
MAX_FOLDERS = 20_000
# A store of 10 billion rows needs about 40 MB; what is larger can still be opened.
LIMIT_BYTES = 1 << 26
_LOOKS = 10  # at an unfinished store that changes while it is looked at

Warn = Callable[[str], object]


def _tell(line: str) -> None:
    tell(shown(line))


def list_stores(
    where: str | Path | Address,
    wanted: StoreFilter | None = None,
    *,
    warn: Warn = _tell,
) -> list[StoreEntry]:
    """The stores of a catalogue, the newest first, from their manifests alone.

    where: a folder, or an address such as s3://bucket/stores; a store itself is a catalogue of one.
    wanted: which of them, all by default. warn: told in a line about each manifest that is damaged
    or of something else, and about what could not be looked at. Evaluation sets are left out.

    Every store that was complete before is there, whoever writes meanwhile. Raises InputError for a
    folder that is not there, StoreError and NetworkError for an address that cannot be listed.
    """
    catalogue = place(where, may_be_bucket=True)
    before = read_index(catalogue)
    with closing(folders_of(catalogue, warn)) as folders:
        search = _Search(folders, before, warn)
        search.run()
        write_index(catalogue, before, search.known, search.settled)
        entries = [search.entry(name) for name in sorted(search.known)]
    found = [e for e in entries if e is not None and (wanted is None or wanted.takes(e))]
    return sorted(found, key=lambda entry: entry.date or "", reverse=True)


def catalogue_place(given: str | None) -> Place | None:
    """The catalogue that a flag names, or else the environment; None where neither does."""
    name = os.environ.get(CATALOG) if given is None else given
    if not name:
        return None
    found = place(name, may_be_bucket=True)
    return found if isinstance(found, Address) else expanded(found)


class _Search:
    """known: what each manifest says, by the name of its folder; settled: see `Found`."""

    def __init__(self, folders: Folders, before: dict[str, Known], warn: Warn) -> None:
        self._folders, self._before, self._warn = folders, before, warn
        self._parsing = threading.Lock()  # one at a time: what is parsed takes many times its size
        self.known: dict[str, Known] = {}
        self.settled: set[str] = set()

    def run(self) -> None:
        """Look into every folder, level by level, but not into stores."""
        level, room = [""], MAX_FOLDERS
        for _ in range(MAX_DEPTH + 1):
            is_cut = len(level) > room
            if is_cut:
                self._warn(
                    f"There are more than {MAX_FOLDERS:,} folders below {self._folders.place}, and "
                    "not all were looked into. Pass one that has fewer."
                )
            looked = self._folders.look(level[:room])
            room -= len(level[:room])
            self._take(looked)
            level = [name for each in looked if not self._is_ours(each) for name in each.below]
            if not level or is_cut:
                return

    def _is_ours(self, folder: Folder) -> bool:
        return folder.name in self.known and self.known[folder.name].is_ours

    def _take(self, looked: Sequence[Folder]) -> None:
        """Note what the manifests of some folders say, reading those that have changed."""
        for found, known in self._folders.each(self._look_up, [f for f in looked if f.manifest]):
            if known is None:  # removed since it was seen
                continue
            self.known[found.name] = known
            if found.is_settled:
                self.settled.add(found.name)
            if known.warning is not None:
                self._warn(known.warning)

    def _look_up(self, folder: Folder) -> tuple[Found, Known | None]:
        found = folder.manifest
        assert found is not None
        known = self._before.get(found.name)
        if known is not None and known.stamp == found.stamp and found.is_settled:
            return found, known
        return self._read(found)

    def _read(self, found: Found) -> tuple[Found, Known | None]:
        where = self._folders.at(found.name)
        try:
            now, data = self._folders.read(found, LIMIT_BYTES)
            with self._parsing:
                return now, _said(where, now.stamp, data)
        except FileNotFoundError:
            return found, None
        except StoreError as error:
            return found, Known(stamp=found.stamp, warning=str(error))

    # --- entries ---

    def entry(self, name: str) -> StoreEntry | None:
        """The store in a folder; None where there is something else, or none any more."""
        facts = self.known[name].facts
        if facts is None:
            return None
        n_sealed = facts["n_shards"] if facts["state"] == COMPLETE else None
        where = self._folders.at(name)
        if facts["state"] != COMPLETE and isinstance(where, Path):
            seen = self._progress(name)
            if seen is None:
                return None
            facts, n_sealed = seen
        return StoreEntry(store=name or where.name, address=str(where), n_sealed=n_sealed, **facts)

    def _progress(self, name: str) -> tuple[dict[str, Any], int | None] | None:
        """What a manifest says, and how many shards are sealed, of one instant.

        When a store is finished its manifest is written before its commit records go: so these are
        counted first, and count if the manifest is still the same.
        """
        known: Known | None = self.known[name]
        for _ in range(_LOOKS):
            if known is None or known.facts is None:
                return None
            facts = known.facts
            if facts["state"] == COMPLETE:
                return facts, facts["n_shards"]
            n_sealed = self._folders.sealed(name) if facts["state"] == HARVESTING else None
            looked = self._folders.look([name])
            manifest = looked[0].manifest if looked else None
            if manifest is None:
                return None
            if manifest.stamp == known.stamp:
                return facts, n_sealed
            _, known = self._read(manifest)
        return facts, n_sealed


def _said(where: Place, stamp: str, data: bytes) -> Known:
    """What the bytes of a manifest say; StoreError when they are damaged."""
    file = f"{where}/{MANIFEST}"
    value = parse_json(data, file)
    kind = value.get("format") if isinstance(value, dict) else None
    if kind == EVALUATION_SET:
        return Known(stamp=stamp, is_ours=True)
    if kind != FORMAT:
        return Known(stamp=stamp, warning=f"{file} is not that of an activation store.")
    facts = facts_of(checked_manifest(value, where), where)
    return Known(stamp=stamp, facts=facts, is_ours=True)
