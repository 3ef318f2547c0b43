"""Stores, evaluation sets, runs and files of other tools as a stranger might send them.

Each kind is a good one, made worse in one way and then made to agree with itself again: digests,
checksums and sizes are recomputed where a stranger could do so. `KINDS` maps a name to what makes it
in a folder and the command that meets it; tests/test_hostile.py runs them.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from sae_pipe.storage.corpus import corpus_digest
from sae_pipe.storage.manifest import content_digest
from sae_pipe.storage.shard import crc32c

Json = dict[str, Any]
CANARY = "canary"  # beside the folder that a kind is made in: nothing may change it or come to it


@dataclass(frozen=True)
class Kind:
    """make: given the good store (or set, or nothing) and the folder to make the kind in, the
    arguments of the command. is_huge: it claims a size that must never be allocated.
    """

    make: Callable[[Path, Path], list[str]]
    is_huge: bool = False
    base: str = "store"


KINDS: dict[str, Kind] = {}


def kind(
    name: str, *, is_huge: bool = False, base: str = "store"
) -> Callable[[Callable[[Path, Path], list[str]]], Callable[[Path, Path], list[str]]]:
    def add(make: Callable[[Path, Path], list[str]]) -> Callable[[Path, Path], list[str]]:
        assert name not in KINDS
        KINDS[name] = Kind(make, is_huge, base)
        return make

    return add


# --- what they share ---


def load(file: Path) -> Json:
    found: Json = json.loads(file.read_bytes())
    return found


def entry_of(file: Path) -> Json:
    return {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()}


def change(store: Path, *changes: Callable[[Json], object]) -> None:
    """Change the manifest of a store, and let it agree with itself."""
    manifest = load(store / "manifest.json")
    for each in changes:
        each(manifest)
    manifest["digest"] = content_digest(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))


def change_corpus(store: Path, *changes: Callable[[Json], object]) -> None:
    """Change corpus.json, and let it and the manifest agree with themselves."""
    file = store / "corpus/corpus.json"
    info = load(file)
    for each in changes:
        each(info)
    info["digest"] = corpus_digest(info)
    file.write_text(json.dumps(info))
    change(
        store,
        lambda m: m["corpus"].update(digest=info["digest"]),
        lambda m: m["files"].update({"corpus/corpus.json": entry_of(file)}),
    )


def corpus_file(store: Path, name: str, data: bytes) -> None:
    """Replace a file of the tokens, recorded as it is."""
    file = store / "corpus" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    change_corpus(store, lambda info: info["files"].update({name: entry_of(file)}))


def shard_file(store: Path, array: str, data: bytes | None = None) -> None:
    """Replace the file of shard 1, recorded as it is."""
    file = store / array / "c" / "1" / ("0" if array == "activations" else "")
    if data is not None:
        file.write_bytes(data)
    entry = entry_of(file) if file.stat().st_size < 1 << 24 else {
        "bytes": file.stat().st_size, "sha256": "0" * 64}  # fmt: skip
    change(store, lambda m: m["train"]["shards"][1]["files"].update({array: entry}))


def with_crc(frame: bytes) -> bytes:
    return frame + crc32c(frame)


def read_all(store: Path, inside: Path) -> list[str]:
    """The command that reads every row with its source."""
    return ["store", "export", str(store), str(inside / "rows"), "--format", "numpy"]


def read_tokens(store: Path) -> list[str]:
    """The command that reads tokens, sources and rows' places."""
    return ["store", "verify", str(store), "--shuffle"]


def copied(good: Path, inside: Path) -> Path:
    return Path(shutil.copytree(good, inside / "acts.zarr"))


