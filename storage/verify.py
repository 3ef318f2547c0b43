"""Every file of a store compared with what is recorded of it: all that is wrong, not the first.

Works where `open_store` refuses, because that is when it is needed: a shard may be missing or of
another size. Only manifest.json has to be readable, and it is checked against its own digest.
"""

import errno
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .address import Address, Place
from .card import README
from .codecs import codec_of, get_codec
from .corpus import CORPUS_JSON, INFO_LIMIT_BYTES, Corpus
from .errors import SaePipeError, StoreError
from .files import LONGEST_PART, is_plain_name, is_sha256, plain_size, read_plain
from .manifest import (
    COMMITS,
    COMPLETE,
    HARVESTING,
    MANIFEST,
    TOKENISING,
    Manifest,
    began_by,
    content_digest,
    layout_of,
    read_commit,
    sealed_records,
)
from .minisign import SUFFIX as SIGNATURE_SUFFIX
from .shard import CRC_BYTES

# What stands beside a manifest and would be taken for the user's own, or for its signature.
_UNRECORDED = (README.casefold(), (MANIFEST + SIGNATURE_SUFFIX).casefold())
_READ_BYTES = 1 << 20
_VECTOR_LIMIT_BYTES = 1 << 26  # d_in of 8 million
_VECTORS = ("statistics/mean/c/0", "statistics/variance/c/0")
_OTHER_LIMIT_BYTES = 1 << 28  # of tokenizer.json; no other file but a shard comes near
SPLITS = {"train": "", "heldout": "heldout"}
SHARD, TOKENS, OTHER, RECORD = "shard", "tokens", "other", "record"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file and what is recorded of it.

    name: its path below the store; kind: part of a shard, of the tokens, or something else; split,
    shard, array: which, of a part of a shard.
    """

    name: str
    kind: str
    bytes: int
    sha256: str
    split: str = ""
    shard: int = -1
    array: str = ""


Content = Callable[[StoredFile], Iterator[bytes | memoryview]]


@dataclass(frozen=True)
class Damage:
    """What is wrong with one file: a clause such as "it is missing"."""

    file: StoredFile
    what: str
    is_record_wrong: bool = False  # the file has its digest, but the manifest another size


def stored_files(path: Path, manifest: Manifest) -> list[StoredFile]:
    """Every file that the manifest, the commit records and corpus.json record.

    Of an unfinished store, those of its sealed shards. Raises StoreError when the records have
    another form, or name a file outside the store.
    """
    if manifest.get("state") not in (TOKENISING, HARVESTING, COMPLETE):
        raise StoreError(
            f"The manifest of {path} is damaged: there is no state {manifest.get('state')!r}. "
            "Fetch or harvest the store again."
        )
    if manifest["state"] == TOKENISING:
        return []
    try:
        files = [*_shard_files(path, manifest)]
        for name, entry in manifest.get("files", {}).items():
            kind = TOKENS if name.startswith("corpus/") else OTHER
            files.append(_recorded(name, kind, entry))
        files = [*_token_files(path), *files]
        names = {file.name for file in files}
        if len(names) < len(files):
            raise ValueError("a file is recorded twice")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"The manifest of {path} is damaged: what it records of its files cannot be ({error}). "
            "Fetch or harvest the store again."
        ) from error
    return files


def _shard_files(path: Path, manifest: Manifest) -> Iterator[StoredFile]:
    for split, folder in SPLITS.items():
        if manifest["state"] == COMPLETE:
            records = dict(enumerate(manifest[split]["shards"]))
        else:
            records = sealed_records(path, split)
        for shard, record in records.items():
            yield from _files_of_record(split, folder, shard, record)


def files_of_shard(path: Path, split: str, shard: int) -> list[StoredFile]:
    """The files of a shard that is sealed, of a store that is being written; none when its record
    has gone into the manifest. StoreError when the record is damaged.
    """
    file = path / COMMITS / split / f"{shard:08d}.json"
    record = read_commit(file)
    try:
        return [*_files_of_record(split, SPLITS[split], shard, record)] if record else []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{file} is damaged ({error}). Harvest the store again.") from error


def _files_of_record(
    split: str, folder: str, shard: int, record: dict[str, Any]
) -> Iterator[StoredFile]:
    for array, entry in record["files"].items():
        if array not in ("activations", "source", "masked"):
            raise ValueError(f"a shard has an array {array!r}")
        parts = [folder, array, "c", str(shard), *(["0"] if array == "activations" else [])]
        name = "/".join(part for part in parts if part)
        yield _recorded(name, SHARD, entry, split=split, shard=shard, array=array)


def _recorded(name: str, kind: str, entry: Any, **of_shard: Any) -> StoredFile:
    if not is_plain_name(name):
        is_long = any(len(part) > LONGEST_PART for part in name.split("/"))
        what = "which is too long" if is_long else "which is not inside the store"
        raise ValueError(f"a file named {name[:LONGEST_PART]!r}, {what}")
    top = name.partition("/")[0].casefold()  # some file systems know no capitals
    if top == MANIFEST:
        raise ValueError("the manifest itself")
    if top in _UNRECORDED:
        raise ValueError(f"a file named {name[:200]!r}, which no manifest records")
    if type(entry["bytes"]) is not int or entry["bytes"] < 0 or not is_sha256(entry["sha256"]):
        raise ValueError(f"{name} is recorded as {entry!r}")
    return StoredFile(
        name=name, kind=kind, bytes=entry["bytes"], sha256=entry["sha256"], **of_shard
    )


def _token_files(path: Path) -> list[StoredFile]:
    """Files of the corpus; none when corpus.json, which lists them, is not what was written."""
    try:
        info = Corpus(path / "corpus", check_files=False).info
        return [_recorded(f"corpus/{n}", TOKENS, e) for n, e in sorted(info["files"].items())]
    except (StoreError, KeyError, TypeError, ValueError, AttributeError):
        return []


def check_sizes(place: Place, manifest: Manifest, files: Sequence[StoredFile]) -> None:
    """StoreError when a complete store records a size that none of its files can have.

    For who makes room before a file comes. A shard has whatever its rows take.
    """
    d_in = layout_of(manifest["train"], place).d_in
    for file in files:
        limit = _OTHER_LIMIT_BYTES
        if file.kind == SHARD:
            continue
        if file.name.startswith("statistics/") and file.name.endswith("/c/0"):
            limit = 8 * d_in + CRC_BYTES
        elif file.name == f"corpus/{CORPUS_JSON}":
            limit = INFO_LIMIT_BYTES
        if file.bytes > limit:
            raise StoreError(
                f"The manifest of {place} is damaged: it records {file.name} with {file.bytes:,} "
                f"bytes, and none has more than {limit:,}. Fetch or harvest the store again."
            )


def wrong_in_manifest(path: Path, manifest: Manifest) -> str | None:
    """A clause when a complete store's manifest is not the one that was written, else None."""
    try:
        if manifest["state"] != COMPLETE:
            return None
        for split in SPLITS:
            layout, shards = layout_of(manifest[split], path), manifest[split]["shards"]
            if len(shards) != layout.n_shards:
                return f"it lists {len(shards)} {split} shards, and its sizes ask for {layout.n_shards}"
            for shard, record in enumerate(shards):
                first, last = layout.rows_of_shard(shard)
                if record["rows"] != last - first:
                    return (
                        f"it gives {split} shard {shard} {record['rows']} rows, and its sizes ask "
                        f"for {last - first}"
                    )
        if content_digest(manifest) != manifest["digest"]:
            return "its recipe, sizes and shards do not have the digest that it gives them"
        if codec_of(manifest).spelling != _asked_codec(manifest):
            return f"it names the codec {manifest['codec']}, and its recipe another one"
        return _wrong_statistics(path, manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return f"it lacks what every store has, or has it in another form ({error})"
    return None


def _asked_codec(manifest: Manifest) -> str:
    """The codec of the recipe, which the digest covers; the first stores' have none."""
    return get_codec(manifest["recipe"].get("codec", manifest["codec"])).spelling


def _wrong_statistics(path: Path, manifest: Manifest) -> str | None:
    """A clause when the manifest's statistics, by which a fit scales rows, are not those that the
    files of mean and variance give. Nothing is said where one of those is damaged.
    """
    vectors = []
    for name in _VECTORS:
        data = _recorded_bytes(path, manifest, name)
        if isinstance(data, str):
            return None
        size = 8 * manifest["train"]["layout"]["d_in"] + CRC_BYTES
        if len(data) != size:
            return f"it records {name} with {len(data):,} bytes, and its sizes ask for {size:,}"
        vectors.append(np.frombuffer(data[:-CRC_BYTES], "<f8"))
    mean, variance = vectors
    given = manifest["statistics"]
    with np.errstate(all="ignore"):  # of numbers that are none, which the comparison finds
        sums = {
            "mean_squared_norm": float((mean**2 + variance).sum()),
            "norm_of_mean": float((mean**2).sum() ** 0.5),
            "total_variance": float(variance.sum()),
        }
    for name, value in sums.items():
        # Sums of another processor may differ in their last digits.
        if not math.isclose(given[name], value, rel_tol=1e-9, abs_tol=1e-300):
            return f"it gives {name} as {given[name]!r}, and statistics/ says {value!r}"
    if given["rows"] != manifest["train"]["layout"]["n_rows"]:
        return f"it gives the statistics of {given['rows']} rows, and has others"
    return None


def _recorded_bytes(path: Path, manifest: Manifest, name: str) -> bytes | str:
    """A vector of the statistics, or a clause that says why it is not the one recorded."""
    entry = manifest["files"][name]
    try:
        data = read_plain(path, name, _VECTOR_LIMIT_BYTES)
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError) as error:
        return str(error)
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        return "its SHA-256 is not the recorded one"
    return data


