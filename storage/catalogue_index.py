"""What the manifests of a catalogue said when they were last read: one file in the cache folder.

    CACHE/catalogues/KEY.json   {"version", "catalogue", "digest", "manifests": {name: {...}}}

Nothing depends on it. A manifest is read again unless its stamp is the one that it had then, and a
file that is damaged, of another version or of another catalogue counts as none. It is written whole,
by one rename, with what others have added since it was read; what two processes add at the same
instant, the first of them may lose, and then that is read again.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .address import Place, described
from .files import canonical_json, json_digest, write_whole
from .listing import FACTS, Facts
from .shard_cache import Cache

INDEX_VERSION = 1
_LIMIT_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True)
class Known:
    """What one manifest said.

    stamp: tells its states from one another (size, and times or an ETag); facts: of a store
    (`facts_of`); warning: a sentence where it is damaged or of something else; is_ours: whether the
    folder is a store or an evaluation set, in which there are no others.
    """

    stamp: str
    facts: Facts | None = None
    warning: str | None = None
    is_ours: bool = False


def read_index(catalogue: Place) -> dict[str, Known]:
    """What is noted of the manifests of a catalogue, by the names of their folders; may be nothing."""
    try:
        file = _file(catalogue)
        if file.stat().st_size > _LIMIT_BYTES:
            return {}
        found = json.loads(file.read_bytes())
        manifests = found["manifests"]
        expected = (INDEX_VERSION, described(catalogue), json_digest(manifests))
        if (found["version"], found["catalogue"], found["digest"]) != expected:
            return {}
        return {name: _known(entry) for name, entry in manifests.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def write_index(
    catalogue: Place, before: Mapping[str, Known], now: Mapping[str, Known], settled: set[str]
) -> None:
    """Note what was found; a folder that cannot be written leaves it at that.

    before: as `read_index` gave it; settled: the names whose stamps will be others if they change.
    """
    noted = {name: known for name, known in now.items() if name in settled and name.isprintable()}
    if noted == before:
        return
    added = {name: known for name, known in read_index(catalogue).items() if name not in before}
    manifests = {name: asdict(known) for name, known in (added | noted).items()}
    with suppress(OSError, UnicodeEncodeError):  # no room; a name that is not UTF-8
        index: dict[str, Any] = {
            "version": INDEX_VERSION,
            "catalogue": described(catalogue),
            "digest": json_digest(manifests),
            "manifests": manifests,
        }
        data = canonical_json(index)
        if len(data) <= _LIMIT_BYTES:
            write_whole(_file(catalogue), data)


def _file(catalogue: Place) -> Path:
    name = hashlib.sha256(described(catalogue).encode(errors="surrogateescape")).hexdigest()[:32]
    return Cache.from_environment().root / "catalogues" / f"{name}.json"


def _known(entry: Any) -> Known:
    known = Known(**entry)
    if known.facts is not None and known.facts.keys() != FACTS:
        raise ValueError("other facts than this version keeps")
    return known
