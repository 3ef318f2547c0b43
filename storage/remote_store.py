"""A store at an address, read through the cache: `open_remote`.

Files are fetched when they are first needed (`remote_files.py`), and read from the disk like those
of any store. Shards are fetched whole, several at once, in the order in which the batch loader will
need them.
"""

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .address import Address
from .corpus import CORPUS_JSON, Corpus
from .disk import human_bytes
from .errors import InputError, StoreError
from .layout import Layout
from .loader import BatchLoader
from .order import OPEN_SHARDS
from .remote import Link, Refused, Say, tell
from .remote_files import FILES_AT_ONCE, RemoteFiles
from .rows import SplitReader
from .shard_cache import Cache, Held, NotNow
from .store import ActivationStore
from .unfinished import WaitEnded
from .values import Rows


def open_remote(address: Address, say: Say = tell) -> "RemoteStore":
    """Open a complete store at an address for reading.

    say: told about lost connections. Raises StoreError as `open_store` does, InputError when a
    package is missing, NetworkError when the address cannot be reached.
    """
    files = RemoteFiles(Link(address, say), Cache.from_environment())
    return RemoteStore(files)


class RemoteReader(SplitReader):
    """Rows of one split, each shard fetched when it is read, or before, as `prepare` is told."""

    def __init__(self, files: RemoteFiles, *args: Any) -> None:
        super().__init__(*args)
        self._remote, self._stopped, self._held = files, threading.Event(), Held()
        weakref.finalize(self, Held.let_go, self._held)
        self._jobs: dict[int, Future[None]] = {}
        self._stale = 0

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="read-ahead")

    def _name(self, shard: int, array: str) -> str:
        return self.shard_path(shard, array).relative_to(self._root).as_posix()

    def check_shard(self, shard: int, record: dict[str, Any]) -> None:
        """Sizes are compared when a file is fetched."""

    # --- reading ---

    def decode_chunk(self, chunk: int, out_RD: Rows) -> None:
        try:
            super().decode_chunk(chunk, out_RD)
        except Refused:
            raise
        except StoreError:
            shard = chunk // self.layout.chunks_per_shard
            if not self._is_spoilt(shard, "activations"):
                raise
            self._forget(shard)
            super().decode_chunk(chunk, out_RD)

    def _plain_shard(self, array: str, shard: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        name = self._name(shard, array)
        for is_last in (False, True):
            held = self._remote.open(name, is_stopped=self._stopped.is_set)
            try:
                return super()._plain_shard(array, shard, dtype)
            except StoreError:
                if is_last or not self._is_spoilt(shard, array):
                    raise
            finally:
                os.close(held)
        raise AssertionError

    def _is_spoilt(self, shard: int, array: str) -> bool:
        """Whether the cached file is not the one that was fetched; then it is forgotten."""
        return self._remote.is_damaged(self._name(shard, array))

    def _forget(self, shard: int) -> None:
        """Read a shard's file anew. Its descriptor stays open: a thread may be reading it."""
        with self._lock:
            self._indices.pop(shard, None)
            file = self._files.pop(shard, None)
            self._jobs.pop(shard, None)
        if file is not None:
            self._stale += 1
            self._held.add(f"spoilt/{self._stale}", file)

    def _damaged(self, shard: int, error: Exception, array: str = "activations") -> StoreError:
        reason = error.strerror if isinstance(error, OSError) else error
        return StoreError(
            f"Shard {shard} of {self._remote.address} is damaged: {self._name(shard, array)}: "
            f"{reason}. Repair or harvest the store where it was made, and push it again."
        )

    # --- fetching ---

    def _open(self, shard: int) -> int:
        job = self._jobs.get(shard)
        if job is not None:
            job.result()  # raises what fetching has raised
            with self._lock:
                if shard in self._files:
                    return os.dup(self._files[shard])
        return self._fetched(shard, can_wait=False)

    def _fetched(self, shard: int, *, can_wait: bool) -> int:
        name = self._name(shard, "activations")
        try:
            return self._remote.open(name, can_wait=can_wait, is_stopped=self._stopped.is_set)
        except NotNow:
            if self._stopped.is_set():
                raise WaitEnded from None
            raise

    def prepare(self, now: NDArray[np.int64], later: NDArray[np.int64]) -> None:
        """Fetch in the background: `now`, then `later` as far as the cache has room."""
        wanted = list(dict.fromkeys([*now.tolist(), *later.tolist()]))
        needed = set(now.tolist())
        with self._lock:
            for shard in self._files.keys() - set(wanted):
                os.close(self._files.pop(shard))
                self._indices.pop(shard, None)
            there = set(self._files)
        # What found no room before is asked for again, now that it is needed.
        self._jobs = {shard: job for shard, job in self._jobs.items() if shard in wanted}
        for shard in wanted:
            known = self._jobs.get(shard)
            if shard not in there and (known is None or (known.done() and shard in needed)):
                self._jobs[shard] = self._pool.submit(self._read_ahead, shard, shard not in needed)

    def _read_ahead(self, shard: int, can_wait: bool) -> None:
        with self._lock:
            if shard in self._files:
                return
        try:
            opened = self._fetched(shard, can_wait=can_wait)
        except NotNow:
            return
        with self._lock:
            if self._files.setdefault(shard, opened) != opened:
                os.close(opened)

    def bring(self, shard: int) -> None:
        arrays = self._shards[shard]["files"]
        for array in arrays:
            name = self._name(shard, array)
            self._held.add(name, self._remote.open(name, is_stopped=self._stopped.is_set))

    def let_go(self) -> None:
        self._held.let_go()

    def stop_waiting(self) -> None:
        self._stopped.set()
        if "_pool" in self.__dict__:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        super().close()
        self._held.let_go()


class RemoteStore(ActivationStore):
    """A complete store at an address. Open one with `open_store`."""

    def __init__(self, files: RemoteFiles) -> None:
        self.files = files
        super().__init__(files.folder, files.manifest)

    @property
    def place(self) -> Address:
        return self.files.address

    def _check_manifest(self) -> None:
        for name in ("statistics/mean/c/0", "statistics/variance/c/0"):
            self.files.local(name)  # Refused where it is not the one recorded
        super()._check_manifest()

    def file(self, name: str) -> Path:
        return self.files.local(name)

    def while_waiting(self, is_asked_to_end: Callable[[], bool], say: Say) -> None:
        self.files.link.is_asked_to_end, self.files.link.say = is_asked_to_end, say

    def _open_reader(self, folder: str, layout: Layout, shards: list[Any]) -> SplitReader:
        return RemoteReader(self.files, self.path, folder, layout, shards, self._codec)

    def _reader_of_batches(self) -> SplitReader:
        return self._reader("train", "")  # its own: it closes shards that its loader has done with

    def batches(self, batch_size: int, **options: Any) -> BatchLoader:
        self._check_cache(options.get("world_size", 1))
        return super().batches(batch_size, **options)

    def _check_cache(self, world_size: int) -> None:
        """InputError when the shards that are read together do not fit into the cache together."""
        sizes = (s["files"]["activations"]["bytes"] for s in self.manifest["train"]["shards"])
        needed = sum(sorted(sizes, reverse=True)[: OPEN_SHARDS * world_size])
        if needed > self.files.cache.limit_bytes:
            raise InputError(
                f"A fit reads up to {OPEN_SHARDS * world_size} shards of {self.place} side by side, "
                f"{human_bytes(needed)}, and the cache may hold "
                f"{human_bytes(self.files.cache.limit_bytes)}. Pass a larger --cache-size."
            )

    def _open_corpus(self) -> Corpus:
        self.files.local(f"corpus/{CORPUS_JSON}")

        def fetch(names: list[str]) -> None:
            self.files.bring([f"corpus/{name}" for name in names])

        return Corpus(self.path / "corpus", check_files=False, fetch=fetch)

    def close(self) -> None:
        super().close()
        self.files.close()
