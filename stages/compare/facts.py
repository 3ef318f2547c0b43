"""What is known of a run: the keys that runs are grouped by, their values and how they are shown.

A key is any entry of the `run` section of a result that is one value, or `recipe.NAME`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...storage.errors import InputError

Facts = Mapping[str, Any]

ALIASES = {"l0": "k"}
# Runs that differ in one of these are no repetitions of one another, and no mean is taken over them.
WHAT_IT_IS = ("model", "layer", "hook", "mask_p", "arch", "k", "d_in", "d_sae", "steps", "tokens")
# Of single runs, not of kinds of runs.
_HIDDEN = ("baseline", "of")
# In recipes these differ with the seed, or between masked and unmasked runs of one experiment.
_OWN_IN_RECIPE = ("seed", "store_digest")

_NAMES = {"k": "L0", "mask_p": "p", "arch": "architecture"}


def known_keys(all_facts: Sequence[Facts]) -> list[str]:
    """Every key that --by takes for these runs: aliases first, then as the files have them."""
    found: dict[str, None] = dict.fromkeys(ALIASES)
    for facts in all_facts:
        found |= dict.fromkeys(key for key, value in facts.items() if _is_one_value(value))
    for facts in all_facts:
        recipe = facts.get("recipe")
        if isinstance(recipe, Mapping):
            found |= dict.fromkeys(f"recipe.{key}" for key in recipe)
    return [key for key in found if key not in _HIDDEN]


def checked_keys(by: Sequence[str], all_facts: Sequence[Facts]) -> tuple[str, ...]:
    """The keys of --by, aliases resolved. InputError for one that is not known, or stands twice."""
    known = known_keys(all_facts)
    keys = []
    for name in by:
        if name not in known:
            listed = ", ".join(key for key in known if not key.startswith("recipe."))
            raise InputError(
                f"--by {name!r} is not known. These results have {listed}, and recipe.NAME for "
                "what is in a run's recipe."
            )
        keys.append(ALIASES.get(name, name))
    if not keys:
        raise InputError("--by names nothing. Pass for example --by mask_p,arch,l0.")
    if len(set(keys)) < len(keys):
        raise InputError(f"--by {','.join(by)} names one key twice. Pass each once.")
    return tuple(keys)


def fact(facts: Facts, key: str) -> Any:
    """The value of a key, as something that can be a key itself; None where it is not known."""
    where: Any = facts
    name = key
    if key.startswith("recipe."):
        where, name = facts.get("recipe") or {}, key.removeprefix("recipe.")
    value = where.get(name) if isinstance(where, Mapping) else None
    if key == "k" and value is None:
        recipe = facts.get("recipe")
        sparsity = recipe.get("sparsity") if isinstance(recipe, Mapping) else None
        if isinstance(sparsity, int | float):
            return f"coefficient {sparsity:g}"
    return value if _is_one_value(value) else str(value)


def sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then texts, then what is not known."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))


def name_of(key: str) -> str:
    """A key as a heading."""
    return _NAMES.get(key, key)


def shown(value: Any) -> str:
    """A value as text."""
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def label(key: str, value: Any) -> str:
    """Key and value as text: what a column or a table is called."""
    if key == "mask_p" and value == 0:
        return "without mask"
    if key == "mask_p" and value is not None:
        return f"p = {shown(value)}"
    if isinstance(value, str) and value.startswith("coefficient "):
        return value
    return f"{name_of(key)} {shown(value)}"


def differing_recipes(all_facts: Sequence[Facts]) -> dict[str, list[Any]]:
    """Entries of the recipes in which runs differ that count as repetitions: name -> values."""
    recipes = [facts["recipe"] for facts in all_facts if isinstance(facts.get("recipe"), Mapping)]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    found = {}
    for name in names:
        if name in _OWN_IN_RECIPE or name in WHAT_IT_IS:
            continue
        values = {repr(recipe.get(name)): recipe.get(name) for recipe in recipes}
        if len(values) > 1:
            found[name] = [values[key] for key in sorted(values)]
    return found


def _is_one_value(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
