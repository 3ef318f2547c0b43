"""The texts of sae-probes (Kantamneni et al. 2025, arXiv 2502.16681; MIT): read from its wheel.

The PyPI package `sae-probes` carries 113 binary tasks and eight out-of-distribution sets as
zstd-compressed CSV. Its own dependencies are heavy and are not needed: the wheel is fetched once by
`sae-pipe eval-set fetch probes`, checked by its digest, kept in the cache folder, and read as the
ZIP archive that it is. Nothing in it is imported or run.
"""

import csv
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

from ...storage.errors import InputError, NetworkError, SaePipeError
from ...storage.files import disk_error, file_digest, write_whole

PACKAGE, VERSION = "sae-probes", "0.4.2"
WHEEL = "sae_probes-0.4.2-py3-none-any.whl"
WHEEL_SHA256 = "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03"
_DATA = "sae_probes/data"
_MASTER = f"{_DATA}/probing_datasets_MASTER.csv.zst"
_BINARY = "Binary Classification"
_MEMBER_LIMIT_BYTES = 1 << 26  # the largest table has 19 MB
_PIP_TIMEOUT_S = 600

Rows = list[dict[str, str]]


def cache_folder() -> Path:
    """Where fetched files are kept: SAE_PIPE_CACHE, or the platform's usual place."""
    chosen = os.environ.get("SAE_PIPE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sae-pipe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae-pipe"


def fetch_wheel(given: Path | None, say: Callable[[str], object]) -> Path:
    """Put the wheel into the cache: by pip, from its index, or from a file that is given.

    Raises InputError, NetworkError or DiskError; a file with another digest is not kept.
    """
    kept = cache_folder() / WHEEL
    if kept.is_file() and file_digest(kept) == WHEEL_SHA256:
        say(f"{kept} is there already. Nothing to do.")
        return kept
    if given is not None:
        _keep(given, kept)
    else:
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
                _keep(_download(Path(folder)), kept)
        except SaePipeError:
            raise
        except OSError as error:
            raise disk_error(error, kept) from error
    say(f"{kept} is there: {PACKAGE} {VERSION}, {kept.stat().st_size / 1e6:.0f} MB, MIT licence.")
    return kept


def _download(folder: Path) -> Path:
    """By pip, so that a configured index, proxy or certificate is used."""
    wanted = f"{PACKAGE}=={VERSION}"
    instead = (
        f"Or fetch it on another machine with `pip download --no-deps {wanted}` and pass the file "
        "as --wheel."
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), wanted]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise NetworkError(
            f"{wanted} could not be fetched: pip gave no answer for {_PIP_TIMEOUT_S} s. "
            f"Try again. {instead}"
        ) from None
    if done.returncode != 0 or not (folder / WHEEL).is_file():
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in errors if line.startswith("ERROR")] or errors or ["no reason"]
        raise NetworkError(
            f"{wanted} could not be fetched by pip ({said[-1].strip()}). "
            f"Try again where the package index answers. {instead}"
        )
    return folder / WHEEL


def _keep(file: Path, kept: Path) -> None:
    if not file.is_file():
        raise InputError(f"There is no file {file}. Pass the wheel {WHEEL}.")
    found = file_digest(file)
    if found != WHEEL_SHA256:
        raise InputError(
            f"{file.name} is not the {PACKAGE} {VERSION} that is known: its SHA-256 is {found} "
            f"instead of {WHEEL_SHA256}. It was not kept; fetch {WHEEL} again."
        )
    write_whole(kept, file.read_bytes())


class Tables:
    """The tables of the fetched wheel, by the names that sae-probes gives them."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._names = set(archive.namelist())

    def binary_tasks(self) -> list[str]:
        """Names of the binary tasks, such as 5_hist_fig_ismale, by their number."""
        rows = self._read(_MASTER, ("Data type", "Dataset save name"))
        files = [row["Dataset save name"] for row in rows if row["Data type"] == _BINARY]
        return sorted((Path(file).name.removesuffix(".csv") for file in files), key=_number)

    def ood_tasks(self) -> list[str]:
        """Names of the tasks that have an out-of-distribution set, by their number."""
        folder, suffix = f"{_DATA}/OOD data/", "_OOD.csv.zst"
        names = [name for name in self._names if name.startswith(folder) and name.endswith(suffix)]
        return sorted((Path(name).name.removesuffix(suffix) for name in names), key=_number)

    def read(self, task: str) -> Rows:
        """Rows of a task, with `prompt` and `target`."""
        return self._read(f"{_DATA}/cleaned_data/{task}.csv.zst")

    def read_ood(self, task: str) -> Rows:
        """Rows of its out-of-distribution set."""
        return self._read(f"{_DATA}/OOD data/{task}_OOD.csv.zst")

    def _read(self, name: str, columns: tuple[str, ...] = ("prompt", "target")) -> Rows:
        if name not in self._names:
            raise InputError(
                f"{WHEEL} has no {name}. Remove it from {cache_folder()} and run "
                "`sae-pipe eval-set fetch probes`."
            )
        if self._archive.getinfo(name).file_size > _MEMBER_LIMIT_BYTES:
            raise _bad(name, "it is larger than any table of sae-probes")
        with self._archive.open(name) as packed:
            stream = zstandard.ZstdDecompressor().stream_reader(packed)
            data = stream.read(_MEMBER_LIMIT_BYTES + 1)
        if len(data) > _MEMBER_LIMIT_BYTES:
            raise _bad(name, "it is larger than any table of sae-probes")
        with large_fields():
            rows: Rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
        for row in rows:
            if any(row.get(column) is None for column in columns):
                raise _bad(name, f"it has a row without {' and '.join(columns)}")
        return rows


@contextmanager
def open_tables() -> Iterator[Tables]:
    """The tables of the wheel in the cache; InputError says how to get it there."""
    kept = cache_folder() / WHEEL
    if not kept.is_file():
        raise InputError(
            f"The texts of {PACKAGE} are not there: {kept} is missing. "
            "Run `sae-pipe eval-set fetch probes` once (45 MB)."
        )
    if file_digest(kept) != WHEEL_SHA256:
        raise InputError(
            f"{kept} is damaged: its SHA-256 is not {WHEEL_SHA256}. "
            "Run `sae-pipe eval-set fetch probes` again."
        )
    with zipfile.ZipFile(kept) as archive:
        yield Tables(archive)


@contextmanager
def large_fields() -> Iterator[None]:
    """csv refuses fields above 128 kB, which a text may well be; its limit is global."""
    before = csv.field_size_limit(_MEMBER_LIMIT_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _number(task: str) -> tuple[int, str]:
    head = task.partition("_")[0]
    return (int(head) if head.isdecimal() else 0, task)


def _bad(name: str, what: str) -> InputError:
    return InputError(f"{name} in {WHEEL} cannot be used: {what}. Fetch the wheel again.")
