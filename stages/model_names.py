"""From the short name of a model to where it lies: one table, MODEL_NAMES.

A local folder and a Hub id (owner/name) stay what they are; only a bare name such as pythia-160m is
looked up. The rules name patterns, not lists of models: whether the Hub has pythia-161m is for the
Hub to say.
"""

import os
import re
from dataclasses import dataclass

from ..storage.errors import InputError


@dataclass(frozen=True, kw_only=True)
class NameRule:
    """Bare names that match `pattern`, in any case, are `hub_id` with the pattern's groups put in.

    Each group is there three times: {size} as matched in lower case, {SIZE} in upper case, {Size}
    as -instruct -> -Instruct, because owners differ in how they write their names.
    """

    example: str
    pattern: str
    hub_id: str


_SIZE = r"(?P<size>\d+(\.\d+)?[mb])"
_INSTRUCT = r"(?P<kind>-instruct)?"

MODEL_NAMES: dict[str, NameRule] = {
    "pythia": NameRule(
        example="pythia-160m",
        pattern=rf"pythia-{_SIZE}(?P<kind>-deduped)?",
        hub_id="EleutherAI/pythia-{size}{kind}",
    ),
    "gpt2": NameRule(
        example="gpt2",
        pattern=r"gpt2(?P<kind>-medium|-large|-xl)?",
        hub_id="openai-community/gpt2{kind}",
    ),
    "gemma-2": NameRule(
        example="gemma-2-2b",
        pattern=rf"gemma-2-{_SIZE}(?P<kind>-it)?",
        hub_id="google/gemma-2-{size}{kind}",
    ),
    "gemma-3": NameRule(
        example="gemma-3-1b-pt",
        pattern=rf"gemma-3-{_SIZE}(?P<kind>-pt|-it)?",
        hub_id="google/gemma-3-{size}{kind}",
    ),
    "llama-3": NameRule(
        example="llama-3.2-1b",
        pattern=rf"llama-(?P<version>3\.[123])-{_SIZE}{_INSTRUCT}",
        hub_id="meta-llama/Llama-{version}-{SIZE}{Kind}",
    ),
    "qwen2.5": NameRule(
        example="qwen2.5-0.5b",
        pattern=rf"qwen2\.5-{_SIZE}{_INSTRUCT}",
        hub_id="Qwen/Qwen2.5-{SIZE}{Kind}",
    ),
    "qwen3": NameRule(
        example="qwen3-0.6b",
        pattern=rf"qwen3-{_SIZE}(?P<kind>-base)?",
        hub_id="Qwen/Qwen3-{SIZE}{Kind}",
    ),
    "tinyllama": NameRule(
        example="tinyllama_v1.1",
        pattern=r"tinyllama[-_]v1\.1",
        hub_id="TinyLlama/TinyLlama_v1.1",
    ),
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str) -> str:
    """The folder or the Hub id that a name stands for. A folder that exists always wins."""
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return folder
    if _looks_like_path(name):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise InputError(
            f"Model folder {name!r} {what}. Pass the folder that holds the model's config.json, "
            "or a Hub id of the form owner/name."
        )
    if "/" in name:
        return name
    for rule in MODEL_NAMES.values():
        match = re.fullmatch(rule.pattern, name, re.IGNORECASE)
        if match:
            return rule.hub_id.format_map(_spellings(match))
    known = ", ".join(rule.example for rule in MODEL_NAMES.values())
    raise InputError(
        f"Model name {name!r} is not known. Known are names like {known}; "
        "pass one of them, a Hub id of the form owner/name, or a local folder."
    )


def _looks_like_path(name: str) -> bool:
    """Neither a bare name nor owner/name, or an owner that is a folder right here."""
    if name.startswith((".", "~")) or "\\" in name or not name:
        return True
    return "/" in name and (not _HUB_ID.fullmatch(name) or os.path.isdir(os.path.dirname(name)))


def _spellings(match: re.Match[str]) -> dict[str, str]:
    spelt: dict[str, str] = {}
    for group, found in match.groupdict(default="").items():
        text = found.lower()
        spelt |= {group: text, group.upper(): text.upper(), group.capitalize(): text.title()}
    return spelt
