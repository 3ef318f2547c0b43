"""A harvest into a store at an address: spooled here, sent shard by shard as they are sealed.

The spool is a folder of the cache folder, named by the address; it is a store like any, so that the
same command goes on with it after a kill, and what has arrived is not sent again (`storage/push.py`).
The manifest is sent when the store is complete, and then the spool is removed. A repository of the Hub
that is not there is made for its owner alone: publishing is a decision of its own.
"""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..storage import StoreEntry
from ..storage.address import Address, Place, place
from ..storage.bar import OpenBar, no_bar
from ..storage.builder import is_begun
from ..storage.errors import SaePipeError
from ..storage.manifest import COMMITS, HARVESTING, read_manifest
from ..storage.push import Sending, check_can_write, push
from ..storage.remote import Link
from ..storage.shard_cache import Cache
from ..storage.store_source import manifest_if_there
from ..storage.unfinished import WaitEnded
from ..storage.verify import SPLITS, files_of_shard
from .harvest import Planned, Say, harvest
from .harvest_config import HarvestConfig, Target, check_same, request_of, targets

_LOOK_S = 1.0  # between looks for sealed shards


class _Nothing:
    """Counts nothing: the harvest has a bar of its own."""

    def update(self, n: int) -> None: ...


def spooled(out: Address) -> dict[str, Any]:
    """What a HarvestConfig has in place of `out` for stores at an address."""
    number = hashlib.sha256(str(out).encode()).hexdigest()[:16]
    return {"out": Cache.from_environment().root / "spool" / number / out.name, "send_to": out}


def harvest_anywhere(
    config: HarvestConfig,
    *,
    say: Say = print,
    dry_run: bool = False,
    planned: Planned = lambda plan: None,
    open_bar: OpenBar = no_bar,
) -> list[Place]:
    """`harvest`, into folders or to addresses; returns where the stores are.

    open_bar: for what is left to send once a store is complete. A store that the catalogue holds
    already is where it was found. Raises as `harvest` and `push` do.
    """
    held: dict[Path, Place] = {}

    def found(target: Target, entry: StoreEntry) -> None:
        held[target.path] = place(entry.address)

    if config.send_to is None:
        paths = harvest(config, say=say, dry_run=dry_run, planned=planned, found=found)
        return [held.get(path, path) for path in paths]
    check_can_write(config.send_to)
    job = _Spooled(config, config.send_to)
    if job.is_complete(say):
        return [*job.addresses.values()]
    if dry_run:
        harvest(config, say=say, dry_run=True, planned=planned, found=found)
    else:
        say(f"spool     {config.out.parent}: shards are sent as they are sealed, and go at the end")
        with job.sending(say):
            harvest(config, say=say, planned=planned, found=found)
        for path, address in job.addresses.items():
            if path not in held:
                push(path, address, private=True, say=say, open_bar=open_bar)
        shutil.rmtree(config.out.parent, ignore_errors=True)
    return [held.get(path, address) for path, address in job.addresses.items()]


def asked_for(config: HarvestConfig) -> list[Place]:
    """Where the stores of a harvest are to stand, in the order of `harvest_anywhere`."""
    wanted = targets(config)
    if config.send_to is None:
        return [target.path for target in wanted]
    return [config.send_to.with_name(target.path.name) for target in wanted]


class _Spooled:
    """A harvest whose stores go elsewhere. addresses: of the store that is spooled at each path."""

    def __init__(self, config: HarvestConfig, out: Address) -> None:
        self._config, self._targets = config, targets(config)
        self.addresses = {each.path: out.with_name(each.path.name) for each in self._targets}

    def is_complete(self, say: Say) -> bool:
        """Whether all stores stand at their addresses; InputError for one of another recipe."""
        complete = [self._is_there(target) for target in self._targets]
        if not all(complete) or any(is_begun(target.path) for target in self._targets):
            return False
        for address in self.addresses.values():
            say(f"{address} is complete, and of this recipe. Nothing to do.")
        return True

    def _is_there(self, target: Target) -> bool:
        address = self.addresses[target.path]
        manifest = manifest_if_there(address)
        if manifest is not None:
            check_same(address, manifest.get("request") or {}, request_of(self._config, target))
        return manifest is not None

    @contextmanager
    def sending(self, say: Say) -> Iterator[None]:
        """Send what is sealed while the block runs; what fails is sent at the end."""
        stopped = threading.Event()
        with ExitStack() as links:
            senders = []
            for path, address in self.addresses.items():
                link = Link(address, private=True)
                links.callback(link.end)
                senders.append(_Sender(path, link, stopped))
            threads = [
                threading.Thread(target=each.run, args=[say], name="send") for each in senders
            ]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                stopped.set()
                for thread in threads:
                    thread.join()


class _Sender:
    """Sends the shards of one store that is being written."""

    def __init__(self, root: Path, link: Link, stopped: threading.Event) -> None:
        self._root, self._link, self._stopped = root, link, stopped
        self._seen: set[Path] = set()
        link.is_asked_to_end = stopped.is_set

    def run(self, say: Say) -> None:
        """Until it is stopped; an error ends it and is told."""
        try:
            job: Sending | None = None
            while not self._stopped.wait(_LOOK_S):
                if not self._is_laid_out():
                    continue
                job = job or Sending(self._link, self._root)
                self._send(job)
        except WaitEnded:
            pass
        except SaePipeError as error:
            say(
                f"Sending to {self._link.address} has stopped: {error} The harvest goes on, and what "
                "is missing is sent when it is complete."
            )

    def _is_laid_out(self) -> bool:
        return is_begun(self._root) and read_manifest(self._root).get("state") == HARVESTING

    def _send(self, job: Sending) -> None:
        """What was sealed since the last look."""
        files = []
        for split in SPLITS:
            for record in sorted((self._root / COMMITS / split).glob("[0-9]*.json")):
                if record not in self._seen:
                    self._seen.add(record)
                    files += files_of_shard(self._root, split, int(record.stem))
        if files:
            job.send(job.missing(files), _Nothing())