def wrong_vector(path: Path, manifest: Manifest) -> tuple[str, str] | None:
    """Name and clause of a vector of the statistics that is not the one recorded, else None.

    Without it nothing vouches for the statistics of the manifest, so a reader refuses what `verify`
    names and `repair` makes again.
    """
    for name in _VECTORS:
        found = _recorded_bytes(path, manifest, name)
        if isinstance(found, str):
            return name, found
    return None


def find_damage(
    content: Content, files: Sequence[StoredFile], advance: Callable[[int], object] = lambda n: None
) -> list[Damage]:
    """Compare files with what is recorded of them, on all cores: everything that is wrong.

    content: gives the bytes of a file in parts, such as `content_below` a folder. advance: called
    with bytes that were read, never by two threads at once.
    """
    lock = threading.Lock()

    def read(n_bytes: int) -> None:
        with lock:
            advance(n_bytes)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda file: _damage_of(content, file, read), files)
        return [damage for damage in found if damage is not None]


def content_below(folder: Path) -> Content:
    """The content of files below a folder. A part is valid until the next is asked for."""

    def content(file: StoredFile) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_READ_BYTES))
        try:
            plain_size(folder, file.name)
        except StoreError as error:
            raise OSError(errno.ELOOP, "a symbolic link, or no plain file") from error
        with (folder / file.name).open("rb", buffering=0) as opened:
            while n := opened.readinto(buffer):
                yield buffer[:n]

    return content


