"""Tokens of stores, and folders to pull into, as a stranger might send them.

Importing this adds them to `hostile.KINDS`.
"""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from .hostile import (
    CANARY,
    Evil,
    change_corpus,
    copied,
    corpus_file,
    entry_of,
    kind,
    load,
    read_tokens,
    simple,
    with_crc,
)

# --- stores: tokens ---

METADATA = "train/tokens/zarr.json"


@kind("tokens packed with a pickle")
def _pickled_tokens(good: Path, inside: Path) -> list[str]:
    """Metadata of Zarr version 2 with two filters: zarr-python takes the type from one, and runs both."""
    store = copied(good, inside)
    sizes = load(store / "corpus" / METADATA)["shape"]
    chunk = pickle.dumps([Evil(inside.parent / CANARY)])
    meta = {
        "zarr_format": 2, "shape": sizes, "chunks": sizes, "dtype": "|O", "order": "C",
        "fill_value": 0, "compressor": None, "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}],
    }  # fmt: skip
    tokens = store / "corpus/train/tokens"
    (tokens / ".zarray").write_text(json.dumps(meta))
    (tokens / "0.0").write_bytes(chunk)
    (tokens / "zarr.json").unlink()
    change_corpus(
        store,
        lambda info: info["files"].pop(METADATA),
        lambda info: [
            info["files"].update({f"train/tokens/{n}": entry_of(tokens / n)}) for n in ("0.0",)
        ],
    )
    return read_tokens(store)


def _metadata(**changes: Any) -> Callable[[Path], None]:
    def edit(store: Path) -> None:
        meta = load(store / "corpus" / METADATA) | changes
        corpus_file(store, METADATA, json.dumps(meta).encode())

    return edit


def _chunk(data: bytes) -> Callable[[Path], None]:
    return lambda store: corpus_file(store, "train/tokens/c/0/0", with_crc(data))


def zstd_saying(n_bytes: int) -> bytes:
    """A frame whose header says how much it holds, in 8 bytes, and one block of nothing."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + struct.pack("<Q", n_bytes) + b"\x01\0\0"


simple("tokens with another codec", _metadata(codecs=[{"name": "numcodecs.pickle"}]), read_tokens)
simple("tokens of another shape", _metadata(shape=[1 << 40, 1 << 20]), read_tokens, is_huge=True)
simple(
    "tokens in chunks of 2^50",
    _metadata(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1 << 50, 32]}}),
    read_tokens,
    is_huge=True,
)
simple(
    "a chunk of tokens that says 2^60 bytes",
    _chunk(zstd_saying(1 << 60)),
    read_tokens,
    is_huge=True,
)
simple(
    "a chunk of tokens that holds 4 GB of zeros",
    _chunk(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 27)) * 32),
    read_tokens,
    is_huge=True,
)
simple(
    "a chunk of tokens that says one thing and holds another",
    _chunk(zstd_saying(4 * 32 * (4194304 // 32))),
    read_tokens,
    is_huge=True,
)
simple(
    "corpus.json nested 500 deep",
    lambda s: (s / "corpus/corpus.json").write_text("[" * 500 + "]" * 500),
    read_tokens,
)
simple(
    "corpus.json that names a file outside",
    lambda s: change_corpus(
        s, lambda i: i["files"].update({"../../canary/new": {"bytes": 1, "sha256": "0" * 64}})
    ),
    read_tokens,
)
simple(
    "corpus.json with 2^60 contexts",
    lambda s: change_corpus(s, lambda i: i["splits"]["train"].update(contexts=1 << 60)),
    read_tokens,
    is_huge=True,
)
simple(
    "corpus.json with 2^32 contexts",
    lambda s: _contexts(s),
    read_tokens,
    is_huge=True,
)
simple(
    "corpus.json without its recipe",
    lambda s: change_corpus(s, lambda i: i.pop("recipe")),
    read_tokens,
)
simple(
    "corpus.json with a BOS token that is a list",
    lambda s: change_corpus(s, lambda i: i["recipe"]["tokenizer"].update(bos_id=[0])),
    read_tokens,
)


def _contexts(store: Path) -> None:
    """2^32 contexts, of which all metadata agree that they are there."""
    change_corpus(store, lambda i: i["splits"]["train"].update(contexts=1 << 32))
    _metadata(shape=[1 << 32, 32])(store)
    name = "train/origin/zarr.json"
    meta = load(store / "corpus" / name) | {"shape": [1 << 32]}
    corpus_file(store, name, json.dumps(meta).encode())


# --- places to write to ---


@kind("a folder to pull into whose tokens lead outside")
def _pull_link(good: Path, inside: Path) -> list[str]:
    target = inside / "mine.zarr"
    target.mkdir()
    noted = {"digest": load(good / "manifest.json")["digest"], "shards": None}
    (target / ".pulling").write_text(json.dumps(noted))
    (target / "corpus").symlink_to(inside.parent / CANARY)
    return ["store", "pull", str(good), str(target)]


@kind("a folder to pull into whose lock leads outside")
def _lock_link(good: Path, inside: Path) -> list[str]:
    target = inside / "mine.zarr"
    target.mkdir()
    (target / ".lock").symlink_to(inside.parent / CANARY / "kept")
    return ["store", "pull", str(good), str(target)]
