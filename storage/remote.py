"""One store at an address: its files read and written through fsspec, with patience.

A connection that is lost is tried again, first after half a second, then less and less often. What
has never answered is given up after `FIRST_PATIENCE_S`, what has answered before after `PATIENCE_S`,
so that a mistyped host is told at once and a fit survives minutes without network. What is not
there, or may not be read, is one sentence that says what to look at.
"""

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from .address import Address
from .bounded import Take, read_part
from .errors import InputError, NetworkError, SaePipeError, StoreError
from .hub_commits import commit, create, in_commits
from .interrupts import INTERRUPTED
from .remote_errors import FORBIDDEN, GONE, LOST, NO_CREDENTIALS, is_by_choice, kind_of, reason
from .shown import shown as as_text
from .unfinished import WaitEnded

T = TypeVar("T")
F = TypeVar("F")
Say = Callable[[str], object]
Stopped = Callable[[], bool]

CONNECTIONS = 8  # requests at once; one rarely fills a link
PART_BYTES = 8 << 20  # of a request: as many as CONNECTIONS of these are in memory
FIRST_PATIENCE_S = 15.0
PATIENCE_S = 600.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 15.0
_NEXT_WORD_S = 30.0
_CONNECT_S, _SILENCE_S = 10.0, 30.0  # until a request counts as lost


def never() -> bool:
    """Nothing is asked to end."""
    return False


def tell(line: str) -> None:
    """Say a line to the user, beside what a command prints."""
    print(as_text(line), file=sys.stderr)


class Refused(StoreError):
    """A file that came with other bytes than the manifest records, twice, or cannot be had."""


class Unreachable(NetworkError):
    """An address that does not answer, whatever is asked for."""