def _damage_of(content: Content, file: StoredFile, read: Callable[[int], object]) -> Damage | None:
    digest, size = hashlib.sha256(), 0
    try:
        for part in content(file):
            digest.update(part)  # lets the interpreter lock go
            size += len(part)
            read(len(part))
    except SaePipeError:
        raise  # of a service that cannot be reached
    except FileNotFoundError:
        return Damage(file, "it is missing")
    except OSError as error:
        return Damage(file, f"it cannot be read ({error.strerror})")
    is_same = digest.hexdigest() == file.sha256
    if size != file.bytes and is_same:
        what = (
            f"it is whole with {size:,} bytes, and {file.bytes:,} are recorded: the record is wrong"
        )
        return Damage(file, what, is_record_wrong=True)
    if size != file.bytes:
        how = "it was cut off: it has" if size < file.bytes else "it has"
        return Damage(file, f"{how} {size:,} bytes instead of {file.bytes:,}")
    return None if is_same else Damage(file, "its SHA-256 is not the recorded one")


def wrong_corpus(path: Path, manifest: Manifest) -> Damage | None:
    """Damage of corpus.json, which lists the other files of the tokens."""
    entry = manifest.get("files", {}).get(f"corpus/{CORPUS_JSON}", {"bytes": 0, "sha256": "0" * 64})
    file = _recorded(f"corpus/{CORPUS_JSON}", TOKENS, entry)
    recorded = manifest.get("corpus", {}).get("digest")
    if recorded is None:
        return None
    try:
        found = Corpus(path / "corpus", check_files=False).digest
    except StoreError:
        missing = not (path / file.name).is_file()
        return Damage(file, "it is missing" if missing else "it is not the JSON that was written")
    if found != recorded:
        return Damage(file, "it is that of other tokens: its digest is not the manifest's")
    return None


