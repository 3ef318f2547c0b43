"""Damaged stores: everything that is wrong is named, and repair makes it again, to the same bytes."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_pipe.stages import harvest_run, repair_rows
from sae_pipe.stages.backoff import BatchRunner
from sae_pipe.stages.plan import Rates
from sae_pipe.stages.repair import repair
from sae_pipe.storage import InputError, StoreError, open_store
from sae_pipe.storage.codecs.lossless import Lossless
from sae_pipe.storage.lock import sole_writer
from sae_pipe.storage.manifest import content_digest, read_manifest
from sae_pipe.storage.verify import stored_files, verify_store

from .harvesting import config_for, content, quiet

NO_MODEL = (
    "source/c/2",
    "masked/c/3",
    "heldout/source/c/0",
    "zarr.json",
    "heldout/zarr.json",
    "activations/zarr.json",
    "statistics/mean/c/0",
    "statistics/variance/c/0",
)
SHARDS = ("activations/c/3/0", "activations/c/11/0", "heldout/activations/c/0/0")


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """The store in a folder of its own, to be damaged."""
    return Path(shutil.copytree(store, tmp_path / "copy.zarr"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


WAYS: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "remove": Path.unlink}


def damaged(path: Path) -> list[str]:
    manifest = read_manifest(path)
    found = verify_store(path, manifest, stored_files(path, manifest))
    return sorted(damage.file.name for damage in found)


def told(path: Path, **options: Any) -> list[str]:
    said: list[str] = []
    repair(path, say=said.append, show_progress=False, **options)
    return said


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


# --- verify ---


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_verify_finds_every_damaged_file_and_no_other(
    store: Path, tmp_path: Path, data: st.DataObject
) -> None:
    names = [file.name for file in stored_files(store, read_manifest(store))]
    chosen = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(sorted(WAYS))))
    copy = tmp_path / "copy.zarr"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    for name, way in chosen.items():
        WAYS[way](copy / name)
    expected = set(chosen)
    # It lists the files of the tokens; cut off by a byte it has lost a line feed and no more.
    if chosen.get("corpus/corpus.json", "cut") != "cut":
        expected = {name for name in chosen if not name.startswith("corpus/")}
        expected |= {"corpus/corpus.json"}
    assert damaged(copy) == sorted(expected)


def test_verify_names_a_manifest_that_lies_about_rows_sizes_and_shards(copy: Path) -> None:
    def wrong(change: Callable[[dict[str, Any]], object]) -> list[str]:
        manifest = read_manifest(copy)
        change(manifest)
        return [
            damage.what for damage in verify_store(copy, manifest, stored_files(copy, manifest))
        ]

    shards = read_manifest(copy)["train"]["shards"]
    size = shards[0]["files"]["masked"]["bytes"]
    digest = "its recipe, sizes and shards do not have the digest that it gives them"
    assert wrong(lambda m: m["train"]["shards"][0]["files"]["masked"].update(bytes=7)) == [
        digest,
        f"it is whole with {size} bytes, and 7 are recorded: the record is wrong",
    ]
    assert wrong(lambda m: m["train"]["shards"].pop()) == [
        "it lists 11 train shards, and its sizes ask for 12"
    ]
    assert wrong(lambda m: m["train"]["shards"][1].update(rows=3)) == [
        "it gives train shard 1 3 rows, and its sizes ask for 512"
    ]
    assert wrong(lambda m: m["train"]["layout"].update(n_rows=5999)) == [
        "it gives train shard 11 368 rows, and its sizes ask for 367"
    ]
    assert wrong(lambda m: m["recipe"].update(seed=1)) == [digest]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "corpus/../../x", ""])
def test_a_manifest_that_names_a_file_outside_the_store_is_refused(copy: Path, name: str) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    change_manifest(copy, lambda m: m["files"].update({name: entry}))
    message = (
        f"^The manifest of {copy} is damaged: what it records of its files cannot be \\(a file "
        f"named '{name}', which is not inside the store\\). Fetch or harvest the store again.$"
    )
    with pytest.raises(StoreError, match=message):
        damaged(copy)
    with pytest.raises(StoreError, match=message):
        told(copy)


# --- repair, to the same bytes ---


def test_repair_makes_again_what_is_damaged_to_the_same_bytes_and_touches_nothing_else(
    copy: Path, store: Path
) -> None:
    for number, name in enumerate((*NO_MODEL, *SHARDS)):
        list(WAYS.values())[number % 3](copy / name)
    whole = [file for file in copy.rglob("*") if file.is_file() and file.name != ".lock"]
    before = {
        file: file.stat().st_mtime_ns
        for file in whole
        if file.relative_to(copy).as_posix() not in (*NO_MODEL, *SHARDS)
    }
    assert damaged(copy) == sorted((*NO_MODEL, *SHARDS))
    said = told(copy)
    assert said[-1] == f"{copy} is whole again: 11 files, bit for bit as they were harvested."
    assert content(copy) == content(store)
    assert (copy / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert told(copy) == [f"{copy} is whole: there is nothing to repair."]


def test_source_masked_metadata_and_statistics_need_no_model(
    copy: Path, store: Path, tmp_path: Path
) -> None:
    for name in NO_MODEL:
        (copy / name).unlink()
    change_manifest(copy, lambda m: m["request"].update(model=str(tmp_path / "gone")))
    told(copy)
    assert damaged(copy) == []
    assert {n: (copy / n).read_bytes() for n in NO_MODEL} == {
        n: (store / n).read_bytes() for n in NO_MODEL
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"drop_masked": True, "mask_p": (0.4,), "seed": 3},
        {"keep_first": True, "pack": False, "context_size": 20},
        {"codec": "compact", "hook": "mlp_out"},
        {"store_dtype": "float32", "dtype": "bfloat16", "codec": "none"},
    ],
    ids=["drop-masked", "keep-first-no-pack", "compact", "float32"],
)
def test_every_recipe_can_be_repaired_from_its_manifest_alone(
    lm: Path, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", tokens=3000, **changes)
    quiet(config)
    expected = content(config.out)
    names = ("activations/c/1/0", "source/c/1", "masked/c/1", "heldout/activations/c/0/0")
    for name in (*names, "statistics/mean/c/0"):
        flip(config.out / name)
    assert told(config.out)[-1].endswith("5 files, bit for bit as they were harvested.")
    assert content(config.out) == expected


def test_a_manifest_with_wrong_sizes_is_put_right_when_the_digests_prove_it(
    copy: Path, store: Path
) -> None:
    change_manifest(
        copy, lambda m: m["train"]["shards"][2]["files"]["activations"].update(bytes=99)
    )
    assert "The manifest's sizes are those of the files again." in told(copy)
    assert read_manifest(copy) == read_manifest(store)
    change_manifest(copy, lambda m: m["train"]["layout"].update(n_rows=5999))
    message = (
        f"^manifest.json of {copy} is not the one that was written: it gives train shard 11 368 "
        "rows, and its sizes ask for 367. Nothing else in the store says what is right: fetch that "
        "file again, or harvest the store again.$"
    )
    with pytest.raises(StoreError, match=message):
        told(copy)


# --- the tokens ---


def test_damaged_tokens_come_from_a_store_beside_it_or_not_at_all(
    copy: Path, store: Path, tmp_path: Path
) -> None:
    names = ("corpus/corpus.json", "corpus/train/tokens/c/0/0", "corpus/heldout/zarr.json")
    for name in names:
        (copy / name).write_bytes(b"")
    message = (
        f"^The tokens of {copy} are damaged \\(corpus/corpus.json\\), and no store beside it has "
        "the same ones whole. Put a store of the same text into that folder and run this again, "
        "fetch the file again, or harvest the store again.$"
    )
    with pytest.raises(StoreError, match=message):
        told(copy)
    beside = Path(shutil.copytree(store, tmp_path / "beside.zarr"))
    flip(beside / "corpus/train/tokens/c/0/0")
    with pytest.raises(StoreError, match="corpus/train/tokens/c/0/0"):
        told(copy)  # the other one is damaged in the same place
    shutil.copytree(store, tmp_path / "whole.zarr")
    flip(copy / "tokenizer.json")
    told(copy)
    assert content(copy) == content(store)


def test_the_tokenizer_comes_from_the_model_when_no_store_beside_it_has_it(
    copy: Path, store: Path
) -> None:
    (copy / "tokenizer.json").unlink()
    told(copy)
    assert content(copy) == content(store)


def test_what_cannot_be_made_again_is_said_once_everything_else_is(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", tokens=3000, codec="compact")
    quiet(config)
    names = ("statistics/relative_error/c/0", "statistics/mean/c/0", "activations/c/1/0")
    for name in names:
        flip(config.out / name)
    message = (
        f"^{config.out / names[0]} is damaged: it says what the lossy codec has cost, which cannot "
        "be counted without the rows before encoding. Fetch that file again; nothing that reads "
        "rows needs it. Everything else is repaired.$"
    )
    with pytest.raises(StoreError, match=message):
        told(config.out)
    assert damaged(config.out) == [names[0]]


# --- the model ---


def test_another_model_is_refused_before_anything_runs(
    copy: Path, lm: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(lm, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rotary_pct": 0.5}))
    flip(copy / SHARDS[0])
    message = (
        rf"^Model {other} is not the one that {copy} was harvested from: its revision is "
        r"sha256:[0-9a-f]{16}, and the store's is sha256:[0-9a-f]{16} of lm\d*\. Pass that one with "
        r"--model\.$"
    )
    with pytest.raises(InputError, match=message):
        told(copy, model=str(other))
    assert damaged(copy) == [SHARDS[0]]


def test_rows_that_were_not_harvested_are_not_made_up(copy: Path) -> None:
    flip(copy / SHARDS[0])

    def forget_model(manifest: dict[str, Any]) -> None:
        manifest["recipe"].pop("model")
        manifest["digest"] = content_digest(manifest)

    change_manifest(copy, forget_model)
    message = (
        f"^Store {copy} was not harvested by sae-pipe, or was recoded with loss since, so its rows "
        "cannot be made again. Fetch the damaged files again, or import or recode it again.$"
    )
    with pytest.raises(StoreError, match=message):
        told(copy)


def rounded_otherwise(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another processor might: every activation is off by a little."""
    run = BatchRunner._try

    def off(self: BatchRunner, tokens: torch.Tensor) -> Any:
        found = run(self, tokens)
        assert found is not None
        return {layer: values * (1 + by) for layer, values in found.items()}

    monkeypatch.setattr(BatchRunner, "_try", off)


