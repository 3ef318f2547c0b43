"""The SAEs behind results: where their run folders and stores are, and what their latents fire on."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...storage import ActivationStore, open_store
from ...storage.address import Place, place
from ...storage.errors import InputError, SaePipeError
from ...storage.files import file_digest
from ..compare.choose import Judgement
from ..latents import Survey, survey_latents
from ..sae import load_sae
from ..sae.hub import run_folder

WEIGHTS, CONFIG = "sae.safetensors", "config.json"
_MOST_NAMED = 24  # latents that absorption names, beside the spread

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report shows of each SAE's latents. rows: held-out rows to look at; None is all.

    latents 0: no pages of latents.
    """

    latents: int = 24
    examples: int = 6
    rows: int | None = 100_000

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--latents", self.latents, 0),
            ("--examples", self.examples, 1),
            ("--rows", self.rows, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{flag} must be at least {least}, not {value}.")


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """An SAE's latents, or why there are none to show. roles: what absorption calls a latent."""

    run: Judgement
    survey: Survey | None = None
    why_not: str = ""
    store: str = ""
    note: str = ""
    roles: Mapping[int, list[str]] = field(default_factory=dict)


def folders_by_digest(places: Sequence[str | Path]) -> dict[str, Path]:
    """Run folders by the SHA-256 of their weights. places: run folders, folders of run folders, or
    hf://USER/REPO.

    InputError where there is none.
    """
    found: dict[str, Path] = {}
    for given in map(run_folder, places):
        folders = [given] if (given / CONFIG).is_file() else sorted(given.glob("*/"))
        folders = [
            each for each in folders if (each / CONFIG).is_file() and (each / WEIGHTS).is_file()
        ]
        if not folders:
            raise InputError(
                f"There is no finished run at {given}. Pass run folders of `sae-pipe fit`, or a "
                "folder of them, as --runs."
            )
        found |= {file_digest(folder / WEIGHTS): folder for folder in folders}
    return found


class Saes:
    """Finds and surveys the SAEs of results, one at a time."""

    def __init__(self, folders: Mapping[str, Path], store: Place | None, options: Options) -> None:
        """folders: of --runs, by digest; store: of --store, for all runs, else each its own."""
        self._folders, self._store, self._options = folders, store, options
        self._opened: dict[Place, ActivationStore] = {}
        if store is not None:
            self._open(store)  # what the user has named has to be there

    def survey(self, run: Judgement) -> Surveyed:
        """What can be shown of a run; what is missing is said, and is no error."""
        if self._options.latents == 0:
            return Surveyed(run=run, why_not="Latents were not asked for.")
        try:
            folder = self._folder(run)
            store = self._open(self._store or self._recorded_store(run))
            roles = absorption_roles(run)
            sae = load_sae(folder)
            found = survey_latents(
                sae,
                store,
                count=self._options.latents,
                also=[latent for latent in roles if latent < sae.d_sae],
                examples=self._options.examples,
                max_rows=self._options.rows,
            )
        except SaePipeError as error:
            return Surveyed(run=run, why_not=str(error))
        note = ""
        if store.digest != run.facts.get("store_digest"):
            note = "The rows are not those of the store that this SAE was fitted from."
        return Surveyed(run=run, survey=found, store=store.name, note=note, roles=roles)

    def _folder(self, run: Judgement) -> Path:
        digest = str(run.facts.get("sae_sha256"))
        if digest in self._folders:
            return self._folders[digest]
        folder = run_folder(str(run.facts.get("path")))
        if not (folder / WEIGHTS).is_file():
            raise InputError(
                f"Its run folder {folder} is not there. Pass where it is now as --runs."
            )
        if file_digest(folder / WEIGHTS) != digest:
            raise InputError(
                f"The weights in {folder} are not those that were judged. Judge them again, or pass "
                "the run folder as --runs."
            )
        return folder

    def _recorded_store(self, run: Judgement) -> Place:
        recorded = run.facts.get("store")
        if not isinstance(recorded, str):
            raise InputError(
                "Its result does not say which store it was fitted from. Pass --store."
            )
        return place(recorded)

    def _open(self, path: Place) -> ActivationStore:
        if path not in self._opened:
            self._opened[path] = open_store(path, unfinished=True)
        return self._opened[path]


def absorption_roles(run: Judgement) -> dict[int, list[str]]:
    """Latents that absorption names: the main ones of a letter, and those that most often carry a
    letter in the main ones' place. In order of letters, as many of each."""
    main: dict[int, list[str]] = {}
    absorbing: Counter[tuple[int, str]] = Counter()
    for (metric, _), entry in run.entries.items():
        if metric != "absorption":
            continue
        for concept in _mappings(entry.details.get("concepts")):
            name = str(concept.get("concept", "?"))
            for latent in concept.get("main") or []:
                if _is_latent(latent):
                    main.setdefault(latent, []).append(f"main latent of {name}")
            for word in _mappings(concept.get("absorbed")):
                if _is_latent(word.get("latent")):
                    absorbing[word["latent"], name] += 1
    roles = dict(list(main.items())[: _MOST_NAMED // 2])
    for (latent, name), _ in absorbing.most_common(_MOST_NAMED):
        if latent in roles or len(roles) < _MOST_NAMED:
            roles.setdefault(latent, []).append(f"absorbs {name}")
    return roles


def _is_latent(value: Any) -> bool:
    return type(value) is int and value >= 0


def _mappings(values: Any) -> Iterable[Mapping[str, Any]]:
    return (v for v in values if isinstance(v, Mapping)) if isinstance(values, list) else ()
