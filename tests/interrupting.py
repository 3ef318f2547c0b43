"""Harvests in processes of their own that die by SIGKILL at a chosen instant."""

import multiprocessing
import os
import re
import signal
import threading
from typing import Any

import torch

from sae_pipe.stages import harvest_run
from sae_pipe.stages.backoff import BatchRunner
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.plan import Rates

from .copying import dying_at
from .harvesting import quiet


def _without_warm_up(*_: Any) -> Rates:
    return Rates(tokens_per_s=1e3, bytes_per_value=1.4)


def _harvest_in_child(config: HarvestConfig, die_at: int | None, events: Any) -> None:
    """Harvest, and die by SIGKILL just before the given event: a write, sync, rename or batch."""
    counted = dying_at(die_at, events)
    torch.set_num_threads(1)
    for name in ("replace", "fsync", "posix_fallocate"):
        setattr(os, name, counted(getattr(os, name)))
    BatchRunner._try = counted(BatchRunner._try)  # type: ignore[method-assign]
    vars(harvest_run)["measure"] = _without_warm_up
    quiet(config)


def run_in_child(config: HarvestConfig, die_at: int | None = None) -> tuple[int | None, int]:
    """Exit code of a harvest in a process of its own, and how many events it came to."""
    context = multiprocessing.get_context("fork")
    events = context.Value("q", 0, lock=False)
    process = context.Process(target=_harvest_in_child, args=(config, die_at, events))
    process.start()
    process.join()
    return process.exitcode, events.value


def _harvest_until(config: HarvestConfig, moment: list[str], *, is_done: bool) -> None:
    """Harvest, and die by SIGKILL just before or, with is_done, just after a write."""
    lock, left = threading.Lock(), list(moment)

    def watched(name: str, function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            path = args[-1] if name == "replace" else os.readlink(f"/proc/self/fd/{args[0]}")
            with lock:
                if left and re.search(left[0], f"{name} {path}"):
                    del left[0]
                    if not left:
                        if is_done:
                            function(*args, **kwargs)
                        os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    torch.set_num_threads(1)
    for name in ("replace", "fsync"):
        setattr(os, name, watched(name, getattr(os, name)))
    vars(harvest_run)["measure"] = _without_warm_up
    quiet(config)


def run_until(config: HarvestConfig, moment: list[str], *, is_done: bool = False) -> int | None:
    """Exit code of a harvest that dies at a moment: a list of writes, the last of which it is."""
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=_harvest_until, args=(config, moment), kwargs={"is_done": is_done}
    )
    process.start()
    process.join()
    return process.exitcode
