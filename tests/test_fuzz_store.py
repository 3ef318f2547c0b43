"""A store with anything in it changed: the numbers that were written, or one of our errors.

Changes of the manifest, of corpus.json and of an SAE's config are made in the structure; those of
files in their bytes, some of them so that checksums agree. Then everything is opened and read that a
reader reads. Never another exception, and never other numbers.

SAE_PIPE_FUZZ_EXAMPLES asks for more examples than the tests make, and SAE_PIPE_FUZZ_SEED for others.
"""

# R rows, D d_in

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from sae_pipe.stages.sae.weights import read_sae, save_sae
from sae_pipe.storage import SaePipeError, open_store
from sae_pipe.storage.evalset import open_evalset
from sae_pipe.storage.evalset_writer import write_evalset
from sae_pipe.storage.manifest import read_manifest
from sae_pipe.storage.recode import recode
from sae_pipe.storage.shard import crc32c
from sae_pipe.storage.verify import content_below, find_damage, stored_files, wrong_in_manifest

from .saes import make_sae
from .test_evalset import ORIGIN, contents
from .test_evalset import rows as item_rows

EXAMPLES = int(os.environ.get("SAE_PIPE_FUZZ_EXAMPLES", "80"))
SEED = int(os.environ.get("SAE_PIPE_FUZZ_SEED", "0"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=SEED == 0,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What a stranger, or a bad disk, puts in the place of a value.
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 3, 31, 64, 2**31, 2**53, 2**63, 2**64, 10**40, -(2**63), 0.5, -0.0, 1e308,
        "", "0", "a", "../x", "/etc/passwd", "float16", "float32", "bfloat16", "lossless", "none", "compact:0.25",
        "complete", "harvesting", "\x00", "\x1b[2J", "0" * 64, "é" * 300, [], {}, [1], {"a": 1}, [[]], [None],
    ]
)  # fmt: skip
DRAW = st.data()


# --- what is read ---


def store_numbers(path: Path) -> dict[str, Any]:
    """Everything that a reader of a store takes from it."""
    store = open_store(path)
    try:
        numbers: dict[str, Any] = {
            "rows": store.read(slice(None)),
            "source": np.stack(store.source(slice(None))),
            "masked": store.masked(slice(None)),
            "heldout": store.heldout.read(0, store.heldout.n_rows),
            "heldout source": store.heldout.source(0, store.heldout.n_rows),
            "mean": store.mean,
            "variance": store.variance,
            "norm": store.mean_squared_norm,
            "digest": store.digest,
        }
        if store.has_corpus:
            for split in ("train", "heldout"):
                table = getattr(store.corpus, split)
                for part in ("tokens", "lengths", "documents", "origins", "rows"):
                    numbers[f"{split} {part}"] = getattr(table, part)(0, table.n_contexts)
    finally:
        store.close()
    return numbers


def set_numbers(path: Path) -> dict[str, Any]:
    found = open_evalset(path)
    names = (
        "item_task",
        "item_label",
        "item_group",
        "item_split",
        "item_document",
        "first_row",
        "row_token",
    )
    return {
        "rows": found.read(0, found.n_rows),
        "texts": [found.text(i) for i in range(found.n_items)],
        "tasks": found.tasks,
        **{name: getattr(found, name) for name in (*names, "row_position")},
    }  # fmt: skip


def sae_numbers(path: Path) -> dict[str, Any]:
    sae = read_sae(path, torch.device("cpu"))
    x = torch.linspace(-1, 1, 3 * sae.d_in).reshape(3, sae.d_in)
    return {
        **{name: value.numpy() for name, value in sae.state_dict().items()},
        "latents": sae.encode(x).numpy(),
        "type": type(sae).__name__,
    }


def verify_store(path: Path) -> list[Any]:
    """What `store verify` does: it must come to its end, or say what is wrong."""
    manifest = read_manifest(path)
    wrong = wrong_in_manifest(path, manifest)
    found = find_damage(content_below(path), stored_files(path, manifest))
    return found if wrong is None else [wrong, *found]


def verify_set(path: Path) -> list[Any]:
    open_evalset(path).verify()
    return []


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(np.asarray(value), np.asarray(expected[name]), equal_nan=False)
        if isinstance(value, np.ndarray)
        else value == expected[name]
        for name, value in found.items()
    )


# --- what is changed ---


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        if isinstance(child, dict | list):
            found += places(child, (*at, key))
        else:
            found.append((*at, key))
    return found


def mutate(data: st.DataObject, value: Any) -> Any:
    """One to three changes of the structure: delete, retype, negate, grow, swap, double."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        ways = places(value)
        if not ways:
            return value
        *way, last = data.draw(st.sampled_from(ways))
        parent = value
        for key in way:
            parent = parent[key]
        old = parent[last]
        how = data.draw(st.sampled_from(("delete", "value", "number", "swap", "double", "key")))
        if how == "delete":
            del parent[last]
        elif how == "number" and type(old) in (int, float):
            parent[last] = data.draw(
                st.sampled_from([-old, old + 1, old - 1, old * 2, old * 10**6, old / 2])
            )
        elif how == "swap" and isinstance(parent, dict):
            other = data.draw(st.sampled_from(sorted(parent)))
            parent[last], parent[other] = parent[other], parent[last]
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(old))
        elif how == "key" and isinstance(parent, dict):
            parent[f"{last}x"] = parent.pop(last)
        else:
            parent[last] = copy.deepcopy(data.draw(VALUES))
    return value  # fmt: skip


def mutate_bytes(data: st.DataObject, content: bytes) -> tuple[bytes, bool]:
    """Flip, cut, add, repeat or overwrite bytes; and whether a checksum was made to agree."""
    changed, is_forged = bytearray(content), False
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        how = data.draw(st.sampled_from(("flip", "cut", "add", "zero", "ones", "move", "crc")))
        if not changed or how == "add":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        elif how == "flip":
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del changed[at : at + data.draw(st.sampled_from((1, 4, 8, 1 << 20)))]
        elif how in ("zero", "ones"):
            n = min(data.draw(st.sampled_from((1, 2, 4, 8, 64))), len(changed) - at)
            changed[at : at + n] = (b"\0" if how == "zero" else b"\xff") * n
        elif how == "move":
            changed = changed[at:] + changed[:at]
        elif len(changed) > 4:
            changed[-4:], is_forged = crc32c(bytes(changed[:-4])), True
    return bytes(changed), is_forged


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What is read, or None where it is refused; any other exception is a failure."""
    try:
        return read(path)
    except SaePipeError:
        return None