class Evil:
    """What a pickle can do when it is believed."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}/ran",)


def simple(name: str, edit: Callable[[Path], object], command: Any = None, **options: Any) -> None:
    """A kind of store that is a copy with one edit."""

    def make(good: Path, inside: Path) -> list[str]:
        store = copied(good, inside)
        edit(store)
        if callable(command):
            found: list[str] = command(store)
            return found
        return read_all(store, inside)

    kind(name, **options)(make)


def verified(store: Path) -> list[str]:
    return ["store", "verify", str(store)]


def layout(**sizes: Any) -> Callable[[Path], None]:
    def edit(store: Path) -> None:
        manifest = load(store / "manifest.json")
        manifest["train"]["layout"] |= sizes
        manifest["digest"] = content_digest(manifest)
        (store / "manifest.json").write_text(json.dumps(manifest))

    return edit


def text(content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda store: (store / "manifest.json").write_bytes(data)


def records(name: str, **entry: Any) -> Callable[[Path], None]:
    recorded = {"bytes": 4, "sha256": "0" * 64} | entry
    return lambda store: change(store, lambda m: m["files"].update({name: recorded}))


# --- stores: the manifest ---

simple(
    "a manifest of a gigabyte", lambda s: os.truncate(s / "manifest.json", 1 << 30), is_huge=True
)
simple("a manifest of ten million lists", text("[" + "[]," * 10_000_000 + "[]]"), is_huge=True)
simple("a manifest nested 100,000 deep", text('{"a":' * 100_000 + "1" + "}" * 100_000))
simple("a manifest nested 500 deep", text('{"a":' * 500 + "1" + "}" * 500))
simple("a manifest with a key twice", text('{"format": 1, "format": 2}'))
simple("a manifest with NaN", text('{"format": NaN}'))
simple("a manifest with 1e999", text('{"format": 1e999}'))
simple("a manifest with half a character", text('{"format": "\\ud800"}'))
simple("a manifest that is not UTF-8", text(b'{"format": "\xed\xa0\x80"}'))
simple("a manifest with a number of 5,000 digits", text('{"format": ' + "9" * 5000 + "}"))
simple(
    "a format version of another type", lambda s: change(s, lambda m: m.update(format_version=True))
)

simple("a width of 10^12", layout(d_in=10**12), is_huge=True)
simple("shards of 2^46 rows", layout(shard_rows=1 << 46, block_rows=1 << 46), is_huge=True)
simple("2^60 rows", layout(n_rows=1 << 60), is_huge=True)
simple(
    "2^40 rows in a shard of one row",
    layout(n_rows=1 << 40, shard_rows=1, chunk_rows=1, block_rows=1),
    is_huge=True,
)
simple("rows that are true", layout(n_rows=True))
simple("rows below zero", layout(n_rows=-4))
simple("a chunk of no rows", layout(chunk_rows=0))
simple("a layout with another field", layout(__class__="Layout"))
simple(
    "a recipe that says otherwise than the digest",
    lambda s: text(json.dumps({**load(s / "manifest.json"), "recipe": {"seed": 1}}))(s),
)
simple(
    "a shard of 2^60 bytes",
    lambda s: change(s, lambda m: m["train"]["shards"][1]["files"]["source"].update(bytes=1 << 60)),
    is_huge=True,
)
simple(
    "contexts of no position",
    lambda s: change(s, lambda m: m["recipe"]["corpus"]["config"].update(context_size=0)),
    read_tokens,
)
simple(
    "contexts of 10^30 positions",
    lambda s: change(s, lambda m: m["recipe"]["corpus"]["config"].update(context_size=10**30)),
    read_tokens,
    is_huge=True,
)
simple(
    "a mean squared norm of 10^400",
    lambda s: change(s, lambda m: m["statistics"].update(mean_squared_norm=10**400)),
)
simple(
    "a mean squared norm below zero",
    lambda s: change(s, lambda m: m["statistics"].update(mean_squared_norm=-1.0)),
)
simple(
    "a mean squared norm that its vectors do not give",
    lambda s: change(s, lambda m: m["statistics"].update(mean_squared_norm=1.0)),
)
simple("another codec than the recipe's", lambda s: change(s, lambda m: m.update(codec="none")))
simple("a codec of another name", lambda s: change(s, lambda m: m.update(codec="pickle")))

# --- stores: names and links ---

for _name in (
    "../../canary/new",
    "/canary/new",
    "..\\..\\canary\\new",
    "C:/new",
    "a\0b",
    "a//b",
    ".lock",
    "~/new",
    "corpus/../../x",
):
    simple(f"a file named {_name!r}", records(_name), verified)
simple("the manifest among its files", records("manifest.json"), verified)
for _name in (
    "README.md",
    "readme.MD/below",
    "Manifest.json",
    "manifest.json.MINISIG",
):
    simple(f"a file named {_name!r}", records(_name), verified)
simple("a name of 230 letters", records("a/" + "b" * 230), verified)
simple("a file recorded twice", records("activations/c/1/0"), verified)
simple("a digest that is a path", records("notes.txt", sha256="../" * 21 + "x"), verified)


def link(name: str, target: str) -> Callable[[Path], None]:
    def edit(store: Path) -> None:
        place = store / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        place.symlink_to(target)

    return edit


simple("a shard that is a link to a file outside", link("activations/c/1/0", "/etc/hostname"))
simple("a shard that is a link to an endless device", link("source/c/1", "/dev/zero"))
simple(
    "a folder of shards that is a link",
    lambda s: link("activations", str(shutil.move(s / "activations", s.parent / "elsewhere")))(s),
)
simple("a manifest that is a link", link("manifest.json", "/etc/hostname"))
simple("statistics that are a link", link("statistics/mean/c/0", "/dev/zero"), verified)
simple("tokens that are a link", link("corpus/train/tokens/c/0/0", "/dev/zero"), read_tokens)


@kind("a shard that is a pipe")
def _pipe(good: Path, inside: Path) -> list[str]:
    store = copied(good, inside)
    (store / "activations/c/1/0").unlink()
    os.mkfifo(store / "activations/c/1/0")
    return read_all(store, inside)


# --- stores: what a pull meets ---


def pulled(store: Path) -> list[str]:
    return ["store", "pull", str(store), str(store.parent / "back.zarr")]


def part_pulled(store: Path) -> list[str]:
    return [*pulled(store), "--rows", "10"]


_LIST = "corpus/corpus.json"
simple(
    "a list of tokens of a terabyte",
    lambda s: change(s, lambda m: m["files"][_LIST].update(bytes=1 << 40)),
    pulled,
    is_huge=True,
)
simple(
    "tokens whose list is not recorded",
    lambda s: change(s, lambda m: m["files"].pop(_LIST)),
    pulled,
)
simple("no files but shards", lambda s: change(s, lambda m: m.update(files={})), part_pulled)


def _no_list(store: Path) -> None:
    (store / _LIST).write_text("[]")
    change(store, lambda m: m["files"].update({_LIST: entry_of(store / _LIST)}))


simple("tokens whose list is none", _no_list, pulled)
simple("a part without corpus", lambda s: change(s, lambda m: m.pop("corpus")), part_pulled)

# --- stores: shards ---


def _index(change_index: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change the index of shard 1, whose checksum is made to agree. One frame a shard."""

    def edit(store: Path) -> None:
        data = (store / "activations/c/1/0").read_bytes()
        frames = load(store / "manifest.json")["train"]["layout"]
        n = frames["shard_rows"] // frames["chunk_rows"]
        index = np.frombuffer(data[-16 * n - 4 : -4], "<u8").reshape(n, 2).copy()
        change_index(index)
        shard_file(store, "activations", data[: -16 * n - 4] + with_crc(index.tobytes()))

    return edit


