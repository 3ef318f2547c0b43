"""What is known of an SAE beside its weights: the model, the place in it, how it was fitted.

A run's config.json has all of it. What travels is that config without what belongs to one machine;
where an SAE comes from another tool, a config of the same shape is made from the little it says.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...storage.errors import InputError
from ..hub_address import SCHEME
from ..sae.base import Sae
from ..sae.weights import FORMAT, FORMAT_VERSION, describe_sae
from ..taps import HOOKS

_LONGEST_TEXT = 1000  # of a name that another tool's file gives
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """None is what nobody has said.

    model: as a store's recipe names it; family: its architecture, such as gpt_neox; hook: one of
    HOOKS; run: the config.json of a run as it may travel, empty for an SAE of another tool;
    imported: what another tool's file said, for the record.
    """

    model: str | None = None
    model_revision: str | None = None
    family: str | None = None
    layer: int | None = None
    hook: str | None = None
    context_size: int | None = None
    prepends_bos: bool | None = None
    seed: int | None = None
    steps: int | None = None
    lr: float | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    imported: Mapping[str, Any] = field(default_factory=dict)

    def filled(self, *, model: str | None, layer: int | None, hook: str | None) -> Facts:
        """With what the user says in addition. Raises InputError where the run says otherwise."""
        if hook is not None and hook not in HOOKS:
            raise InputError(f"Hook {hook!r} is not known. Pass one of {', '.join(HOOKS)}.")
        if layer is not None and layer < 0:
            raise InputError(
                f"--layer is {layer}, but layers count from 0. Pass the block's number."
            )
        given = {"model": model, "layer": layer, "hook": hook}
        for name, value in given.items():
            known = getattr(self, name)
            if value is not None and known is not None and value != known:
                raise InputError(
                    f"--{name} is {value!r}, but the run was fitted with {known!r}. "
                    f"Leave --{name} out."
                )
        return replace(
            self,
            model=self.model if model is None else model,
            layer=self.layer if layer is None else layer,
            hook=self.hook if hook is None else hook,
        )


def facts_of(config: Mapping[str, Any]) -> Facts:
    """The facts in a run's config.json; whatever is not what it should be counts as not said."""
    recipe, resolved = section(config, "recipe"), section(config, "resolved")
    of_store = section(section(config, "store"), "recipe")
    model, corpus = section(of_store, "model"), section(of_store, "corpus")
    hook = text(of_store, "hook")
    return Facts(
        model=text(model, "name"),
        model_revision=text(model, "revision"),
        family=text(model, "architecture"),
        layer=number(of_store, "layer"),
        hook=hook if hook in HOOKS else None,
        context_size=number(section(corpus, "config"), "context_size"),
        prepends_bos=truth(section(corpus, "tokenizer"), "prepends_bos"),
        seed=number(recipe, "seed"),
        steps=number(resolved, "steps"),
        lr=real(resolved, "lr"),
        run=portable(config) if recipe else {},
        imported=_without_path(section(config, "imported")),
    )


def portable(config: Mapping[str, Any]) -> Json:
    """A run's config without paths, flags and command line of the machine it was fitted on.

    A store on the Hub keeps its address: there others find it, too.
    """
    kept = copy.deepcopy(dict(config))
    store = section(kept, "store")
    if not str(store.get("path")).startswith(SCHEME):
        store.pop("path", None)
    section(kept, "provenance").pop("command", None)
    kept.pop("free", None)
    if "imported" in kept:
        kept["imported"] = _without_path(section(kept, "imported"))
    return kept


def _without_path(imported: Json) -> Json:
    """What an import recorded, without a folder of the machine it was made on."""
    is_path = not str(imported.get("from", SCHEME)).startswith(SCHEME)
    return {name: value for name, value in imported.items() if name != "from" or not is_path}


def config_of(sae: Sae, facts: Facts) -> Json:
    """A config.json for the SAE, from which `facts_of` reads the same facts again."""
    config = copy.deepcopy(dict(facts.run))
    config |= {"format": FORMAT, "format_version": FORMAT_VERSION, "sae": describe_sae(sae)}
    if facts.imported:
        config["imported"] = dict(facts.imported)
    if not facts.run:
        _put(config, ("recipe", "seed"), facts.seed)
        _put(config, ("resolved", "steps"), facts.steps)
        _put(config, ("resolved", "lr"), facts.lr)
    of_store = ("store", "recipe")
    _put(config, (*of_store, "model", "name"), facts.model)
    _put(config, (*of_store, "model", "revision"), facts.model_revision)
    _put(config, (*of_store, "model", "architecture"), facts.family)
    _put(config, (*of_store, "layer"), facts.layer)
    _put(config, (*of_store, "hook"), facts.hook)
    _put(config, (*of_store, "corpus", "config", "context_size"), facts.context_size)
    _put(config, (*of_store, "corpus", "tokenizer", "prepends_bos"), facts.prepends_bos)
    return config


def _put(config: Json, path: tuple[str, ...], value: Any) -> None:
    """Write a value into nested sections, unless it is not known."""
    if value is None:
        return
    *sections, name = path
    for each in sections:
        config[each] = config = section(config, each)
    config[name] = value


def section(config: Mapping[str, Any], name: str) -> Json:
    """A part of JSON that has to be an object; an empty one where it is not."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def text(config: Mapping[str, Any], name: str) -> str | None:
    """A short text, or None."""
    found = config.get(name)
    return found if isinstance(found, str) and 0 < len(found) <= _LONGEST_TEXT else None


def number(config: Mapping[str, Any], name: str) -> int | None:
    """A count from 0 on, or None."""
    found = config.get(name)
    return found if type(found) is int and 0 <= found < 2**63 else None


def real(config: Mapping[str, Any], name: str) -> float | None:
    """A number, or None."""
    found = config.get(name)
    if not isinstance(found, int | float) or isinstance(found, bool):
        return None
    return float(found) if abs(found) < 1e300 else None


def truth(config: Mapping[str, Any], name: str) -> bool | None:
    """True, False, or None."""
    found = config.get(name)
    return found if isinstance(found, bool) else None
