"""A store recoded: the same rows in the same places, whatever happens on the way."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_pipe.stages.harvest import harvest
from sae_pipe.storage import ActivationStore, DiskError, InputError, StoreError, open_store
from sae_pipe.storage.codecs import CODECS
from sae_pipe.storage.codecs.none import NoCompression
from sae_pipe.storage.lock import sole_writer
from sae_pipe.storage.recode import recode
from sae_pipe.storage.values import VALUE_TYPES

from .copying import content, killed_until_done, run_in_child, runs_in_memory
from .harvesting import config_for, quiet


def quietly(source: Path, target: Path, codec: str, store_dtype: str | None = None) -> None:
    recode(source, target, codec, store_dtype, say=lambda line: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, small_store: ActivationStore) -> Path:
    """The small store without compression, whose shards have equal sizes."""
    target = tmp_path_factory.mktemp("plain") / "plain.zarr"
    quietly(small_store.path, target, "none")
    return target


CASES = [
    (name, dtype)
    for name in CODECS
    for dtype in VALUE_TYPES
    if (name, dtype) != ("lossless", "bfloat16")
]


@pytest.mark.parametrize(("codec", "dtype"), CASES)
def test_every_codec_keeps_rows_sources_masks_tokens_and_places(
    store: Path, tmp_path: Path, codec: str, dtype: str
) -> None:
    target = tmp_path / "copy.zarr"
    quietly(store, target, codec, dtype)
    old, new = open_store(store), open_store(target)
    for name in ("n_rows", "shard_rows", "block_rows"):
        assert new.manifest["train"]["layout"][name] == old.manifest["train"]["layout"][name]
    rows = old.read(slice(None))
    rounded = np.empty_like(rows)
    new._codec.values.to_floats(new._codec.values.of_floats(rows), rounded)
    np.testing.assert_array_equal(new.read(slice(None)), new._codec.kept(rounded))
    for found, expected in zip(new.source(slice(None)), old.source(slice(None)), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(new.masked(slice(None)), old.masked(slice(None)))
    assert old.masked(slice(None)).any()
    n = old.heldout.n_rows
    np.testing.assert_array_equal(new.heldout.source(0, n), old.heldout.source(0, n))
    assert np.abs(new.heldout.read(0, n) - old.heldout.read(0, n)).max() <= 0.6 * (
        new._codec.served.step if new._codec.is_lossy else 0.01
    )
    assert new.corpus.digest == old.corpus.digest
    new.corpus.verify()
    tokenizer = (store / "tokenizer.json").read_bytes()
    assert (target / "tokenizer.json").read_bytes() == tokenizer
    assert new.manifest["shuffle"] == old.manifest["shuffle"]
    origin = new.manifest["provenance"]["recoded"]
    assert (origin["digest"], origin["encoding"]["codec"]) == (old.digest, "lossless")


@pytest.mark.parametrize("codec", ["compact:0.5", "none"])
def test_a_recoded_harvest_is_byte_for_byte_the_harvest_with_that_codec(
    lm: Path, text: Path, tmp_path: Path, codec: str
) -> None:
    config = config_for(lm, text, tmp_path / "lossless.zarr", tokens=None)  # all rows of the text
    quiet(config)
    other = config_for(lm, text, tmp_path / "harvested.zarr", tokens=None, codec=codec)
    quiet(other)
    quietly(config.out, tmp_path / "recoded.zarr", codec)
    expected, found = content(other.out), content(tmp_path / "recoded.zarr")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    said: list[str] = []
    again = config_for(lm, text, tmp_path / "recoded.zarr", tokens=None, codec=codec)
    harvest(again, say=said.append, show_progress=False)
    assert said == [f"{again.out} is complete: 21,969 rows of this recipe. Nothing to do."]


def test_a_copy_does_not_stand_inside_its_source(store: Path) -> None:
    before = content(store)
    inside = store / "copies" / "b.zarr"
    message = f"{inside} would stand inside {store}, which is left alone. Pass another place for the copy."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        quietly(store, inside, "none")
    assert content(store) == before


def test_what_a_lossy_codec_has_taken_stays_said(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    coarse, back = tmp_path / "coarse.zarr", tmp_path / "back.zarr"
    quietly(store, coarse, "compact:0.5")
    said: list[str] = []
    recode(coarse, back, "lossless", "float32", say=said.append)
    lost = open_store(coarse).manifest["encoding"]
    assert 0.015 < lost["error"]["relative"] < 0.025
    assert said[1] == (
        f"note      {coarse} has lost a relative error of {lost['error']['relative']:.3g} to codec "
        "compact:0.5, which stays lost; the copy's own error comes on top"
    )
    assert said[2].endswith(f"; relative error {lost['error']['relative']:.3g} before.")
    manifest = open_store(back).manifest
    assert manifest["encoding"]["before"] == {"codec": "compact:0.5", **lost}
    np.testing.assert_array_equal(
        open_store(back).read(slice(None)), open_store(coarse).read(slice(None))
    )
    config = config_for(lm, text, back, codec="lossless", store_dtype="float32")
    message = (
        f"Store {back} was begun with another recipe: recoded_from is compact:0.5 in bfloat16 there "
        "and None here. Pass the same flags to go on with it, or another --out."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        quiet(config)
    twice = tmp_path / "twice.zarr"
    quietly(coarse, twice, "compact:1")
    assert open_store(twice).recipe["recoded_from"] == "compact:0.5 in bfloat16"
    quietly(twice, tmp_path / "thrice.zarr", "none")
    assert open_store(tmp_path / "thrice.zarr").recipe["recoded_from"] == (
        "compact:0.5 in bfloat16, then compact:1 in bfloat16"
    )


def test_numbers_that_are_rounded_twice_are_no_harvest(store: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recode(store, tmp_path / "half.zarr", "lossless", "float16", say=said.append)
    assert said[1] == "note      values that were rounded to bfloat16 are rounded again, to float16"
    assert open_store(tmp_path / "half.zarr").recipe["recoded_from"] == "lossless in bfloat16"


def test_a_harvest_does_not_go_on_with_an_unfinished_copy(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.zarr"
    assert run_in_child(lambda: quietly(store, copy, "none"), 60)[0] != 0
    assert json.loads((copy / "manifest.json").read_text())["state"] == "harvesting"
    message = (
        f"Store {copy} was not made by a harvest, so it cannot be gone on with. Pass another --out."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        quiet(config_for(lm, text, copy, codec="none"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_random_instants_a_copy_has_the_bytes_of_one_never_interrupted(
    store: Path, tmp_path: Path
) -> None:
    whole, target = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    code, events = run_in_child(lambda: quietly(store, whole, "compact"))
    assert code == 0
    assert killed_until_done(lambda: quietly(store, target, "compact"), events, seed=1) >= 6
    assert content(target) == content(whole)


# --- refused ---


def refuses(message: str, run: Callable[[], object], error: type[Exception] = InputError) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        run()


def test_pointless_copies_are_refused(small_store: ActivationStore, tmp_path: Path) -> None:
    path = small_store.path
    refuses(
        f"{path} cannot be recoded into itself. Pass another place for the copy; the store can be "
        "deleted once that is complete.",
        lambda: quietly(path, path.parent / "." / path.name, "none"),
    )
    refuses(
        f"Store {path} is already stored with codec lossless in bfloat16. Pass another --codec or "
        "--store-dtype.",
        lambda: quietly(path, tmp_path / "b.zarr", "lossless"),
    )
    compact = tmp_path / "compact.zarr"
    quietly(path, compact, "compact")
    refuses(
        f"Store {compact} is already stored with codec compact:0.25 in bfloat16. Pass another "
        "--codec or --store-dtype.",
        lambda: quietly(compact, tmp_path / "b.zarr", "compact:0.25", "float32"),
    )
    assert not (tmp_path / "b.zarr").exists()


def test_what_stands_in_the_way_is_left_alone(
    small_store: ActivationStore, plain: Path, store: Path, tmp_path: Path
) -> None:
    source = small_store.path
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    refuses(
        f"{tmp_path / 'mine'} exists and is not an activation store. Pass another place for the "
        "copy, or move it away.",
        lambda: quietly(source, tmp_path / "mine", "none"),
    )
    refuses(
        f"{store} is not a copy of {source}: it is another store. Pass another place for the copy, "
        "or move it away.",
        lambda: quietly(source, store, "none"),
    )
    refuses(
        f"{plain} is not a copy of {store}: it is one of the store with digest "
        f"{small_store.digest}. Pass another place for the copy, or move it away.",
        lambda: quietly(store, plain, "none"),
    )
    refuses(
        f"{plain} was begun with codec none in bfloat16. Pass the same --codec and --store-dtype to "
        "go on with it, or another place for the copy.",
        lambda: quietly(source, plain, "compact"),
    )
    said: list[str] = []
    recode(source, plain, "none", say=said.append)
    assert said == [f"{plain} is complete: 4,096 rows in codec none, bfloat16. Nothing to do."]


def test_a_second_writer_is_refused(small_store: ActivationStore, tmp_path: Path) -> None:
    message = r"^Store .*b.zarr is being written by another process \(pid \d+\)\. Wait"
    with sole_writer(tmp_path / "b.zarr", "Store"), pytest.raises(InputError, match=message):
        quietly(small_store.path, tmp_path / "b.zarr", "none")


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_pipe.storage.disk.free_bytes", lambda path: 1000)
    refuses(
        f"The disk is too small: {tmp_path / 'b.zarr'} needs about 348 kB, and 1 kB are free at "
        f"{tmp_path}. Free space there, or pass a place on a larger disk.",
        lambda: quietly(small_store.path, tmp_path / "b.zarr", "none"),
        DiskError,
    )
    assert not (tmp_path / "b.zarr" / "manifest.json").exists()


def test_files_of_the_source_that_are_not_the_recorded_ones_are_not_used(
    plain: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source.zarr"
    shutil.copytree(plain, source)
    first, second = (source / "activations" / "c" / str(i) / "0" for i in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())  # every checksum inside it is right
    refuses(
        f"{first} does not have the digest that the manifest of {source} records. Fetch that file "
        "again, or delete the store and harvest it again.",
        lambda: quietly(source, tmp_path / "b.zarr", "lossless"),
        StoreError,
    )
    assert not list((tmp_path / "b.zarr" / ".commits" / "train").glob("*.json"))
    first.write_bytes(kept)
    quietly(source, tmp_path / "b.zarr", "lossless")  # and goes on once it is put right
    np.testing.assert_array_equal(
        open_store(tmp_path / "b.zarr").read(slice(None)), open_store(plain).read(slice(None))
    )


def test_a_shard_that_does_not_read_back_is_never_committed(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = NoCompression.encode

    def with_a_wrong_bit(self: NoCompression, values_RD: Any) -> list[bytes]:
        frame = bytearray(encode(self, values_RD)[0])
        frame[2] ^= 1
        return [bytes(frame)]

    target = tmp_path / "b.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(NoCompression, "encode", with_a_wrong_bit)
        refuses(
            f"Shard 0 of {target} does not read back as it was written. The disk or the memory of "
            "this machine is not to be trusted; run the same command again, elsewhere if it "
            "happens twice.",
            lambda: quietly(small_store.path, target, "none"),
            StoreError,
        )
    assert not list((target / ".commits" / "train").glob("*.json"))
    quietly(small_store.path, target, "none")
    np.testing.assert_array_equal(
        open_store(target).read(slice(None)), small_store.read(slice(None))
    )


def test_values_beyond_float16_are_named(
    tmp_path: Path, make_store: Callable[..., ActivationStore]
) -> None:
    rows = np.ones((600, 8), np.float32)
    rows[517, 3] = 70_000
    source = make_store(tmp_path / "a.zarr", rows, rows[:4]).path
    refuses(
        f"Row 517 of {source} holds 70144, and float16 ends at 65504. Pass --store-dtype bfloat16 "
        "or float32.",
        lambda: quietly(source, tmp_path / "b.zarr", "lossless", "float16"),
    )


def test_memory_does_not_grow_with_the_store(
    tmp_path: Path, make_store: Callable[..., ActivationStore]
) -> None:
    def recoding(name: str, n_rows: int) -> Callable[[], object]:
        rows = np.resize(np.arange(4096, dtype=np.float32), (n_rows, 512))
        source = make_store(tmp_path / f"{name}.zarr", rows, rows[:4]).path
        target = tmp_path / f"{name}-again.zarr"
        return partial(recode, source, target, "none", "float32", say=str)

    small, large = recoding("small", 2000), recoding("large", 60_000)  # 123 MB of float32
    assert runs_in_memory(large, 84 << 20, small)
    assert open_store(tmp_path / "large-again.zarr").n_rows == 60_000
