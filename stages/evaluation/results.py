"""Result files: what was found of one SAE (or baseline), metric by metric. JSON, written whole.

    RUNNAME-XXXXXXXX.json             X: the first 8 hex digits of the SHA-256 of sae.safetensors
    RUNNAME-XXXXXXXX-untrained.json   a baseline of that run; run.baseline says which

docs/evaluation.md describes the format. An entry is identified by metric, source, options, seed and
version: the same is not computed again. What is not defined is null, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...storage import provenance
from ...storage.errors import InputError, StoreError
from ...storage.files import canonical_json, disk_error, write_json
from ...storage.plain_json import parse_plain_json
from ..metrics.base import Value

FORMAT, FORMAT_VERSION = "sae-pipe evaluation", 1
LIMIT_BYTES = 1 << 28
_DIRECTIONS = ("up", "down", "none")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a metric was computed on. kind: `store` or `evaluation set`; suite: of a set, else None."""

    kind: str
    name: str
    digest: str
    suite: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One metric of one SAE on one source; values by name."""

    metric: str
    definition: str
    direction: str
    source: Source
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int
    sample: Mapping[str, int]
    interval: str
    values: Mapping[str, Value]
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float
    version: int

    @property
    def identity(self) -> bytes:
        """What two entries have in common that stand for the same computation."""
        return identity_of(
            self.metric, self.source.digest, self.options, seed=self.seed, version=self.version
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result file. run: what was judged (`judged.py` says which keys); path: where it lies."""

    path: Path
    run: Mapping[str, Any]
    metrics: tuple[Measured, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.run["name"])

    @property
    def baseline(self) -> str | None:
        """untrained, random latents or mean; None for a run."""
        found = self.run.get("baseline")
        return None if found is None else str(found)

    def has(self, identity: bytes) -> bool:
        """Whether an entry is there already."""
        return any(entry.identity == identity for entry in self.metrics)

    def with_entries(self, entries: Iterable[Measured]) -> Result:
        """With more entries, which take the place of those of the same metric, source and options
        (an older version, another seed)."""
        kept = {_place_of(entry): entry for entry in self.metrics}
        kept |= {_place_of(entry): entry for entry in entries}
        return replace(self, metrics=tuple(kept.values()))


def identity_of(
    metric: str, digest: str, options: Mapping[str, Any], *, seed: int, version: int
) -> bytes:
    """The identity of an entry: what decides its numbers beside the SAE."""
    return canonical_json([metric, digest, dict(options), seed, version])


def _place_of(entry: Measured) -> bytes:
    return canonical_json([entry.metric, entry.source.digest, dict(entry.options)])


def result_path(out: Path, name: str, sae_sha256: str, baseline: str | None = None) -> Path:
    """Where the result of a run, or of a baseline of it, is written."""
    suffix = "" if baseline is None else f"-{baseline.replace(' ', '-')}"
    return out / f"{name}-{sae_sha256[:8]}{suffix}.json"


def write_result(result: Result) -> None:
    """Write the file whole or not at all. Raises DiskError."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "run": dict(result.run),
        "metrics": [_entry_json(entry) for entry in result.metrics],
        "provenance": {
            "written": provenance.now(),
            "command": provenance.command_line(),
            "versions": provenance.versions(),
            "hardware": provenance.hardware(),
        },
    }
    write_json(result.path, as_json(content))


def read_result(path: Path) -> Result:
    """Read one file. Raises StoreError: not there, damaged, of a newer format, not a result."""
    content = _load(path)
    try:
        return Result(
            path=path,
            run=_run(content["run"]),
            metrics=tuple(_entry(entry) for entry in content["metrics"]),
            provenance=dict(content.get("provenance", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"Result {path} is damaged: {_reason(error)}. Remove it and run `sae-pipe eval` again."
        ) from error


def read_results(places: Sequence[str | Path]) -> list[Result]:
    """The results of files, and of folders (every result file in them), in order of their names.

    Raises InputError where a place is not there or a folder has none, StoreError as `read_result`.
    """
    found: dict[Path, Result] = {}
    for place in map(Path, places):
        if place.is_dir():
            files = [file for file in sorted(place.glob("*.json")) if is_result(file)]
            if not files:
                raise InputError(
                    f"Folder {place} holds no results. Pass the folder that "
                    "`sae-pipe eval --out` wrote."
                )
        elif place.is_file():
            files = [place]
        else:
            raise InputError(f"There is no result at {place}. Pass files or folders that exist.")
        for file in files:
            found.setdefault(file.resolve(), read_result(file))
    return list(found.values())


def is_result(path: Path) -> bool:
    """Whether a JSON file says that it is a result: other files may stand beside them."""
    try:
        with path.open("rb") as file:
            return FORMAT.encode() in file.read(200)
    except OSError:
        return False


def as_json(value: Any) -> Any:
    """Plain JSON values: tuples become lists, numpy numbers Python's, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(each) for each in value]
    if hasattr(value, "tolist"):  # of numpy: an array, or one number
        return as_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _entry_json(entry: Measured) -> dict[str, Any]:
    content = asdict(entry)
    content["values"] = {
        name: {key: each for key, each in asdict(value).items() if each is not None}
        | {"value": value.value}
        for name, value in entry.values.items()
    }
    return content


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise ValueError("it is too large")
        content: dict[str, Any] = dict(parse_plain_json(path.read_bytes()))
    except FileNotFoundError:
        raise StoreError(f"There is no result at {path}. Pass a file that exists.") from None
    except OSError as error:
        raise disk_error(error, path) from error
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"Result {path} is damaged: it is not JSON ({error}). "
            "Remove it and run `sae-pipe eval` again."
        ) from error
    if content.get("format") != FORMAT:
        raise StoreError(
            f"{path} is not a result: it does not name the format {FORMAT!r}. "
            "Pass what `sae-pipe eval --out` wrote."
        )
    version = content.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise StoreError(
            f"Result {path} has format version {version}, and this sae-pipe reads up to "
            f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade sae-pipe."
        )
    return content


def _run(section: Any) -> dict[str, Any]:
    run = dict(section)
    if not isinstance(run["name"], str):
        raise TypeError("run.name is not a text")
    return run


def _entry(section: Any) -> Measured:
    content = dict(section)
    names = Measured.__dataclass_fields__
    content = {name: value for name, value in content.items() if name in names}
    source = dict(content.pop("source"))
    values = dict(content.pop("values"))
    if content["direction"] not in _DIRECTIONS:
        raise ValueError(f"direction {content['direction']!r}")
    return Measured(
        **content,
        source=Source(
            kind=str(source["kind"]),
            name=str(source["name"]),
            digest=str(source["digest"]),
            suite=None if source.get("suite") is None else str(source["suite"]),
        ),
        values={name: _value(value) for name, value in values.items()},
    )


def _value(section: Any) -> Value:
    found = dict(section)
    numbers = [_number(found.get(name)) for name in ("value", "low", "high")]
    replicates = found.get("replicates")
    return Value(
        value=numbers[0],
        low=numbers[1],
        high=numbers[2],
        replicates=None if replicates is None else tuple(_number(each) for each in replicates),
    )


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
