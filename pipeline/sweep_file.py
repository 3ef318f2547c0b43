"""The file of `sae-pipe sweep`: TOML whose keys are flags of `sae-pipe harvest` and `sae-pipe fit`.

    [[harvest]]                 # none, one, or several
    model = "pythia-160m"
    layer = 8
    mask_p = [0.0, 0.3]

    [fit]                       # one, or several
    l0 = [20, 40, 80]           # a list gives an SAE for each value

Which keys there are, of which type, and what they are by default is read from the commands.
"""

import inspect
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..stages.fitconfig import FitConfig
from ..stages.harvest_config import HarvestConfig
from ..storage.address import Place, expanded, place
from ..storage.errors import InputError
from .cli_fit import fit
from .cli_harvest import harvest, harvest_config
from .fit_flags import FIELDS, RUNS, check_workers, fit_configs

_LIMIT_BYTES = 1 << 20
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    Path: "a path in quotes",
}


@dataclass(frozen=True, kw_only=True)
class FitTable:
    """One [fit] of a file. stores: None is those of all harvests of the file."""

    configs: list[FitConfig]
    out: Path
    stores: list[Place] | None
    workers: int | None


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """What a file asks for."""

    harvests: list[HarvestConfig]
    fits: list[FitTable]


@dataclass(frozen=True, kw_only=True)
class _Key:
    """A key of a table. many: its flag may be given several times; is_listed: it may be a list, for
    a combination with each value; default: inspect.Parameter.empty where it has to be given."""

    kind: type
    many: bool
    is_listed: bool
    default: Any


def read_sweep(file: Path) -> SweepFile:
    """Read a file. Raises InputError that names the key for whatever is not as it should be."""
    tables = _load(file)
    unknown = sorted(tables.keys() - {"harvest", "fit"})
    if unknown:
        raise InputError(
            f"{unknown[0]} in {file} is not known: a sweep has the tables [harvest] and [fit]."
        )
    harvests = [
        harvest_config(_Table(file, "harvest", table, _harvest_keys()).all_values())
        for table in _several(file, tables, "harvest")
    ]
    fits = [_fit_table(file, table) for table in _several(file, tables, "fit")]
    if not fits:
        raise InputError(f"{file} has no [fit]. Add one with at least `l0 = 20`.")
    if not harvests and any(table.stores is None for table in fits):
        raise InputError(
            f"{file} has no [harvest], so [fit] needs `store`: the stores to fit from."
        )
    return SweepFile(harvests=harvests, fits=fits)


def _load(file: Path) -> dict[str, Any]:
    try:
        if file.is_file() and file.stat().st_size > _LIMIT_BYTES:
            raise ValueError(f"it has more than {_LIMIT_BYTES:,} bytes")
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file} could not be read ({error.strerror or error}). Pass the TOML file of a sweep."
        ) from error
    except RecursionError:
        raise InputError(f"{file} is not the TOML of a sweep: it is nested too deep.") from None
    except ValueError as error:  # also of bytes that are not UTF-8
        raise InputError(f"{file} is not TOML: {error}.") from error


def _several(file: Path, tables: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The tables of a name, however many there are."""
    found = tables.get(name, [])
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(table, dict) for table in found):
        raise InputError(f"{name} in {file} has to be a table: write [{name}] above its keys.")
    return found


def _fit_table(file: Path, given: dict[str, Any]) -> FitTable:
    table = _Table(file, "fit", given, _fit_keys())
    values = table.given_values() | table.defaults_beside(FitConfig)
    stores = [place(store) for store in values.pop("store")] if "store" in values else None
    out, workers = values.pop("out", RUNS), values.pop("workers", None)
    check_workers(workers, 0 if stores is None else len(stores))
    return FitTable(configs=fit_configs(values), out=out, stores=stores, workers=workers)


# --- keys, from the commands ---


def _harvest_keys() -> dict[str, _Key]:
    return {
        name: _Key(kind=kind, many=many, is_listed=False, default=default)
        for name, kind, many, default in _parameters(harvest)
        if name not in ("dry_run", "extend")
    }


def _fit_keys() -> dict[str, _Key]:
    """On the command line a list is text with commas; here each value has the type of its field."""
    fields = get_type_hints(FitConfig)
    keys = {}
    for name, kind, many, default in _parameters(fit):
        field = FIELDS.get(name, name)
        if field in fields:
            kind, many = _plain(fields[field])
        keys[name] = _Key(kind=kind, many=many, is_listed=field in fields, default=default)
    del keys["follow"]  # the harvests are complete by then
    del keys["cache_dir"], keys["cache_size"]  # of the machine: flags of the command
    return keys


def _parameters(command: Callable[..., Any]) -> list[tuple[str, type, bool, Any]]:
    """Name, type, whether it may be given several times, and default of a command's parameters."""
    hints = get_type_hints(command)
    return [
        (name, *_plain(hints[name]), parameter.default)
        for name, parameter in inspect.signature(command).parameters.items()
    ]


def _plain(hint: Any) -> tuple[type, bool]:
    """int of `int`, `int | None`, `list[int]` and `tuple[int, ...]`, and whether it was a list."""
    if get_origin(hint) is types.UnionType:
        [hint] = [each for each in get_args(hint) if each is not types.NoneType]
    if get_origin(hint) in (list, tuple):
        return get_args(hint)[0], True
    assert isinstance(hint, type)
    return hint, False


class _Table:
    """One table of a file, its keys checked."""

    def __init__(
        self, file: Path, name: str, given: Mapping[str, Any], keys: Mapping[str, _Key]
    ) -> None:
        self._where, self._keys = f"[{name}] of {file}", keys
        unknown = sorted(given.keys() - keys.keys())
        if unknown:
            raise InputError(
                f"{unknown[0]} in {self._where} is not known. Known are: {', '.join(keys)}."
            )
        self._given = {key: self._value(key, value) for key, value in given.items()}

    def given_values(self) -> dict[str, Any]:
        """What the file says."""
        return dict(self._given)

    def all_values(self) -> dict[str, Any]:
        """What the file says, and the command's defaults."""
        return {name: self._given.get(name, self._default(name)) for name in self._keys}

    def defaults_beside(self, config: type) -> dict[str, Any]:
        """The command's defaults for what the file leaves out and a config has no default for."""
        return {
            name: self._default(name)
            for name, key in self._keys.items()
            if name not in self._given
            and key.is_listed
            and not hasattr(config, FIELDS.get(name, name))
        }

    def _default(self, name: str) -> Any:
        default = self._keys[name].default
        if default is inspect.Parameter.empty and name not in self._given:
            raise InputError(f"{name} is missing in {self._where}.")
        return default

    def _value(self, name: str, value: Any) -> Any:
        key = self._keys[name]
        if key.many:
            values = [
                self._one(name, each) for each in (value if isinstance(value, list) else [value])
            ]
            return tuple(values) if key.is_listed else values
        if key.is_listed and isinstance(value, list):
            if not value:
                raise InputError(f"{name} in {self._where} is an empty list. Give it a value.")
            return [self._one(name, each) for each in value]
        return self._one(name, value)

    def _one(self, name: str, value: Any) -> Any:
        kind = self._keys[name].kind
        if name == "lr" and value == "auto":
            return value
        if kind is float and type(value) is int:
            return float(value)
        if kind is Path and type(value) is str:
            return expanded(value)
        if type(value) is not kind:
            several = " or a list of them" if self._keys[name].is_listed else ""
            raise InputError(
                f"{name} in {self._where} is {value!r}, and has to be {_KINDS[kind]}{several}."
            )
        return value