@pytest.mark.parametrize("whole_block", [False, True], ids=["shard", "whole-block"])
def test_a_shard_that_rounds_otherwise_is_kept_and_noted_when_it_is_nearly_the_same(
    copy: Path, store: Path, monkeypatch: pytest.MonkeyPatch, whole_block: bool
) -> None:
    names = ["activations/c/2/0", "activations/c/3/0"][: 1 + whole_block]
    for name in names:
        (copy / name).unlink()
    rounded_otherwise(0.005, monkeypatch)
    said = told(copy)
    assert "They are kept: " in said[-2]
    assert said[-1] == (
        f"{copy} is whole again: 0 files as they were harvested, and {len(names) + 2} with new "
        "digests, which the manifest lists under `repairs`."
    )
    assert damaged(copy) == []
    old, new = open_store(store), open_store(copy)
    changed = np.arange(1024, 1024 + 512 * len(names))
    np.testing.assert_allclose(new.read(changed), old.read(changed) * 1.005, rtol=2**-7)
    others = np.setdiff1d(np.arange(6000), changed)
    np.testing.assert_array_equal(new.read(others), old.read(others))
    rows = new.read(slice(None)).astype(np.float64)
    assert new.mean_squared_norm == pytest.approx((rows**2).sum(axis=1).mean(), rel=1e-6)
    np.testing.assert_allclose(new.mean, rows.mean(axis=0), rtol=1e-6, atol=1e-9)
    assert new.digest == content_digest(new.manifest) != old.digest
    (note,) = new.manifest["provenance"]["repairs"]
    assert sorted(note["files"]) == [*names, "statistics/mean/c/0", "statistics/variance/c/0"]
    assert 0 < note["relative_difference"] < repair_rows.MOST_DIFFERENCE
    assert note["digest_before"] == old.digest