class Bench:
    """A good folder, one file of which is changed at a time and put back."""

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], dict[str, Any]],
        verify: Callable[[Path], list[Any]],
    ) -> None:
        """verify: what is wrong with the folder by its digests, or an error that says it."""
        self.path, self.read, self.verify, self.expected = path, read, verify, read(path)
        self.files = sorted(
            f.relative_to(path).as_posix()
            for f in path.rglob("*")
            if f.is_file() and f.name != ".lock"
        )
        self.whole = {name: (path / name).read_bytes() for name in self.files}

    def try_with(self, name: str, content: bytes, *, is_forged: bool = False) -> None:
        """Read with another content of one file: the same numbers or an error of ours.

        is_forged: its checksum agrees, which no accident does. Then reading may give other numbers,
        and only the SHA-256, which `verify` compares, tells.
        """
        try:
            (self.path / name).write_bytes(content)
            found = outcome(self.read, self.path)
            damage = outcome(self.verify, self.path)
            is_other = found is not None and not same(found, self.expected)
            assert not is_other or (is_forged and damage != []), name
        finally:
            (self.path / name).write_bytes(self.whole[name])


@pytest.fixture(scope="module", params=["lossless", "compact"])
def stored(
    store: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Bench:
    path = tmp_path_factory.mktemp("fuzz") / "a.zarr"
    if request.param == "lossless":
        shutil.copytree(store, path)
    else:
        recode(store, path, request.param, say=lambda line: None)
    return Bench(path, store_numbers, verify_store)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("fuzz") / "set.zarr"
    write_evalset(path, item_rows(), contents(), ORIGIN, chunk_rows=10)
    return Bench(path, set_numbers, verify_set)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("fuzz") / "run"
    path.mkdir()
    save_sae(make_sae("matryoshka"), path)
    return Bench(path, sae_numbers, lambda path: [])


# --- the tests ---


@FUZZ
@seed(SEED)
@given(data=DRAW)
def test_a_changed_manifest(stored: Bench, data: st.DataObject) -> None:
    """Provenance, times and versions may change unnoticed: nothing that is read depends on them."""
    manifest = mutate(data, json.loads(stored.whole["manifest.json"]))
    stored.try_with("manifest.json", json.dumps(manifest).encode())


@FUZZ
@seed(SEED)
@given(data=DRAW)
def test_changed_bytes_of_any_file_of_a_store(stored: Bench, data: st.DataObject) -> None:
    """zarr.json of the rows and tokenizer.json are not read for numbers; a shorter one is found."""
    name = data.draw(st.sampled_from(stored.files))
    content, is_forged = mutate_bytes(data, stored.whole[name])
    stored.try_with(name, content, is_forged=is_forged)


@FUZZ
@seed(SEED)
@given(data=DRAW)
def test_changed_tokens(stored: Bench, data: st.DataObject) -> None:
    """corpus.json and the metadata of its arrays, in their structure."""
    names = [n for n in stored.files if n.startswith("corpus/") and n.endswith(".json")]
    name = data.draw(st.sampled_from(names))
    value = mutate(data, json.loads(stored.whole[name]))
    stored.try_with(name, json.dumps(value).encode())


@FUZZ
@seed(SEED)
@given(data=DRAW)
def test_a_changed_evaluation_set(labelled: Bench, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["manifest.json", *labelled.files]))
    if name == "manifest.json" and data.draw(st.booleans()):
        content, is_forged = (
            json.dumps(mutate(data, json.loads(labelled.whole[name]))).encode(),
            False,
        )
    else:
        content, is_forged = mutate_bytes(data, labelled.whole[name])
    labelled.try_with(name, content, is_forged=is_forged)


@FUZZ
@seed(SEED)
@given(data=DRAW)
def test_a_changed_run(fitted: Bench, data: st.DataObject) -> None:
    """Weights have no checksum, so only their header and the config are changed here."""
    name = data.draw(st.sampled_from(fitted.files))
    whole = fitted.whole[name]
    if name == "config.json":
        content = json.dumps(mutate(data, json.loads(whole))).encode()
    else:
        n = 8 + int.from_bytes(whole[:8], "little")
        content = mutate_bytes(data, whole[:n])[0] + whole[n:]
    with_ours(fitted, name, content)


def with_ours(fitted: Bench, name: str, content: bytes) -> None:
    """An SAE that comes out has the sizes and finite numbers that its config asks for."""
    try:
        (fitted.path / name).write_bytes(content)
        found = outcome(fitted.read, fitted.path)
        if found is not None:
            assert all(np.isfinite(v).all() for v in found.values() if isinstance(v, np.ndarray))
    finally:
        (fitted.path / name).write_bytes(fitted.whole[name])
