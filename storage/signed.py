"""A store's signature: manifest.json.minisig beside manifest.json, in the format of minisign.

manifest.json records size and SHA-256 of every other file, corpus.json among them, which does so for
the tokens. So who checks the signature of the manifest's bytes, and every file against the manifest,
knows that all of it is what the holder of the key had. What the manifest does not record is not
covered; `unrecorded` finds it.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from . import minisign, provenance
from .address import Address, Place
from .errors import SaePipeError, StoreError
from .files import disk_error, read_plain, write_whole
from .manifest import MANIFEST, MANIFEST_LIMIT_BYTES
from .minisign import PublicKey, SecretKey
from .remote import Link
from .store_source import LocalSource
from .unfinished import WaitEnded

SIGNATURE = MANIFEST + minisign.SUFFIX
# Files that a store may hold beside what it records: its card, its lock, the manifest itself.
_BESIDE = (MANIFEST, SIGNATURE, ".lock", "README.md")
_NAMED = 5
SIGNATURE_IS_GONE = (
    "The manifest is another one now, so its signature was removed: sign it again, with `sae-pipe "
    "store sign`."
)


def sign_store(path: Path, key: SecretKey) -> Path:
    """Sign the manifest of a complete store; returns the file of the signature.

    Raises StoreError when it is no complete store, or its manifest has not its own digest.
    """
    source = LocalSource(path)
    name, digest = path.resolve().name, source.manifest["digest"]
    comment = f"signed {provenance.now()}, store {name}, digest {digest}"
    file = path / SIGNATURE
    write_whole(file, minisign.sign(key, source.data, comment))
    return file


def check_signature(place: Place, data: bytes, signature: bytes | None, key: PublicKey) -> str:
    """The trusted comment, if the bytes of a manifest were signed with a key. Raises StoreError.

    signature: None where there is none.
    """
    if signature is None:
        raise StoreError(
            f"Store {place} is not signed: it has no {SIGNATURE}. Ask who made it for one, or leave "
            "--key out to use it unsigned."
        )
    try:
        return minisign.check(key, data, signature)
    except SaePipeError:
        raise  # some are ValueErrors too
    except ValueError as error:
        raise StoreError(
            f"The signature of store {place} does not hold: {error}. Do not use this store unless "
            "you know why."
        ) from error


def signature_of(place: Place, *, is_patient: bool = True) -> bytes | None:
    """The signature file of a store, here or at an address; None where there is none.

    is_patient: whether to wait for a lost connection; if not, None is the answer to that, too.
    """
    if isinstance(place, Address):
        link = Link(place) if is_patient else Link(place, lambda line: None)
        try:
            return link.read_small(SIGNATURE, minisign.LIMIT_BYTES, lambda: not is_patient)
        except (FileNotFoundError, WaitEnded):
            return None
        finally:
            link.end()
    return local_signature(place)


def local_signature(path: Path) -> bytes | None:
    """The signature file of a store in a folder; StoreError when it is no plain file of its size."""
    try:
        return read_plain(path, SIGNATURE, minisign.LIMIT_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path / SIGNATURE} cannot be read ({error}).") from error


def check_local(path: Path, key: PublicKey) -> str:
    """`check_signature` of a store in a folder."""
    data = read_plain(path, MANIFEST, MANIFEST_LIMIT_BYTES)
    return check_signature(path, data, local_signature(path), key)


def remove_signature(path: Path) -> bool:
    """Remove the signature of a manifest that is to be written anew; False where there is none.

    The caller holds the store's lock, and tells the user: who has the key can sign again.
    """
    file = path / SIGNATURE
    is_there = os.path.lexists(file)
    if is_there:
        try:
            file.unlink()
        except OSError as error:
            raise disk_error(error, file) from error
    return is_there


def check_unrecorded(path: Path, names: Iterable[str]) -> None:
    """StoreError when a signed store holds files that its manifest does not record.

    A reader may take those: another tool's metadata, a tokenizer of an imported store.
    """
    known = {*names, *_BESIDE}
    found = []
    for folder, folders, inside in os.walk(path):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in [*inside, *links]:
            place = Path(folder, name).relative_to(path).as_posix()
            if place not in known:
                found.append(place)
    if found:
        shown = ", ".join(sorted(found)[:_NAMED]) + (" and others" if len(found) > _NAMED else "")
        raise StoreError(
            f"Store {path} is signed, and holds files that its manifest does not record: {shown}. "
            "Move them away."
        )
