"""Which store an address held when it was opened last: for when it does not answer.

CACHE/addresses/NAME.json = {address, manifest: where it is below the cache, sha256: of its bytes}; NAME
is of the address, the file's time of change that of the last look. The manifest lies with the other files
of its store and may be given up as they are.
"""

import hashlib
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .address import Address
from .files import write_json
from .shard_cache import Cache

_LIMIT_BYTES = 1 << 16


class Seen:
    """What is noted of one address."""

    def __init__(self, cache: Cache, address: Address) -> None:
        self.cache, self._address = cache, address
        name = hashlib.sha256(str(address).encode()).hexdigest()[:32]
        self._note = cache.root / "addresses" / f"{name}.json"

    def note(self, manifest: Path, data: bytes) -> None:
        """The address has just given a manifest, which lies in the cache."""
        entry = {
            "address": str(self._address),
            "manifest": manifest.relative_to(self.cache.root).as_posix(),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        if self._noted() != entry:
            write_json(self._note, entry)
        for file in (self._note, manifest):  # used just now
            with suppress(OSError):
                os.utime(file)

    def manifest(self) -> tuple[bytes, str] | None:
        """The bytes of the manifest that was there last, and when, in UTC; None for what is not in
        the cache any more, or not as it was.
        """
        entry = self._noted()
        if entry is None or entry.get("address") != str(self._address):
            return None
        try:
            data = (self.cache.root / str(entry.get("manifest"))).read_bytes()
            seen = datetime.fromtimestamp(self._note.stat().st_mtime, UTC)
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            return None
        return data, seen.isoformat(sep=" ", timespec="minutes")

    def _noted(self) -> dict[str, Any] | None:
        try:
            with self._note.open("rb") as file:
                found = json.loads(file.read(_LIMIT_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None
