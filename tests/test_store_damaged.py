"""Stores that were damaged or made up: one sentence, never a traceback or a wrong number."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage import ActivationStore, DiskError, StoreError, open_store
from sae_pipe.storage.lock import sole_writer
from sae_pipe.storage.manifest import content_digest
from sae_pipe.storage.shard import crc32c, index_bytes
from sae_pipe.storage.verify import wrong_in_manifest

Change = Callable[[dict[str, Any]], object]

CHANGES: dict[str, Change] = {
    "no shards": lambda m: m["train"].pop("shards"),
    "too few shards": lambda m: m["train"]["shards"].pop(),
    "shards is a number": lambda m: m["train"].update(shards=4),
    "a shard is a list": lambda m: m["train"]["shards"].__setitem__(0, []),
    "a shard without files": lambda m: m["train"]["shards"][0].pop("files"),
    "a shard without its source": lambda m: m["train"]["shards"][0]["files"].pop("source"),
    "bytes is text": lambda m: m["train"]["shards"][0]["files"]["source"].update(bytes="8"),
    "bytes below zero": lambda m: m["train"]["shards"][0]["files"]["source"].update(bytes=-8),
    "no digest": lambda m: m["train"]["shards"][0]["files"]["source"].pop("sha256"),
    "no layout": lambda m: m["heldout"].pop("layout"),
    "a width that cannot be": lambda m: m["train"]["layout"].update(d_in=10**12),
    "more rows than there can be": lambda m: m["train"]["layout"].update(n_rows=10**18),
    "rows below zero": lambda m: m["train"]["layout"].update(n_rows=-1),
    "rows as a fraction": lambda m: m["train"]["layout"].update(n_rows=0.5),
    "chunks that do not divide shards": lambda m: m["train"]["layout"].update(chunk_rows=3),
    "a size that is unknown": lambda m: m["train"]["layout"].update(depth=3),
    "an unknown codec": lambda m: m.update(codec="zip"),
    "no statistics": lambda m: m.pop("statistics"),
    "a norm that is text": lambda m: m["statistics"].update(mean_squared_norm="large"),
    "no recipe": lambda m: m.pop("recipe"),
    "a format version that is text": lambda m: m.update(format_version="1"),
    "another format": lambda m: m.update(format="zip"),
    "a state that is unknown": lambda m: m.update(state="almost"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_manifest_is_refused_in_one_sentence(
    small_store: ActivationStore, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(small_store.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    CHANGES[name](manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=str(copy)):
        open_store(copy)
    for command, codes in (("info", (0, 2)), ("verify", (2,)), ("repair", (2,))):
        result = CliRunner().invoke(app, ["store", command, str(copy)])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.exit_code in codes


@pytest.mark.parametrize("file", ["manifest.json", "corpus/corpus.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "", "[]", "null", "{"])
def test_json_that_is_none_of_ours_is_refused_in_one_sentence(
    small_store: ActivationStore, tmp_path: Path, file: str, content: str
) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(small_store.path, copy)
    (copy / file).write_text(content)
    with pytest.raises(StoreError, match=str(copy)):
        assert open_store(copy).corpus


def damaged_copy(store: ActivationStore, folder: Path) -> Path:
    return Path(shutil.copytree(store.path, folder / "copy.zarr"))


def repairs(path: Path) -> str:
    return f"Run `sae-pipe store repair {path}`: it makes damaged files again and touches nothing else."


def test_a_chunk_that_the_index_calls_absent_is_an_error_and_never_a_fill_value(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = damaged_copy(small_store, tmp_path)
    file = copy / "activations/c/2/0"
    data = bytearray(file.read_bytes())
    index = bytearray(data[-index_bytes(4) : -4])
    index[16:32] = b"\xff" * 16  # a valid index, as a Zarr writer leaves it that skips a chunk
    data[-index_bytes(4) :] = index + crc32c(bytes(index))
    file.write_bytes(data)
    message = f"Shard 2 of {copy} is damaged: activations/c/2/0: its index lacks a chunk. "
    with pytest.raises(StoreError, match=f"^{re.escape(message + repairs(copy))}$"):
        open_store(copy).read(slice(2048, 2049))
    with (
        open_store(copy).batches(4096) as batches,
        pytest.raises(StoreError, match=r"^Shard 2 of "),
    ):
        next(batches)


@pytest.mark.parametrize("array", ["source", "masked"])
def test_a_flipped_bit_in_source_or_masked_is_named(
    small_store: ActivationStore, tmp_path: Path, array: str
) -> None:
    copy = damaged_copy(small_store, tmp_path)
    file = copy / array / "c/3"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = f"Shard 3 of {copy} is damaged: {array}/c/3: a chunk fails its checksum. "
    store = open_store(copy)
    read = store.source if array == "source" else store.masked
    with pytest.raises(StoreError, match=f"^{re.escape(message + repairs(copy))}$"):
        read([3500])


@pytest.mark.parametrize("array", ["activations", "source", "masked"])
def test_a_missing_file_of_a_shard_is_named_when_the_store_is_opened(
    small_store: ActivationStore, tmp_path: Path, array: str
) -> None:
    copy = damaged_copy(small_store, tmp_path)
    name = f"{array}/c/1/0" if array == "activations" else f"{array}/c/1"
    (copy / name).unlink()
    message = f"Shard 1 of {copy} is damaged: {name}: it is missing. {repairs(copy)}"
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        open_store(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["train"]["shards"][1]["files"]["activations"].update(bytes=77),
            "Shard 1 of {copy} is damaged: activations/c/1/0: it has {size} bytes instead of 77. "
            "{repairs}",
        ),
        (
            lambda m: m["train"]["layout"].update(n_rows=9000),
            "The manifest of {copy} lists 4 train shards, and its sizes ask for 9. "
            "Fetch or harvest the store again.",
        ),
        (
            # Its shards suffice, but the last rows of the last one would be padding.
            lambda m: m["train"]["layout"].update(n_rows=4000),
            "The manifest of {copy} is damaged or names what this sae-pipe does not know (shard 3 "
            "has 1024 rows, and the sizes ask for 928). Fetch or harvest the store again.",
        ),
        (
            lambda m: m.update(format_version=9),
            "Store {copy} has format version 9, and this sae-pipe reads up to 1. "
            "Upgrade it: pip install --upgrade sae-pipe.",
        ),
    ],
    ids=["bytes", "rows", "rows of a shard", "future"],
)
def test_a_manifest_that_lies_or_is_of_the_future_is_refused(
    small_store: ActivationStore, tmp_path: Path, change: Change, message: str
) -> None:
    copy = damaged_copy(small_store, tmp_path)
    size = (copy / "activations/c/1/0").stat().st_size
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    expected = message.format(copy=copy, size=f"{size:,}", repairs=repairs(copy))
    with pytest.raises(StoreError, match=f"^{re.escape(expected)}$"):
        open_store(copy)


def test_a_shard_size_that_lies_takes_no_memory(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = damaged_copy(small_store, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    split = manifest["train"]
    split["layout"] |= {"n_rows": 1024, "shard_rows": 1 << 27, "block_rows": 1 << 27}
    split["shards"] = split["shards"][:1]
    manifest["statistics"]["rows"] = 1024
    manifest["digest"] = content_digest(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    store = open_store(copy)
    for read, file, what in (
        (store.read, "activations/c/0/0", "it is smaller than the index of its chunks"),
        (store.source, "source/c/0", f"frame holds 8192 bytes where {1 << 30} belong"),
        (store.masked, "masked/c/0", f"frame holds 1024 bytes where {1 << 27} belong"),
    ):
        message = f"Shard 0 of {copy} is damaged: {file}: {what}. {repairs(copy)}"
        with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
            read(slice(0, 4))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.update(codec="none"), "it names the codec none, and its recipe another one"),
        (
            lambda m: m["statistics"].update(mean_squared_norm=0.5),
            "it gives mean_squared_norm as 0.5, and statistics/ says ",
        ),
        (
            lambda m: m["statistics"].update(rows=5),
            "it gives the statistics of 5 rows, and has others",
        ),
    ],
    ids=["codec", "norm", "rows"],
)
def test_what_the_digest_of_a_manifest_does_not_cover_is_compared_with_what_it_does(
    store: Path, tmp_path: Path, change: Change, what: str
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy.zarr"))
    manifest = json.loads((copy / "manifest.json").read_text())
    assert wrong_in_manifest(copy, manifest) is None
    change(manifest)
    found = wrong_in_manifest(copy, manifest)
    assert found is not None
    assert found.startswith(what)
    mean = copy / "statistics/mean/c/0"
    mean.write_bytes(bytes(mean.stat().st_size))  # then it says nothing against the manifest
    assert (wrong_in_manifest(copy, manifest) is None) == what.startswith("it gives")


# --- a folder that cannot be written ---


@pytest.fixture
def read_only(small_store: ActivationStore, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk that cannot be written, with a copy of a store in it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and subprocess.run(mount, check=False, capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("a disk can only be mounted by root")
    try:
        shutil.copytree(small_store.path, disk / "copy.zarr")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_store_on_a_read_only_disk_can_be_read_and_checked_but_not_written(
    read_only: Path,
) -> None:
    store = read_only / "copy.zarr"
    assert open_store(store).read(slice(0, 4)).shape == (4, 16)
    assert CliRunner().invoke(app, ["store", "verify", str(store)]).exit_code == 0
    cannot = (
        "could not be written (Read-only file system). Choose a folder that this user can write."
    )
    fit = ["fit", "--store", str(store), "--l0", "4", "--d-sae", "32", "--batch-size", "256"]
    for command, what in (
        (["store", "repair", str(store)], f"{store} {cannot}"),
        ([*fit, "--out", str(read_only / "run")], f"{read_only / 'run'} {cannot}"),
    ):
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, result.stderr) == (2, f"Error: {what}\n")


def test_a_disk_without_a_byte_for_the_lock_is_one_sentence(read_only: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(read_only)], check=True)
    rest = read_only / "rest"
    with suppress(OSError), rest.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    place = read_only / "new.zarr"
    with (
        pytest.raises(DiskError, match=f"^The disk is full: {place} could not be written"),
        sole_writer(place, "Store"),
    ):
        pass
    rest.unlink()
    with sole_writer(place, "Store"):
        pass
