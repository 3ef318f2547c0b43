"""Addresses of model repositories of the Hugging Face Hub; imports nothing of its client.

hf://USER/REPO[@REVISION][/FOLDER]
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from ..storage.errors import InputError

SCHEME = "hf://"
_ADDRESS = re.compile(r"([\w.-]+)/([\w.-]+)(?:@([^/@\s]+))?(?:/(.*))?", re.ASCII)
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A folder of a repository; revision: a branch, tag or commit, None for the main branch."""

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{at}" + (f"/{self.folder}" if self.folder else "")

    def inside(self, name: str) -> str:
        """The path of a file of the folder in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


def is_hub(text: object) -> bool:
    """Whether a text is an address of the Hub."""
    return isinstance(text, str) and text.startswith(SCHEME)


def parse_hub(address: str) -> HubPlace:
    """The parts of an address. Raises InputError for what is none of a model repository."""
    path = address.removeprefix(SCHEME).removeprefix("models/").rstrip("/")
    found = _ADDRESS.fullmatch(path)
    if found is not None and found[1] in _OTHER_KINDS:
        raise InputError(
            f"{address} is not a model repository, and SAEs are kept in those. Pass hf://USER/REPO."
        )
    folder = (found[4] or "") if found is not None else ""
    parts = folder.split("/") if folder else []
    is_plain = all(
        part.isprintable() and "\\" not in part and part not in ("", ".", "..") for part in parts
    )
    if found is None or not is_plain:
        raise InputError(
            f"{address!r} is not an address of the Hub. Pass hf://USER/REPO, "
            "hf://USER/REPO@REVISION or hf://USER/REPO@REVISION/FOLDER."
        )
    revision = unquote(found[3]) if found[3] else None
    return HubPlace(repo=f"{found[1]}/{found[2]}", revision=revision, folder=folder)
