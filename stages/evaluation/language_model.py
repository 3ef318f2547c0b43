"""The language model that a store's rows come from, found again for metrics over text."""

from __future__ import annotations

from pathlib import Path

import torch

from ...storage import ActivationStore
from ...storage.errors import InputError
from ..devices import pick_dtype
from ..models import ModelInfo, check_layer, inspect_model, load_full
from .patched import PatchedModel


def find_model(store: ActivationStore, given: str | None) -> ModelInfo:
    """The model of a store, looked at by its configuration; given: where it lies, if not as
    recorded.

    Raises InputError where it cannot be found or is not the model that the store names.
    """
    recipe = store.recipe
    try:
        name, revision = str(recipe["model"]["name"]), str(recipe["model"]["revision"])
        layer, hook = int(recipe["layer"]), str(recipe["hook"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"Store {store.path} does not say which model, layer and hook its rows come from, so "
            "metrics that need the language model are not possible. Leave them out."
        ) from None
    was_folder = revision.startswith("sha256:")
    if given is None and was_folder:
        raise InputError(
            f"Store {store.path} was harvested from a local folder {name}. Pass it as --model, or "
            "leave out the metrics that need the language model."
        )
    if given is None or not Path(given).is_dir():
        info = inspect_model(given or name, None if was_folder else revision)
    else:
        info = inspect_model(given)
    if info.revision != revision and was_folder == (info.commit is None):
        raise InputError(
            f"Store {store.path} was harvested from {name} at {revision}, but --model {given} is "
            f"{info.revision}. Pass the model that it was harvested from."
        )
    check_layer(info, [layer], hook)
    return info


def load_patched(
    store: ActivationStore, info: ModelInfo, device: torch.device, dtype: str
) -> PatchedModel:
    """The model with its head, ready to be patched at the store's layer and hook."""
    layer, hook = int(store.recipe["layer"]), str(store.recipe["hook"])
    return PatchedModel(load_full(info, layer, hook, device, pick_dtype(dtype, device)))