class Link:
    """The files of a store at an address, by their names below it. Safe to use from threads.

    say: told about lost connections; is_asked_to_end: whether waiting shall end (WaitEnded);
    has_ranges: False once a server has sent a whole file where a part was asked for; private: of a
    repository of the Hub that is made to write to it.
    """

    def __init__(self, address: Address, say: Say = tell, *, private: bool = False) -> None:
        self.address, self.say, self._private = address, say, private
        self.is_asked_to_end: Callable[[], bool] = lambda: False
        self.has_ranges = True
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._has_answered = False
        self._lost_at: float | None = None
        self._spoken_at = 0.0

    @cached_property
    def _system(self) -> Any:
        """fsspec's file system of the address; InputError when its package is missing."""
        import fsspec

        scheme = self.address.scheme
        try:
            return fsspec.filesystem(self.address.protocol, **_options(self.address.protocol))
        except ImportError as error:
            raise InputError(
                f"{self.address.protocol}:// addresses need {scheme.package}, which is not "
                f"installed. Run: pip install 'sae-pipe[{scheme.extra}]'."
            ) from error
        except (ValueError, OSError) as error:
            raise self._refusal(NO_CREDENTIALS, "", error) from error

    def path(self, name: str) -> str:
        """What fsspec calls a file."""
        url = f"{self.address}/{name}" if name else str(self.address)
        if self.address.protocol in ("http", "https"):
            return url
        return url.partition("://")[2]

    # --- reading ---

    def read(self, name: str, start: int, stop: int, is_stopped: Stopped = never) -> bytes:
        """Bytes start to stop of a file, fewer where it ends before.

        is_stopped: whether waiting for a lost connection shall end (WaitEnded). Raises
        FileNotFoundError, StoreError for what may not be read, NetworkError when patience has ended.
        """

        def read() -> bytes:
            pieces: list[bytes] = []
            self._read(name, start, stop, pieces.append)
            return b"".join(pieces)

        return self.try_until_it_works(name, read, is_stopped)

    def stream(
        self, name: str, n_bytes: int, write: Callable[[bytes, int], object], is_stopped: Stopped
    ) -> None:
        """A file of a server without ranges, from its beginning, never more of it than n_bytes.

        write: given pieces, and where each stands. Raises as `read` does.
        """

        def read() -> None:
            at = 0

            def take(piece: bytes) -> None:
                nonlocal at
                write(piece, at)
                at += len(piece)

            self._read(name, 0, n_bytes, take)

        self.try_until_it_works(name, read, is_stopped)

    def _read(self, name: str, start: int, stop: int, take: Take) -> None:
        protocol = self.address.protocol
        has_ranges = read_part(self._system, protocol, self.path(name), start, stop, take)
        if has_ranges is not None:
            self.has_ranges = has_ranges

    def read_small(self, name: str, limit: int, is_stopped: Stopped = never) -> bytes:
        """A whole file; StoreError when it has more than `limit` bytes."""
        data = self.read(name, 0, limit + 1, is_stopped)
        if len(data) > limit:
            raise StoreError(
                f"{self.address}/{name} has more than {limit:,} bytes, which none needs. "
                "The store is damaged: push or harvest it again."
            )
        return data

    def size(self, name: str) -> int | None:
        """Bytes of a file, where the server says so; raises as `read` does."""
        entry = self.try_until_it_works(name, lambda: self._info(name))
        if entry.get("type") == "directory":
            raise FileNotFoundError(name)
        size = entry.get("size")
        return None if size is None else int(size)

    def _info(self, name: str) -> dict[str, Any]:
        self._system.invalidate_cache()
        entry: dict[str, Any] = self._system.info(self.path(name))
        return entry

    def parts(self, name: str, n_bytes: int) -> Iterator[bytes]:
        """A file in order, in parts that fit in memory; ends early where the file does."""
        for start in range(0, n_bytes, PART_BYTES):
            part = self.read(name, start, min(start + PART_BYTES, n_bytes))
            yield part
            if len(part) < min(PART_BYTES, n_bytes - start):
                return

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that requests are made in, `CONNECTIONS` of them."""
        return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")

    def folder(self, name: str) -> dict[str, tuple[int, str] | None]:
        """What is directly in a folder: size and version of a file, None for a folder.

        Raises as `read` does.
        """
        root = self.path(name).rstrip("/")
        entries = self.try_until_it_works(name, lambda: self._system.ls(root, detail=True))
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: None
            if entry["type"] == "directory"
            else (int(entry["size"] or 0), _version(entry))
            for entry in entries
            if entry["name"].rstrip("/") != root  # what some tools put there for the folder itself
        }

    # --- writing ---

    def listing(self) -> dict[str, tuple[int, str]]:
        """Size and version (ETag, or what the service has) of every file that is there."""
        root = self.path("").rstrip("/") + "/"

        def find() -> dict[str, Any]:
            self._system.invalidate_cache()
            try:
                found: dict[str, Any] = self._system.find(root.rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            return found

        found = self.try_until_it_works("", find)
        return {
            name.removeprefix(root): (int(entry["size"] or 0), _version(entry))
            for name, entry in found.items()
            if name.startswith(root)
        }

    def groups(self, files: Sequence[F], size_of: Callable[[F], int]) -> list[list[F]]:
        """Files in the groups that `put` sends at once."""
        if not self._commits:
            return [[file] for file in files]
        return list(in_commits([(file, size_of(file)) for file in files]))

    def groups_at_once(self, wanted: int) -> int:
        """How many groups may be sent at once: a commit comes after another."""
        return 1 if self._commits else wanted

    @property
    def _commits(self) -> bool:
        """Whether files are sent in commits: to repositories of the Hub, not to its buckets."""
        return self.address.protocol == "hf" and not self.address.url.startswith("hf://buckets/")

    def put(self, files: Sequence[tuple[Path | bytes, str]]) -> list[tuple[int | None, str]]:
        """Send files, or contents, each of which appears whole, under their names.

        Returns the size that each has there, where the service says so, and its version (see
        `listing`). Raises StoreError when there is nothing to send to.
        """
        try:
            self._put_where_there_is_a_place(files)
            entries = [
                self.try_until_it_works(name, lambda name=name: self._info(name))  # type: ignore[misc]
                for _, name in files
            ]
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.address} cannot be written: there is no such bucket, container or "
                "repository. Create it first, or look at the address."
            ) from error
        return [
            (None if entry.get("size") is None else int(entry["size"]), _version(entry))
            for entry in entries
        ]

    def put_bytes(self, data: bytes, name: str) -> None:
        """Send a small file, which appears whole."""
        self.put([(data, name)])

    def _put_where_there_is_a_place(self, files: Sequence[tuple[Path | bytes, str]]) -> None:
        """Send; into a repository that is not there yet once that was made."""
        try:
            self.try_until_it_works(files[0][1], lambda: self._put(files))
        except FileNotFoundError:
            if not (self._commits and self.try_until_it_works("", self._create)):
                raise
            self.say(f"{self.address.repository} was not there, and has been made.")
            self.try_until_it_works(files[0][1], lambda: self._put(files))

    def _create(self) -> bool:
        made = create(self._system, self.path(""), private=self._private)
        self._system.invalidate_cache()  # it remembers what was not there
        return made

    def _put(self, files: Sequence[tuple[Path | bytes, str]]) -> None:
        if self._commits:
            commit(self._system, self.path(""), files)
            return
        for content, name in files:
            if isinstance(content, Path):
                self._system.put_file(str(content), self.path(name))
            else:
                self._system.pipe_file(self.path(name), content)

    # --- patience ---

    def end(self) -> None:
        """End every wait; the link cannot be used after that."""
        self._ended.set()
        if "pool" in self.__dict__:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def try_until_it_works(self, name: str, act: Callable[[], T], is_stopped: Stopped = never) -> T:
        """What `act` returns, tried again while the connection is lost."""
        begun, delay = time.monotonic(), _FIRST_DELAY_S
        while True:
            try:
                result = act()
            except SaePipeError:
                raise
            except Exception as error:
                kind = kind_of(error)
                if kind == GONE:
                    raise FileNotFoundError(name) from error
                if kind != LOST:
                    raise self._refusal(kind, name, error) from error
                patience = PATIENCE_S if self._has_answered else FIRST_PATIENCE_S
                patience = 0.0 if is_by_choice(error) else patience
                if time.monotonic() - begun > patience:
                    raise self._given_up(time.monotonic() - begun, error) from error
                self._speak(error)
                self._pause(delay * random.uniform(0.75, 1.25), is_stopped)
                delay = min(2 * delay, _LONGEST_DELAY_S)
            else:
                self._answered()
                return result

    def _pause(self, seconds: float, is_stopped: Stopped) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            # Nobody waits for the answer any more, but for this thread to end.
            is_over = INTERRUPTED.is_set() or not threading.main_thread().is_alive()
            if self._ended.wait(0.1) or is_over or is_stopped() or self.is_asked_to_end():
                raise WaitEnded

    def _answered(self) -> None:
        with self._lock:
            lost_at, self._lost_at, self._has_answered = self._lost_at, None, True
        if lost_at is not None:
            self.say(f"{self.address} answers again, after {time.monotonic() - lost_at:.0f} s.")

    def _speak(self, error: Exception) -> None:
        now = time.monotonic()
        with self._lock:
            if self._lost_at is None:
                self._lost_at = now
            elif now - self._spoken_at < _NEXT_WORD_S:
                return
            self._spoken_at = now
            lost_s = now - self._lost_at
        since = f" for {lost_s:.0f} s" if lost_s >= 1 else ""
        self.say(f"No connection to {self.address}{since} ({reason(error)}). Trying again.")

    def _given_up(self, seconds: float, error: Exception) -> Unreachable:
        return Unreachable(
            f"{self.address} could not be reached for {seconds:.0f} s ({reason(error)}). Look at "
            "the network and the address, then run the same command again: what is there is kept."
        )

    def _refusal(self, kind: int, name: str, error: Exception) -> SaePipeError:
        what, credentials = self.path(name), self.address.scheme.credentials
        if not what.startswith("http"):
            what = f"{self.address.protocol}://{what}"
        if kind == NO_CREDENTIALS:
            return StoreError(
                f"{what} needs credentials, and there are none that work ({reason(error)}). Set "
                f"{credentials}."
            )
        if kind == FORBIDDEN:
            return StoreError(
                f"{what} may not be read or written with these credentials ({reason(error)}). "
                f"Look at the address, and at {credentials}."
            )
        return NetworkError(
            f"{what} could not be read or written ({reason(error)}). Look at the address and the "
            "service, then run the same command again."
        )

    def no_store(self, detail: str = "") -> StoreError:
        """The sentence for an address without a store."""
        return StoreError(
            f"There is no store at {self.address}{detail}. Pass the address that `sae-pipe store "
            "push` or `sae-pipe harvest --out` wrote; a store is there once its manifest.json is."
        )


def _options(protocol: str) -> dict[str, Any]:
    """What each file system is opened with: no answers of yesterday, and ends to waiting."""
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol == "s3":
        from .s3_answers import BoundedSession

        # Trying again is ours, which knows how long and whom to tell.
        retries = {"mode": "standard", "total_max_attempts": 1}
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_S,
            "read_timeout": _SILENCE_S,
            "max_pool_connections": 2 * CONNECTIONS,
            "retries": retries,
            "http_session_cls": BoundedSession,
        }
    elif protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        options["client_kwargs"] = {
            "timeout": timeout,
            "trust_env": True,
            "auto_decompress": False,  # no file of a store is packed on its way
        }
    elif protocol == "hf":
        del options["use_listings_cache"]
    return options


def _version(entry: dict[str, Any]) -> str:
    """What tells one state of a remote file from another: no proof of its content."""
    for key in ("ETag", "etag", "md5Hash", "generation", "blob_id", "mtime", "LastModified"):
        if entry.get(key):
            return str(entry[key]).strip('"')
    return ""
