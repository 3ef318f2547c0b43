"""What processes that fit an SAE together have to be given, and alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..storage import ActivationStore
from ..storage.errors import InputError
from .fitconfig import FitConfig
from .parallel import Group


def check_together(store: ActivationStore, configs: Sequence[FitConfig], group: Group) -> None:
    """InputError for what several processes cannot do together."""
    if group.is_alone:
        return
    if store.pin:
        raise InputError(
            f"Several processes fit from a complete store only, and {store.path} is taken as it is "
            "written. Wait until its harvest is complete, or fit by a single process."
        )
    for config in configs:
        if config.batch_size % group.world_size:
            raise InputError(
                f"--batch-size {config.batch_size} cannot be shared evenly by {group.world_size} "
                f"processes. Pass a multiple of {group.world_size}."
            )
        if config.resample_steps is not None:
            raise InputError(
                "--resample-steps draws rows from the batch of a single process. Leave it out, or "
                "fit without torchrun."
            )


def check_given_alike(recipes: Mapping[Path, dict[str, Any]], group: Group) -> None:
    """InputError on all processes unless they were given the same.

    recipes: of each run folder.
    """
    given: dict[str, Any] = {"torch": torch.__version__, "--out": list(map(str, recipes))}
    for path, recipe in recipes.items():
        of_which = f" of {path}" if len(recipes) > 1 else ""
        given |= {name + of_which: value for name, value in recipe.items()}
    group.check_alike(
        json.loads(json.dumps(given)),
        "Start all processes of a fit with the same command, store and versions.",
    )