def _set(place: tuple[int, int], value: int) -> Callable[[Any], None]:
    def put(index: Any) -> None:
        index[place] = value

    return put


simple("a frame that begins outside the file", _index(_set((0, 0), 1 << 50)))
simple("a frame of 2^63 bytes", _index(_set((0, 1), 1 << 63)), is_huge=True)
simple(
    "frames whose places overflow",
    _index(lambda i: i.__setitem__((0, slice(None)), [2**64 - 2, 8])),
)
simple("a frame of no bytes", _index(_set((0, 1), 0)))
simple("a frame of one byte", _index(_set((0, 1), 1)))


@kind("a frame of 8 GB in a file with a hole", is_huge=True)
def _hole(good: Path, inside: Path) -> list[str]:
    store = copied(good, inside)
    n_bytes = 8 << 30
    sizes = load(store / "manifest.json")["train"]["layout"]
    n = sizes["shard_rows"] // sizes["chunk_rows"]
    index = np.full((n, 2), 0, "<u8")
    index[:, 1] = n_bytes
    with (store / "activations/c/1/0").open("wb") as file:
        file.truncate(n_bytes)
        file.seek(n_bytes)
        file.write(with_crc(index.tobytes()))
    shard_file(store, "activations")
    return read_all(store, inside)


@kind("sources of 8 GB in a file with a hole", is_huge=True)
def _source_hole(good: Path, inside: Path) -> list[str]:
    store = copied(good, inside)
    os.truncate(store / "source/c/1", 8 << 30)
    shard_file(store, "source")
    return read_all(store, inside)


def _first_frame(edit_frame: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """Change a frame of shard 1, whose checksum and index are made to agree."""

    def edit(store: Path) -> None:
        data = bytearray((store / "activations/c/1/0").read_bytes())
        sizes = load(store / "manifest.json")["train"]["layout"]
        n = sizes["shard_rows"] // sizes["chunk_rows"]
        length = int(np.frombuffer(bytes(data[-16 * n - 4 : -4]), "<u8")[1])
        frame = bytearray(data[: length - 4])
        edit_frame(frame)
        assert len(frame) == length - 4
        data[:length] = with_crc(bytes(frame))
        shard_file(store, "activations", bytes(data))

    return edit


def _pack(form: str, at: int, *values: int) -> Callable[[bytearray], None]:
    return lambda frame: struct.pack_into(form, frame, at, *values)


simple("a blosc frame that says 2 GB", _first_frame(_pack("<I", 4, (1 << 31) - 64)), is_huge=True)
simple(
    "a blosc frame with blocks of 4 GB", _first_frame(_pack("<I", 8, (1 << 32) - 1)), is_huge=True
)
simple("a blosc frame with blocks of no bytes", _first_frame(_pack("<I", 8, 0)))
simple("a blosc frame whose blocks begin outside it", _first_frame(_pack("<I", 16, 1 << 30)))
simple("a blosc frame of another version", _first_frame(_pack("<B", 0, 99)))
simple(
    "a blosc frame of noise",
    _first_frame(lambda f: f.__setitem__(slice(24, None), os.urandom(len(f) - 24))),
)
simple("statistics of NaN", lambda s: _vector(s, np.full(32, np.nan)))
simple("statistics that are missing", lambda s: (s / "statistics/mean/c/0").unlink())
simple(
    "statistics of other bytes than recorded",
    lambda s: (s / "statistics/variance/c/0").write_bytes(bytes(260)),
)
simple(
    "statistics with a hole of 2^40 bytes",
    lambda s: os.truncate(s / "statistics/mean/c/0", 1 << 40),
    is_huge=True,
)
simple("statistics of another length", lambda s: _vector(s, np.zeros(31)), verified)


def _vector(store: Path, values: Any) -> None:
    name = "statistics/mean/c/0"
    (store / name).write_bytes(with_crc(values.astype("<f8").tobytes()))
    change(store, lambda m: m["files"].update({name: entry_of(store / name)}))
