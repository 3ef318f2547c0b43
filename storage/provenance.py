"""Where and with what something was made: for manifests and run folders, never for hashes."""

import getpass
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .shown import shown

_PACKAGES = (
    "sae-pipe",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "zarr",
    "numcodecs",
    "numpy",
    "safetensors",
)


OWNER = "SAE_PIPE_OWNER"  # environment variable
_OWNER_CHARACTERS = 100


def owner() -> str | None:
    """Who makes a store: as SAE_PIPE_OWNER says, or else the name of the user.

    None where the variable is empty, or the user has no name. No name of a machine: a store may be
    published, and whoever looks for it asks for a person.
    """
    try:
        name = os.environ[OWNER] if OWNER in os.environ else getpass.getuser()
    except (OSError, KeyError):  # the latter up to Python 3.12
        return None
    return shown(name.strip())[:_OWNER_CHARACTERS] or None


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Installed versions of what decides about the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def hardware() -> dict[str, Any]:
    """Processor, cores and memory."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def this_run(crew: dict[str, Any]) -> dict[str, Any]:
    """One run of a harvest, for `provenance.runs`. crew: the device, and the workers if any."""
    return {"started": now(), "hardware": hardware(), **crew, "versions": versions()}


def command_line() -> str:
    """The command, as it could be typed again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
