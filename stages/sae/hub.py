"""Runs on the Hub: the two files of an SAE, fetched once and kept in the Hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...storage.errors import InputError, StoreError
from ..hub_address import is_hub, parse_hub
from .weights import CONFIG_LIMIT_BYTES, read_config, rebuild_sae, weights_limit_bytes

if TYPE_CHECKING:
    from ..hub_repo import Repository


def run_folder(run: str | Path) -> Path:
    """A run folder here: the path itself, or what hf://USER/REPO[@REVISION][/FOLDER] holds.

    Of a repository config.json and sae.safetensors are fetched and nothing else, the weights only
    when they are as long as the config asks for. Raises InputError, NetworkError, StoreError.
    """
    return Path(run) if not is_hub(run) else pinned_run(str(run))[0]


def pinned_run(address: str) -> tuple[Path, str]:
    """The run folder that an address of the Hub holds, and the address with its commit."""
    from ..hub_repo import open_repository  # here: the Hub's client takes a while to import

    repository = open_repository(parse_hub(address))
    return fetch_run(repository), repository.pinned


def fetch_run(repository: Repository) -> Path:
    """The same for a repository that was found already."""
    place = repository.place
    if "config.json" not in repository.sizes(["config.json"]):
        raise InputError(
            f"{place} holds no SAE of sae-pipe: it has no config.json. If it holds one of another "
            f"tool, `sae-pipe import {place} --out RUN` makes a run of it."
        )
    folder = repository.fetch("config.json", CONFIG_LIMIT_BYTES).parent
    try:
        sae = rebuild_sae(read_config(folder).get("sae"))
    except (StoreError, ValueError) as error:
        raise InputError(
            f"{place} holds no SAE of sae-pipe: its config.json is that of something else. If it "
            f"is one of another tool, `sae-pipe import {place} --out RUN` makes a run of it."
        ) from error
    return repository.fetch("sae.safetensors", weights_limit_bytes(sae)).parent
