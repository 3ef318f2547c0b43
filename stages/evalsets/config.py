"""What an evaluation set is asked to be: the flags of `sae-pipe eval-set build`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...storage.address import Place, described
from ...storage.errors import InputError
from ...storage.files import file_digest
from ..taps import DEFAULT_HOOK
from . import SUITES, Suite, get_suite


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One evaluation set.

    suite: of SUITES; seed, position: None for the suite's own; limit: what SUITES says it counts;
    tasks: names of those to build, all if there are none; context_size: longest text in tokens,
    None for the smaller of 1024 and the model's maximum; truncate: texts of `csv` that are longer
    lose their beginning instead of being refused; store, text: where `core` gets its text from.
    """

    model: str
    layer: int
    suite: str
    out: Path
    hook: str = DEFAULT_HOOK
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int | None = None
    limit: int | None = None
    position: str | None = None
    tasks: tuple[str, ...] = ()
    context_size: int | None = None
    csv: Path | None = None
    text_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    marked_column: str | None = None
    ood_csv: Path | None = None
    truncate: bool = False
    store: Place | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        """InputError for flags that no suite, or not this one, can do anything with."""
        suite = get_suite(self.suite)
        for flag, suites in _ONLY_FOR.items():
            if getattr(self, flag) and self.suite not in suites:
                raise InputError(
                    f"--{flag.replace('_', '-')} belongs to {' and '.join(suites)}, and "
                    f"{_spelt(self.suite)} was asked for. Leave it out."
                )
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit is {self.limit}, and has to be 1 or more.")
        if self.context_size is not None and self.context_size < 2:
            raise InputError(
                f"--context-size is {self.context_size}, and has to be at least 2: the first "
                "position is an attention sink."
            )
        if self.position is not None and self.position not in suite.poolings:
            raise InputError(
                f"--position {self.position} is not known to suite {self.suite}. "
                f"Pass one of {', '.join(suite.poolings)}, or leave it out."
            )
        if self.suite == "csv":
            self._check_csv()
        if self.suite == "core" and (self.store is None) == (self.text is None):
            raise InputError(
                "Suite core needs text: pass --store with a store whose held-out text serves, or "
                "--text with text files or a dataset, one of them."
            )

    def _check_csv(self) -> None:
        needed = {"--csv": self.csv, "--text-column": self.text_column}
        needed["--label-column"] = self.label_column
        missing = [flag for flag, value in needed.items() if value is None]
        if missing:
            raise InputError(
                f"Labelled texts need --csv, --text-column and --label-column. Pass "
                f"{' and '.join(missing)}, too."
            )
        if (self.pooling == "marked") != (self.marked_column is not None):
            raise InputError(
                "--position marked and --marked-column belong together: the column has the word "
                "of each text whose activation is taken. Pass both or neither."
            )

    @property
    def kind(self) -> Suite:
        """The suite."""
        return get_suite(self.suite)

    @property
    def pooling(self) -> str:
        """Which rows an item has: of POOLINGS in storage/evalset.py."""
        return self.position or self.kind.poolings[0]

    @property
    def drawn_with(self) -> int:
        """The seed of every draw."""
        return self.kind.seed if self.seed is None else self.seed

    def request(self) -> dict[str, Any]:
        """What was asked for, flag by flag: compared when the command runs again.

        Left out is what does not change a row: where it is written, and the device.
        """
        asked = asdict(self)
        for name in ("out", "device"):
            del asked[name]
        asked |= {"tasks": list(self.tasks), "seed": self.drawn_with, "position": self.pooling}
        for name in ("model", "csv", "ood_csv", "text"):
            asked[name] = _whole_path(asked[name])
        asked["store"] = None if self.store is None else described(self.store)
        for name, path in (("csv", self.csv), ("ood_csv", self.ood_csv)):
            if path is not None and path.is_file():  # an edited file is another one
                asked[f"{name}_sha256"] = file_digest(path)
        return asked


_TEXT_COLUMN, _CSV = ("csv", "core"), ("csv",)
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "csv": _CSV,
    "text_column": _TEXT_COLUMN,
    "label_column": _CSV,
    "group_column": _CSV,
    "marked_column": _CSV,
    "ood_csv": _CSV,
    "truncate": _CSV,
    "store": ("core",),
    "text": ("core",),
    "tasks": ("ood", "probes"),
}


def _spelt(suite: str) -> str:
    return "--csv" if suite == "csv" else f"--suite {suite}"


def _whole_path(name: Any) -> str | None:
    """A local path is one place however it is spelt and from wherever the command is run."""
    if name is None:
        return None
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)


def suites_of_help() -> str:
    """SUITES for the command's help."""
    return "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items()) + "."
