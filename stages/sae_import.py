"""An SAE of another tool, from a folder or the Hub, as a run folder.

The format is known by the names of files. Nothing of a stranger's folder is believed: see
sae_formats/files.py. Of a repository only the two files of the SAE are fetched, the config first, and
the weights only when their size is one that the config allows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..storage import provenance
from ..storage.errors import InputError
from ..storage.files import write_json
from .hub_repo import HubPlace, Repository, is_hub, open_repository, parse_hub
from .sae.base import Sae
from .sae.weights import CONFIG_LIMIT_BYTES, is_run_config, write_weights
from .sae_formats import FORMATS, get_format
from .sae_formats.base import SaeFormat
from .sae_formats.facts import Facts, config_of
from .sae_formats.files import largest_bytes, read_json
from .whole_folder import check_free, whole_folder

_MOST_FOLDERS = 10_000
_LARGEST_WITHOUT_CONFIG = 1 << 36

Say = Callable[[str], object]


def import_sae(
    source: str,
    out: Path,
    *,
    format: str | None = None,
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    say: Say = print,
) -> Path:
    """Make a run folder of an SAE; returns it.

    source: a folder, a .safetensors file, or hf://USER/REPO[@REVISION][/FOLDER]. format: None is
    known by the files. model, layer, hook: of the activations, where the files do not say. Raises
    InputError, one sentence, for whatever cannot be read or held; NetworkError.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"Unknown --format {format!r}: choose one of {', '.join(FORMATS)}.")
    check_free(out)
    if is_hub(source):
        place = parse_hub(source)
        form, folder, origin = _fetch(place, format)
    else:
        form, folder = _find(Path(source), format)
        origin = str(source)
    sae, facts = form.read(folder)
    facts = facts.filled(model=model, layer=layer, hook=hook)
    write_run(sae, facts, out, {"from": origin, "format": form.name})
    description = config_of(sae, facts)["sae"]
    known = [str(facts.model or "model not said"), f"layer {facts.layer}", str(facts.hook)]
    k = f", k={sae.k}" if sae.k is not None else ""
    say(
        f"{out} holds the {description['architecture']} SAE of {origin}, read as {form.name}: "
        f"d_in={sae.d_in}, d_sae={sae.d_sae}{k} ({', '.join(known)})."
    )
    return out


def write_run(sae: Sae, facts: Facts, out: Path, origin: dict[str, Any]) -> None:
    """A run folder of an SAE that was not fitted here: config.json and sae.safetensors."""
    config = config_of(sae, facts)
    imported = dict(facts.imported) | origin | {"at": provenance.now()}
    with whole_folder(out) as unfinished:
        write_json(unfinished / "config.json", config | {"imported": imported})
        write_weights(sae, unfinished)


# --- a folder here ---


def _find(path: Path, format: str | None) -> tuple[SaeFormat, Path]:
    """The format of a path, and the folder that its files are in."""
    if not path.exists():
        raise InputError(f"There is nothing at {path}. Pass a folder, or hf://USER/REPO.")
    if path.is_file():
        return _of_file(path, format)
    forms = [get_format(format)] if format is not None else _all_formats()
    found = _format_in(path, forms)
    if found is not None:
        return found, path
    _refuse_a_run(path)
    inside = _folders_in(path, forms)
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(sorted(folder.name for _, folder in inside)[:10])
        raise InputError(f"{path} holds {len(inside)} SAEs. Pass one of them: {names}.")
    known = "; ".join(f"{name}: {_files_of(form)}" for name, form in _by_name(forms).items())
    raise InputError(f"{path} holds no SAE that is known by its files ({known}).")


def _of_file(path: Path, format: str | None) -> tuple[SaeFormat, Path]:
    form = get_format("safetensors" if format is None else format)
    if path.name != form.weights_file:
        raise InputError(
            f"{path} is a file, and what is read is a folder with {_files_of(form)}. "
            "Pass the folder that it is in."
        )
    return form, path.parent


def _folders_in(path: Path, forms: list[SaeFormat]) -> list[tuple[SaeFormat, Path]]:
    found = []
    for number, each in enumerate(path.iterdir()):
        if number >= _MOST_FOLDERS:
            raise InputError(f"{path} has more than {_MOST_FOLDERS:,} entries. Pass one SAE of it.")
        form = _format_in(each, forms) if each.is_dir() else None
        if form is not None:
            found.append((form, each))
    return found


def _format_in(folder: Path, forms: list[SaeFormat]) -> SaeFormat | None:
    names = {form.weights_file for form in forms} | {form.config_file for form in forms}
    there = {name for name in names if name and (folder / name).is_file()}
    return next((form for form in forms if form.is_in(there)), None)


def _refuse_a_run(path: Path) -> None:
    file = path / "config.json"
    if file.is_file() and is_run_config(read_json(file)):
        raise InputError(f"{path} is a run of sae-pipe already: it needs no import.")


def _all_formats() -> list[SaeFormat]:
    """In the order of the registry: the first that fits is it."""
    return [get_format(name) for name in FORMATS]


def _by_name(forms: list[SaeFormat]) -> dict[str, SaeFormat]:
    return {form.name: form for form in forms}


def _files_of(form: SaeFormat) -> str:
    names = [name for name in (form.config_file, form.weights_file) if name]
    return " and ".join(names)


# --- the Hub ---


def _fetch(place: HubPlace, format: str | None) -> tuple[SaeFormat, Path, str]:
    """The format of a repository's folder, and a folder here with its two files."""
    repository = open_repository(place)
    forms = [get_format(format)] if format is not None else _all_formats()
    names = {form.weights_file for form in forms} | {form.config_file for form in forms} - {""}
    sizes = repository.sizes(sorted(names - {""}))
    form = next((form for form in forms if form.is_in(set(sizes))), None)
    if form is None:
        raise _not_there(place, repository, sizes, forms)
    limit = _LARGEST_WITHOUT_CONFIG
    if form.config_file:
        folder = repository.fetch(form.config_file, CONFIG_LIMIT_BYTES).parent
        found = form.sizes(folder)
        assert found is not None  # a format with a config knows the size from it
        limit = largest_bytes(*found)
    folder = repository.fetch(form.weights_file, limit).parent
    return form, folder, repository.pinned


def _not_there(
    place: HubPlace, repository: Repository, sizes: dict[str, int], forms: list[SaeFormat]
) -> InputError:
    if "config.json" in sizes:
        config = repository.fetch("config.json", CONFIG_LIMIT_BYTES)
        if is_run_config(read_json(config)):
            return InputError(
                f"{place} holds a run of sae-pipe, which needs no import. Fetch it with "
                f"`sae-pipe sae pull {place} DIR`."
            )
    known = "; ".join(_files_of(form) for form in forms)
    return InputError(
        f"{place} holds no SAE that is known by its files ({known}). Pass the folder of one: "
        f"{place}/FOLDER."
    )
