"""Weights & Biases: project `sae-pipe`, unless WANDB_PROJECT names another. WANDB_MODE=offline
needs no network and no account."""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ...storage.errors import InputError
from ...storage.files import json_digest
from .base import Logger


class Wandb(Logger):
    """One run of Weights & Biases for a run folder, gone on with when the run is."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], step: int) -> None:
        wandb: Any = import_module("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sae-pipe"),
                name=folder.name,
                # The same for the same run, which goes on after a kill.
                id=json_digest([str(folder.resolve()), {k: str(v) for k, v in recipe.items()}])[
                    :16
                ],
                resume="allow",
                reinit="create_new",  # SAEs of a sweep have a run each, all open at once
                dir=str(folder),
                config=dict(recipe),
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            raise InputError(
                f"wandb could not begin ({error}). Run `wandb login`, set WANDB_MODE=offline, or "
                "leave it out of --log-to."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