def verify_store(
    path: Path,
    manifest: Manifest,
    files: Sequence[StoredFile],
    advance: Callable[[int], object] = lambda n: None,
    content: Content | None = None,
) -> list[Damage]:
    """All that is wrong with a store: its manifest, its tokens, its shards, the rest.

    content: where the files are, if that is not `path`.
    """
    found = []
    what = wrong_in_manifest(path, manifest)
    if what is not None:
        record = StoredFile(name=MANIFEST, kind=RECORD, bytes=0, sha256="")
        found.append(Damage(record, what, is_record_wrong=True))
    corpus = wrong_corpus(path, manifest)
    of_files = find_damage(content or content_below(path), files, advance)
    if corpus is not None and all(d.file.name != corpus.file.name for d in of_files):
        found.append(corpus)
    return [*found, *of_files]


def is_harvested(manifest: Manifest) -> bool:
    """Whether the rows can be made again: the recipe names the model, and nothing was lost since."""
    recipe = manifest.get("recipe", {})
    model = recipe.get("model") if isinstance(recipe, dict) else None
    if not isinstance(model, dict) or "recoded_from" in recipe:
        return False
    # The last block of a part of a store is not permuted as a block of that size is.
    made, execution = manifest.get("provenance"), manifest.get("execution")
    if isinstance(made, dict) and "sampled" in made:
        return False
    return "revision" in model and isinstance(execution, dict) and "batch_contexts" in execution


def advice(path: Place, manifest: Manifest, damages: Sequence[Damage]) -> str:
    """The sentence that says what to do."""
    if isinstance(path, Address):
        return (
            "Remove those files there, and run `sae-pipe store push` of the whole store again: it "
            "sends what is missing."
        )
    kinds = {damage.file.kind for damage in damages}
    command = f"`sae-pipe store repair {path}`"
    if RECORD in kinds and not any(d.is_record_wrong and d.file.kind != RECORD for d in damages):
        return "Fetch manifest.json again, or harvest the store again."
    if SHARD in kinds and manifest["state"] == COMPLETE and not is_harvested(manifest):
        return "Fetch those files again, or import or recode the store again."
    if TOKENS in kinds:
        return (
            f"Run {command}: tokens can only be copied from a store beside it that has the same "
            "ones; everything else is made again."
        )
    if manifest["state"] != COMPLETE:
        return (
            f"Run {command} and then the `sae-pipe {began_by(manifest)}` command that began it: "
            "together they make those files again."
        )
    return f"Run {command}: it makes those files again and touches nothing else."
