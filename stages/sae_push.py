"""A fitted SAE to a model repository of the Hub, with its card, and back as a run folder.

One commit: a reader sees all of it or the one before. The run stands at the root, as on disk but without
paths and the command line of this machine; a folder for each other tool's format stands beside it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from ..storage.errors import InputError, NetworkError, StoreError
from .hub_address import HubPlace, parse_hub
from .hub_repo import Repository, hub_is_reachable, no_network, open_repository
from .hub_repo import told as told_by_hub
from .rundir import METRICS_LIMIT_BYTES, RunFolder
from .sae.hub import fetch_run
from .sae.weights import CONFIG_LIMIT_BYTES, read_config
from .sae_card import MARKER, Card, check_licence
from .sae_export import load_with_facts, write_folder
from .sae_formats import FORMATS, get_format
from .sae_formats.facts import portable
from .whole_folder import check_free, whole_folder

DEFAULT_FORMATS = ("saelens", "dictionary_learning")
README = "README.md"
_README_LIMIT_BYTES = 1 << 20
_AS_THEY_ARE = ("sae.safetensors", "summary.json", "metrics.jsonl", "curve.png")
# Of a repository, what `pull` takes beside config.json and sae.safetensors, and how large it can be.
_ALSO_PULLED = {
    "summary.json": CONFIG_LIMIT_BYTES,
    "metrics.jsonl": METRICS_LIMIT_BYTES,
    README: _README_LIMIT_BYTES,
}

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """One push. formats: None for those of DEFAULT_FORMATS that hold the SAE; private: of a
    repository that is made now; licence: an identifier of the Hub, None to leave it open."""

    run: Path
    address: str
    formats: tuple[str, ...] | None = None
    private: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        for format in self.formats or ():
            if format not in FORMATS:
                raise InputError(
                    f"Unknown format {format!r} in --formats: choose from {', '.join(FORMATS)}."
                )
        if not check_licence(self.licence):
            raise InputError(
                f"--license is {self.licence!r}, which is no identifier of a licence on the Hub. "
                "Pass one such as apache-2.0 or cc-by-4.0."
            )
        if self.place.revision is not None or self.place.folder:
            raise InputError(
                f"{self.address} names a revision or a folder, and a push goes to the root of the "
                f"main branch. Pass hf://{self.place.repo}."
            )

    @property
    def place(self) -> HubPlace:
        return parse_hub(self.address)


def push_sae(config: PushConfig, *, say: Say = print) -> str:
    """Publish the SAE of a run; returns the address of the commit, hf://USER/REPO@COMMIT.

    What cannot be held or read is found before anything is sent. A README.md in the repository that
    is not a generated card stays. Raises InputError, StoreError, NetworkError.
    """
    with tempfile.TemporaryDirectory(prefix="sae-pipe-push-") as scratch:
        files, card = _prepare(config, Path(scratch))
        place = config.place
        if not hub_is_reachable():
            raise no_network(place)
        with told_by_hub(place):
            huggingface_hub.HfApi().create_repo(
                place.repo, private=config.private or None, exist_ok=True
            )
        there = open_repository(place)
        if _has_own_readme(there):
            say(f"The README.md of {place} is your own, and stays as it is.")
        else:
            files[README] = card.encode()
        commit = _commit(config, files, there)
    address = str(HubPlace(repo=place.repo, revision=commit))
    say(f"{config.run} is at {place} now, as {address}: {', '.join(sorted(files))}.")
    return address


def _prepare(config: PushConfig, scratch: Path) -> tuple[dict[str, bytes | Path], str]:
    """Everything to be sent, by its path in the repository, and the card."""
    run = RunFolder(config.run)
    sae, facts = load_with_facts(config.run)
    own = json.dumps(portable(read_config(config.run)), indent=1, allow_nan=False) + "\n"
    files: dict[str, bytes | Path] = {"config.json": own.encode()}
    for name in _AS_THEY_ARE:
        if (run.path / name).is_symlink():
            raise InputError(
                f"{run.path / name} is a link, and what a run folder holds is published. Put the "
                "file itself there, or remove the link."
            )
        if (run.path / name).is_file():
            files[name] = run.path / name
    folders: dict[str, str] = {}
    refused: dict[str, str] = {}
    for format in DEFAULT_FORMATS if config.formats is None else config.formats:
        try:
            inside = write_folder(sae, facts, format, scratch / format)
        except InputError as error:
            if config.formats is not None:
                raise
            refused[format] = str(error)
            continue
        folders[format] = str(inside.relative_to(scratch))
        for file in inside.iterdir():
            files[str(file.relative_to(scratch))] = file
    card = Card(
        repo=config.place.repo,
        sae=sae,
        facts=facts,
        summary=run.summary(),
        folders=folders,
        refused=refused,
        has_curve="curve.png" in files,
        licence=config.licence,
    )
    return files, card.text()


def _has_own_readme(there: Repository) -> bool:
    if README not in there.sizes([README]):
        return False
    return MARKER not in there.fetch(README, _README_LIMIT_BYTES).read_text(errors="replace")


def _commit(config: PushConfig, files: dict[str, bytes | Path], there: Repository) -> str:
    """Send files and take away what an earlier push left for formats that are not among them."""
    weights = {format: f"{format}/{get_format(format).weights_file}" for format in FORMATS}
    sent = {path.partition("/")[0] for path in files}
    old = there.sizes([path for format, path in weights.items() if format not in sent])
    operations: list[Any] = [
        huggingface_hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
        for path, content in sorted(files.items())
    ]
    operations += [
        huggingface_hub.CommitOperationDelete(path_in_repo=f"{path.partition('/')[0]}/")
        for path in old
    ]
    try:
        with told_by_hub(config.place):
            commit = huggingface_hub.HfApi().create_commit(
                config.place.repo,
                operations,
                commit_message=f"sae-pipe: {config.run.resolve().name}",
            )
    except RuntimeError as error:  # of the client, whatever breaks off while a file is sent
        raise NetworkError(
            f"The upload to {config.place} broke off ({error}). Nothing of it is published; run "
            "the same command again."
        ) from error
    except ValueError as error:
        if isinstance(error, InputError) or "README.md" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"The Hub refuses the card ({reason}). Pass another --license.") from error
    return str(commit.oid)


def pull_sae(address: str, out: Path, *, say: Say = print) -> Path:
    """A run folder of what `push_sae` published; returns it.

    JSON, safetensors and the card are fetched, each only when it is no larger than it can be.
    Raises InputError (also when `out` exists), StoreError for damaged files, NetworkError.
    """
    check_free(out)
    repository = open_repository(parse_hub(address))
    folder = fetch_run(repository)
    names = ["config.json", "sae.safetensors"]
    for name, limit in _ALSO_PULLED.items():
        if name in repository.sizes([name]):
            repository.fetch(name, limit)
            names.append(name)
    with whole_folder(out) as unfinished:
        for name in names:
            shutil.copyfile(folder / name, unfinished / name)
        try:
            sae, _ = load_with_facts(unfinished)
        except StoreError as error:
            raise StoreError(str(error).replace(str(unfinished), str(repository.place))) from error
    say(
        f"{out} holds the run of {repository.pinned}: d_in={sae.d_in}, d_sae={sae.d_sae}, "
        f"{', '.join(names)}."
    )
    return out


def parse_formats(text: str | None) -> Sequence[str] | None:
    """The formats of a comma-separated list; `none` is an empty one."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [] if names == ["none"] else names
