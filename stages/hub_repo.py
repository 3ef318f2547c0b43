"""Model repositories of the Hugging Face Hub: addresses, and single files of known names and sizes.

    hf://USER/REPO[@REVISION][/FOLDER]

What is fetched is pinned to a commit, lands in the Hub's own cache, and is not fetched before its size
is known to be one that is wanted. Without network, what was fetched before is used.
"""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors as hub_errors

from ..storage.errors import InputError, NetworkError

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


class Repository:
    """A place whose revision is pinned. commit: None without network, where the cache decides."""

    def __init__(self, place: HubPlace, commit: str | None) -> None:
        self.place, self.commit = place, commit
        self._sizes: dict[str, int] = {}

    @property
    def pinned(self) -> str:
        """The address with the commit, as it can be used again."""
        place = self.place
        revision = self.commit or place.revision
        return str(HubPlace(repo=place.repo, revision=revision, folder=place.folder))

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those files of the folder that are there. Raises NetworkError."""
        asked = [name for name in names if name not in self._sizes]
        self._sizes |= self._cached_sizes(asked) if self.commit is None else self._ask_sizes(asked)
        return {name: self._sizes[name] for name in names if name in self._sizes}

    def fetch(self, name: str, limit_bytes: int) -> Path:
        """A file of the folder in the Hub's cache.

        Raises InputError when it is not there or larger than the limit, before it is fetched.
        """
        size = self.sizes([name]).get(name)
        if size is None:
            raise InputError(f"{self.place} has no {name}.")
        if size > limit_bytes:
            raise InputError(
                f"{name} of {self.place} has {size:,} bytes, more than the {limit_bytes:,} that it "
                "can have. It was not fetched."
            )
        file = self._download(name)
        if file is None:
            raise no_network(self.place)
        if file.stat().st_size > limit_bytes:
            raise InputError(f"{name} of {self.place} is not what its repository says it is.")
        return file

    def _ask_sizes(self, names: Sequence[str]) -> dict[str, int]:
        paths = {self.place.inside(name): name for name in names}
        if not paths:
            return {}
        with told(self.place):
            found = huggingface_hub.HfApi().get_paths_info(
                self.place.repo, list(paths), revision=self.commit
            )
        return {
            paths[each.path]: each.size
            for each in found
            if isinstance(each, huggingface_hub.hf_api.RepoFile) and each.path in paths
        }

    def _cached_sizes(self, names: Sequence[str]) -> dict[str, int]:
        files = {name: self._download(name) for name in names}
        return {name: file.stat().st_size for name, file in files.items() if file is not None}

    def _download(self, name: str) -> Path | None:
        """The file; None when it is not cached and there is no network."""
        # By its branch first: so the cache remembers which commit the branch was.
        file = self._download_at(name, self.place.revision)
        if file is None or self.commit is None or self.commit in file.parts:
            return file
        return self._download_at(name, self.commit)  # the branch has moved meanwhile

    def _download_at(self, name: str, revision: str | None) -> Path | None:
        try:
            with told(self.place):
                return Path(
                    huggingface_hub.hf_hub_download(
                        self.place.repo,
                        self.place.inside(name),
                        revision=revision,
                        local_files_only=self.commit is None,
                    )
                )
        except hub_errors.LocalEntryNotFoundError:
            return None


def open_repository(place: HubPlace) -> Repository:
    """Find a repository and pin its revision. Raises InputError, NetworkError."""
    if not hub_is_reachable():
        offline = Repository(place, None)
        if not offline.sizes(["config.json"]) and not offline.sizes(["cfg.json"]):
            raise no_network(place)
        return offline
    with told(place):
        info = huggingface_hub.HfApi().model_info(
            place.repo, revision=place.revision, timeout=20, expand=["sha"]
        )
    if info.sha is None:
        raise NetworkError(f"The Hub did not say which commit {place} is. Try again.")
    return Repository(place, info.sha)


@contextmanager
def told(place: HubPlace) -> Iterator[None]:
    """The Hub's refusals as sentences."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its client

    try:
        yield
    except hub_errors.LocalEntryNotFoundError:
        raise
    except hub_errors.GatedRepoError as error:
        raise InputError(
            f"{place} is gated. Accept its terms at https://huggingface.co/{place.repo}, run "
            "`hf auth login`, and try again."
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise InputError(
            f"{place} was not found on the Hub (or it is private, and `hf auth login` is needed). "
            "Check the spelling."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(
            f"{place.repo} has no revision {place.revision!r} on the Hub. Pass a branch, a tag or "
            f"a commit listed at https://huggingface.co/{place.repo}/commits/main."
        ) from error
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise InputError(
                f"The Hub does not allow this for {place.repo} (status {status}). Run "
                "`hf auth login` with a token that has the right to."
            ) from error
        raise no_network(place) from error
    except (HTTPError, OSError) as error:
        raise no_network(place) from error


def no_network(place: HubPlace) -> NetworkError:
    """The sentence for a Hub that does not answer."""
    return NetworkError(
        f"{place} could not be reached: no network, or the Hub does not answer, and it is not in "
        "the cache of earlier downloads. Try again where there is network."
    )


def hub_is_reachable() -> bool:
    """One quick look first: without network, the Hub's client retries for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    proxied = urllib.request.getproxies().get(address.scheme)
    if proxied:  # the proxy is what can be reached, or not
        address = urlsplit(proxied if "//" in proxied else f"//{proxied}")
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=10).close()
    except OSError:
        return False
    return True