def test_a_shard_that_is_something_else_is_refused_and_the_store_left_as_it_was(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(copy / SHARDS[0])
    before = content(copy)
    rounded_otherwise(0.5, monkeypatch)
    message = (
        rf"^1 shards of {copy} came out with other digests than were recorded, here on .*, cpu, and "
        r"[\d,]+ rows that are whole differ by [\d.]+ \(relative squared error; at most 0\.005 is "
        r"accepted\)\. The store is left as it was\. Repair it on the hardware and with the versions "
        r"that `sae-pipe store info` shows, or harvest it again\.$"
    )
    with pytest.raises(StoreError, match=message):
        told(copy)
    assert {name: data for name, data in content(copy).items() if ".repair" not in name} == before


def test_frames_of_another_library_version_are_the_same_rows(
    copy: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(copy / SHARDS[0])
    encode = Lossless.encode

    def other(self: Lossless, values: Any) -> list[bytes]:
        from numcodecs.blosc import Blosc

        return (
            [bytes(Blosc("zstd", 5, 1, 1 << 20).encode(values))]
            if values.any()
            else encode(self, values)
        )

    monkeypatch.setattr(Lossless, "encode", other)
    said = told(copy)
    assert "differ by 0 (relative squared error)" in said[-2]
    np.testing.assert_array_equal(
        open_store(copy).read(slice(None)), open_store(store).read(slice(None))
    )


# --- killed, locked, unfinished ---


def _repair_in_child(path: Path, die_at: int, events: Any) -> None:
    def counted(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            events.value += 1
            if events.value == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    torch.set_num_threads(1)
    for name in ("replace", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    BatchRunner._try = counted(BatchRunner._try)  # type: ignore[method-assign]
    repair(path, say=lambda line: None, show_progress=False)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_repair_that_is_killed_at_any_instant_can_be_run_again(copy: Path, store: Path) -> None:
    for name in (*NO_MODEL, *SHARDS):
        (copy / name).unlink()
    context = multiprocessing.get_context("fork")
    events = context.Value("q", 0, lock=False)
    rng, kills = np.random.default_rng(0), 0
    while True:
        events.value = 0
        process = context.Process(
            target=_repair_in_child, args=(copy, int(rng.integers(1, 12)), events)
        )
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        assert kills < 60
    assert kills >= 5
    assert content(copy) == content(store)
    assert (copy / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()


def test_a_store_that_is_being_written_is_not_repaired(copy: Path) -> None:
    flip(copy / SHARDS[0])
    with sole_writer(copy, "Store"):
        message = rf"^Store {copy} is being written by another process \(pid \d+\)\. Wait for it"
        with pytest.raises(InputError, match=message):
            told(copy)


def test_damaged_shards_of_an_unfinished_store_are_made_by_the_harvest(
    lm: Path, text: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr")
    run, seen = BatchRunner._try, []

    def interrupted(self: BatchRunner, tokens: torch.Tensor) -> Any:
        seen.append(1)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return run(self, tokens)

    monkeypatch.setattr(BatchRunner, "_try", interrupted)
    monkeypatch.setattr(
        harvest_run, "measure", lambda *_: Rates(tokens_per_s=1e3, bytes_per_value=1.4)
    )
    with pytest.raises(KeyboardInterrupt):
        quiet(config)
    monkeypatch.setattr(BatchRunner, "_try", run)
    sealed = sorted((config.out / ".commits/train").glob("*.json"))
    assert sealed
    assert told(config.out) == [
        f"The sealed shards of {config.out} are whole: there is nothing to repair."
    ]
    flip(config.out / "activations/c/0/0")
    assert told(config.out) == [
        f"{config.out} is unfinished: 1 damaged shards do not count as sealed any more. Run the "
        "`sae-pipe harvest` command that began it once more; it makes them again."
    ]
    quiet(config)
    assert content(config.out) == content(store)
