"""The language model that activations come from, found again for metrics over text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...storage.errors import InputError
from ..devices import pick_dtype
from ..models import ModelInfo, check_layer, inspect_model, load_full
from .patched import PatchedModel


def find_model(recipe: Mapping[str, Any], where: str, given: str | None) -> ModelInfo:
    """The model of a recipe, looked at by its configuration.

    where: whose recipe it is, as "Store acts.zarr"; given: where the model lies, if not as recorded.
    Raises InputError where it cannot be found or is not the model that the recipe names.
    """
    try:
        name, revision = str(recipe["model"]["name"]), str(recipe["model"]["revision"])
        layer, hook = int(recipe["layer"]), str(recipe["hook"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{where} does not say which model, layer and hook its rows come from, so metrics "
            " that need the language model are not possible. Leave them out."
        ) from None
    was_folder = revision.startswith("sha256:")
    if given is None and was_folder:
        raise InputError(
            f"{where} was made with a local folder {name}. Pass it as --model, or "
            "leave out the metrics that need the language model."
        )
    if given is None or not Path(given).is_dir():
        info = inspect_model(given or name, None if was_folder else revision)
    else:
        info = inspect_model(given)
    if info.revision != revision and was_folder == (info.commit is None):
        raise InputError(
            f"{where} was made with {name} at {revision}, but --model {given} is "
            f"{info.revision}. Pass the model that it was made with."
        )
    check_layer(info, [layer], hook)
    return info


def load_patched(
    recipe: Mapping[str, Any], info: ModelInfo, device: torch.device, dtype: str
) -> PatchedModel:
    """The model with its head, ready to be patched at a recipe's layer and hook."""
    layer, hook = int(recipe["layer"]), str(recipe["hook"])
    return PatchedModel(load_full(info, layer, hook, device, pick_dtype(dtype, device)))
