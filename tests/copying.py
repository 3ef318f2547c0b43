"""What the tests of recode, import and export share: kills, contents, limited memory."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def dying_at(die_at: int | None, events: Any) -> Callable[[Any], Any]:
    """Wraps functions of this process: their calls are counted, just before one it dies by SIGKILL."""
    lock = threading.Lock()  # the child's own: one shared with the parent would die locked

    def counted(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            with lock:
                events.value += 1
                if events.value == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    return counted


def _in_child(run: Callable[[], object], die_at: int | None, events: Any) -> None:
    counted = dying_at(die_at, events)
    for name in ("replace", "rename", "fsync", "link"):
        setattr(os, name, counted(getattr(os, name)))
    run()


def run_in_child(run: Callable[[], object], die_at: int | None = None) -> tuple[int | None, int]:
    """Exit code of a run in a process of its own, and how many renames and syncs it came to.

    die_at: the one just before which it dies by SIGKILL.
    """
    context = multiprocessing.get_context("fork")
    events = context.Value("q", 0, lock=False)
    process = context.Process(target=_in_child, args=(run, die_at, events))
    process.start()
    process.join()
    return process.exitcode, events.value


def killed_until_done(run: Callable[[], object], events: int, seed: int) -> int:
    """Run again and again, killed somewhere each time, until it comes to its end; the kills."""
    rng, kills = np.random.default_rng(seed), 0
    for event in range(1, 6):  # the first writes of all, one by one
        assert run_in_child(run, event)[0] == -signal.SIGKILL
        kills += 1
    while (code := run_in_child(run, int(rng.integers(1, max(events // 2, 2))))[0]) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        assert kills < 60
    return kills


def content(store: Path) -> dict[str, bytes]:
    """Every file that must be the same however often its writer was stopped."""
    files = {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file() and file.name not in (".lock", "manifest.json")
    }
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("provenance")
    manifest["execution"].pop("tokens_per_s", None)
    files["manifest"] = json.dumps(manifest, sort_keys=True).encode()
    return files


_LIMITED = """
import pickle, resource, sys, threading
from pathlib import Path
threading.stack_size(1 << 20)  # stacks count, whether they are used or not
run, warm_up, more_bytes = pickle.load(sys.stdin.buffer)
warm_up()
here = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (here + more_bytes, here + more_bytes))
run()
"""


# Freed memory goes back at once, so that the limit is one of what is in use.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def runs_in_memory(
    run: Callable[[], object], more_bytes: int, warm_up: Callable[[], object] = dict
) -> bool:
    """Whether a fresh process can run it with so much memory more than `warm_up` leaves behind.

    Both are pickled, so they are partials of functions of the package. A fork would not do: what
    the tests before have freed could be taken again, and count for nothing.
    """
    environment = os.environ | _GIVE_BACK
    ended = subprocess.run(
        [sys.executable, "-c", _LIMITED],
        check=False,
        input=pickle.dumps((run, warm_up, more_bytes)),
        env=environment,
        capture_output=True,
        timeout=200,
    )
    out_of_memory = (b"MemoryError", b"Unable to allocate", b"not allocate memory", b"realloc")
    if ended.returncode != 0 and not any(sign in ended.stderr for sign in out_of_memory):
        raise AssertionError(ended.stderr.decode())
    return ended.returncode == 0
