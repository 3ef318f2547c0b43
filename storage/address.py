"""Addresses of stores: a local path, or a URL of an object store, the Hugging Face Hub or a web server.

    acts.zarr   file:///data/acts.zarr
    s3://bucket/acts.zarr   gs://bucket/acts.zarr   az://container/acts.zarr
    hf://datasets/USER/REPO/acts.zarr   https://host/acts.zarr

An address never holds credentials: it is written into runs, manifests and messages. They come from
the environment or the profile files of each service (docs/sharing.md).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from .errors import InputError


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What an address may begin with.

    package: the one that fsspec needs for it; extra: of sae-pipe that installs it, empty where it
    is there; credentials: where they are taken from, for messages.
    """

    package: str
    extra: str
    credentials: str
    can_write: bool = True


SCHEMES = {
    "s3": Scheme(
        package="s3fs",
        extra="s3",
        credentials="AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public "
        "bucket FSSPEC_S3_ANON=true",
    ),
    "gs": Scheme(
        package="gcsfs",
        extra="gcs",
        credentials="GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    ),
    "az": Scheme(
        package="adlfs",
        extra="azure",
        credentials="AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or "
        "AZURE_STORAGE_CONNECTION_STRING",
    ),
    "hf": Scheme(
        package="huggingface_hub", extra="", credentials="HF_TOKEN, or `hf auth login`"
    ),
    "https": Scheme(
        package="aiohttp", extra="http", credentials="~/.netrc", can_write=False
    ),
    "http": Scheme(package="aiohttp", extra="http", credentials="~/.netrc", can_write=False),
}  # fmt: skip

HUB_KINDS = ("datasets", "models", "spaces")  # of repositories; without one it is a model's

STORE_HELP = "A folder such as acts.zarr, or an address such as s3://bucket/acts.zarr."

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A URL of a store, checked and without credentials. Make one with `place`."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> Scheme:
        """What is known of its kind."""
        return SCHEMES[self.protocol]

    @property
    def protocol(self) -> str:
        """What it begins with, such as s3."""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def repository(self) -> "Address | None":
        """The repository of the Hub that it lies in; None elsewhere, and in a bucket."""
        kind, *parts = self.url.partition("://")[2].split("/")
        if self.protocol != "hf" or kind == "buckets":
            return None
        names = [kind, *parts[:2]] if kind in HUB_KINDS else [kind, *parts[:1]]
        return Address("hf://" + "/".join(names))

    def with_name(self, name: str) -> "Address":
        """The address of another store beside this one."""
        return Address(f"{self.url.rpartition('/')[0]}/{name}")


Place = Path | Address


def expanded(path: str | Path) -> Path:
    """A local path with ~ spelt out; ~ of nobody stays as it is, and is then not found."""
    return Path(os.path.expanduser(path))


def place(where: str | Path | Address, *, may_be_bucket: bool = False) -> Place:
    """What a user calls a store, as a local path or a checked address.

    may_be_bucket: whether s3://bucket will do, with nothing behind it: of stores, not of a store.
    Raises InputError for a scheme that is not known, credentials in a URL, and parts such as `..`.
    """
    if isinstance(where, Path | Address):
        return where
    found = _URL.fullmatch(where)
    if found is None:
        return Path(where)
    protocol, rest = found[1].lower(), found[2].rstrip("/")
    host, _, path = rest.partition("/")
    if protocol == "file":
        if host not in ("", "localhost"):
            raise InputError(
                f"{shown(where)} names the host {shown(host)}: a file:// address has three slashes "
                "and a path of this machine, such as file:///data/acts.zarr."
            )
        return Path("/" + unquote(path))
    if protocol not in SCHEMES:
        raise InputError(
            f"{shown(where)} cannot be opened: {protocol}:// is not known. Pass a local path, or an "
            f"address that begins with {', '.join(f'{name}://' for name in SCHEMES)} or file://."
        )
    if "@" in host or "?" in rest or "#" in rest:
        raise InputError(
            f"An address holds no password, signature or other query, because it is written into "
            f"runs and manifests. Pass {shown(where)}; credentials are taken from "
            f"{SCHEMES[protocol].credentials}."
        )
    parts = PurePosixPath(path).parts
    if (
        not host
        or not (parts or may_be_bucket)
        or ".." in parts
        or "//" in rest
        or not rest.isprintable()
    ):
        raise InputError(
            f"{shown(where)} is not the address of a store. Pass one such as "
            f"{protocol}://{'datasets/USER/REPO' if protocol == 'hf' else 'NAME'}/acts.zarr."
        )
    return Address(f"{protocol}://{rest}")


def shown(text: str) -> str:
    """A text that may hold addresses, with whatever in them could be a credential left out."""
    text = re.sub(r"(://)[^/@\s'\"]*@", r"\1", text)
    text = re.sub(r"(://[^\s'\"<>)#]*)#[^\s'\"<>)]*", r"\1", text)
    text = re.sub(r"\?[^\s'\"<>)]*", "", text)
    return "".join(c if c.isprintable() else " " for c in text)


def described(where: Place) -> str:
    """What a run records of where its rows come from: the address, or the whole path."""
    return str(where.resolve()) if isinstance(where, Path) else str(where)


def only_local(where: Place, what: str) -> Path:
    """The path of a place; InputError for an address where only a folder will do.

    what: a clause such as "A store is repaired where it stands".
    """
    if isinstance(where, Address):
        raise InputError(
            f"{what}, and {where} is an address. Fetch it with `sae-pipe store pull {where} "
            f"{where.name}` first."
        )
    return where
