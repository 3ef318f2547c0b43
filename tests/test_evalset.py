"""Evaluation sets on disk: what is written is read, by zarr-python too; nothing bad is believed."""

# N rows, I items, D d_in

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_pipe.storage import InputError, StoreError
from sae_pipe.storage.evalset import EvalSet, Task, content_digest, open_evalset
from sae_pipe.storage.evalset_arrays import ARRAYS, Sizes, decode_chunk, encode_chunk
from sae_pipe.storage.evalset_writer import Contents, EvalSetWriter, Origin, write_evalset

RECIPE = {
    "model": {"name": "toy", "revision": "abc", "architecture": "gpt_neox"},
    "layer": 3,
    "hook": "resid_post",
    "dtype": "float32",
    "seed": 0,
}
ORIGIN = Origin(recipe=RECIPE, tokenizer_json='{"a": 1}')
TASKS = [
    Task("fruit", ["apple", "pear"], None, ""),
    Task("tone", ["flat", "sharp", "true"], ["loud", "soft"], "a note"),
]


def contents(**changes: Any) -> Contents:
    """Items of 1 to 3 rows: 5 of the first task and 7 of the second."""
    n_rows = [1 + i % 3 for i in range(12)]
    given: dict[str, Any] = {
        "suite": "toy",
        "pooling": "mean",
        "tasks": TASKS,
        "texts": [f"tëxt {'x' * i}" for i in range(12)],
        "item_task": [0] * 5 + [1] * 7,
        "item_label": [i % 2 for i in range(12)],
        "item_group": [-1] * 5 + [0, 1, 0, 1, -1, 0, 1],
        "item_split": [i % 3 for i in range(12)],
        "item_document": [i // 2 for i in range(12)],
        "row_item": np.repeat(np.arange(12), n_rows),
        "row_token": np.arange(sum(n_rows)) + 100,
        "row_position": np.concatenate([np.arange(n) for n in n_rows]),
    } | changes
    return Contents(**given)


def rows(n: int = 24, d_in: int = 5) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((n, d_in)).astype(np.float32) + 3


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """A set of 24 rows in chunks of 10; to be read only."""
    path = tmp_path_factory.mktemp("sets") / "toy.zarr"
    return write_evalset(path, rows(), contents(), ORIGIN, chunk_rows=10)


@pytest.fixture
def evalset(kept: EvalSet, tmp_path: Path) -> EvalSet:
    """A copy that may be damaged."""
    return open_evalset(shutil.copytree(kept.path, tmp_path / "toy.zarr"))


def test_a_set_gives_back_what_was_written(kept: EvalSet) -> None:
    given = contents()
    assert (kept.name, kept.suite, kept.pooling) == ("toy", "toy", "mean")
    assert (kept.model, kept.layer, kept.hook) == ("toy", 3, "resid_post")
    assert (kept.n_rows, kept.n_items, kept.d_in) == (24, 12, 5)
    assert kept.tasks == TASKS
    np.testing.assert_array_equal(kept.read(0, 24), rows())
    np.testing.assert_array_equal(kept.read(7, 13), rows()[7:13])
    assert kept.read(4, 4).shape == (0, 5)
    for name, array in {
        "item_task": kept.item_task,
        "item_label": kept.item_label,
        "item_group": kept.item_group,
        "item_split": kept.item_split,
        "item_document": kept.item_document,
        "row_item": kept.row_item,
        "row_token": kept.row_token,
        "row_position": kept.row_position,
    }.items():
        np.testing.assert_array_equal(array, getattr(given, name))
    assert [kept.text(i) for i in range(12)] == list(given.texts)
    assert kept.items_of(1).tolist() == [5, 6, 7, 8, 9, 10, 11]
    for item in range(12):
        own = slice(int(kept.first_row[item]), int(kept.first_row[item + 1]))
        assert np.flatnonzero(kept.row_item == item).tolist() == list(range(24))[own]
    assert kept.tokenizer_json.read_text() == '{"a": 1}'
    kept.verify()


def test_zarr_python_reads_the_same_numbers(kept: EvalSet) -> None:
    root = zarr.open_group(kept.path, mode="r")
    np.testing.assert_array_equal(root["activations"][:], kept.read(0, 24))  # type: ignore[index]
    np.testing.assert_array_equal(root["rows/item"][:], kept.row_item)  # type: ignore[index]
    np.testing.assert_array_equal(root["items/split"][:], kept.item_split)  # type: ignore[index]
    text = bytes(root["items/text"][:].tolist()).decode()  # type: ignore[index,union-attr]
    assert text == "".join(kept.text(i) for i in range(12))
    assert {name for name, _ in root.members(max_depth=None)} >= set(ARRAYS)


def test_the_digest_is_of_the_content_and_not_of_the_day(kept: EvalSet, tmp_path: Path) -> None:
    again = write_evalset(tmp_path / "a.zarr", rows(), contents(), ORIGIN, chunk_rows=10)
    assert again.digest == kept.digest
    other = rows()
    other[-1, -1] += 1
    assert write_evalset(tmp_path / "a.zarr", other, contents(), ORIGIN).digest != kept.digest


def test_items_without_labels_have_no_tasks(tmp_path: Path) -> None:
    none = np.full(12, -1)
    bare = contents(pooling="all", tasks=[], item_task=none, item_label=none, item_group=None)
    evalset = write_evalset(tmp_path / "core.zarr", rows(), bare, ORIGIN)
    assert evalset.tasks == []
    assert set(evalset.item_task.tolist()) == set(evalset.item_label.tolist()) == {-1}


@settings(max_examples=12, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=6), st.integers(1, 4))
def test_any_text_and_any_size_of_chunk_come_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk_rows: int
) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    n = len(texts)
    found = write_evalset(
        tmp_path_factory.mktemp("any") / "set.zarr",
        rows(n, 3),
        contents(
            tasks=TASKS[:1],
            texts=texts,
            item_task=np.zeros(n),
            item_label=np.zeros(n),
            item_group=None,
            item_split=np.zeros(n),
            item_document=np.arange(n),
            row_item=np.arange(n),
            row_token=np.arange(n),
            row_position=np.zeros(n),
        ),
        ORIGIN,
        chunk_rows=chunk_rows,
    )
    assert [found.text(i) for i in range(n)] == texts
    np.testing.assert_array_equal(found.read(0, n), rows(n, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"row_item": np.zeros(24)},  # items without rows
        {"item_task": [1] * 5 + [0] * 7},  # tasks out of order
        {"item_label": [2] * 12},  # a label that the first task does not name
        {"item_group": [0] * 12},  # a group where there are none
        {"item_split": [0]},
        {"pooling": "max"},
    ],
)
def test_a_builder_that_makes_nonsense_is_stopped(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        contents(**changes)


# --- going on ---


def test_a_writer_goes_on_at_the_first_chunk_that_is_missing_or_not_whole(
    kept: EvalSet, tmp_path: Path
) -> None:
    def writer() -> EvalSetWriter:
        return EvalSetWriter(tmp_path / "a.zarr", ORIGIN, contents(), d_in=5, chunk_rows=10)

    first = writer()
    assert (first.next_chunk, first.n_chunks) == (0, 3)
    first.write(rows()[:10])
    first.write(rows()[10:20])
    assert writer().next_chunk == 2
    chunk = tmp_path / "a.zarr/activations/c/1/0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    again = writer()
    assert again.next_chunk == 1
    again.write(rows()[10:20])
    again.write(rows()[20:])
    assert again.finish().digest == kept.digest


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"suite": "other"}, "another suite"), ({"texts": ["a"] * 12}, "another text_bytes")],
)
def test_a_set_that_was_begun_with_something_else_is_left_alone(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    path = tmp_path / "a.zarr"
    EvalSetWriter(path, ORIGIN, contents(), d_in=5, chunk_rows=10).write(rows()[:10])
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    message = (
        f"^Evaluation set {path} was begun with {what}. Pass what it was begun with, or another "
        "--out.$"
    )
    with pytest.raises(InputError, match=message):
        EvalSetWriter(path, ORIGIN, contents(**changes), d_in=5, chunk_rows=10)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_set_that_has_been_finished_meanwhile_is_not_written_again(evalset: EvalSet) -> None:
    message = (
        f"^Evaluation set {evalset.path} was finished by another process just now. Run the same "
        "command again to see that.$"
    )
    with pytest.raises(InputError, match=message):
        EvalSetWriter(evalset.path, ORIGIN, contents(), d_in=5, chunk_rows=10)


def test_rows_that_are_there_are_not_mixed_with_other_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    EvalSetWriter(path, ORIGIN, contents(), d_in=5, chunk_rows=10).write(rows()[:10])
    message = (
        f"^Evaluation set {path} was begun with other texts or tokens: rows/token/c/0 differs. "
        "Pass what it was begun with, or another --out.$"
    )
    with pytest.raises(InputError, match=message):
        EvalSetWriter(path, ORIGIN, contents(row_token=np.arange(24)), d_in=5, chunk_rows=10)


# --- what is not believed ---


def test_what_is_no_complete_set_is_refused(evalset: EvalSet, tmp_path: Path) -> None:
    built = r"Pass the folder that `sae-pipe eval-set build --out` wrote\.$"
    with pytest.raises(StoreError, match=f"^There is no evaluation set at {tmp_path}/no. {built}"):
        open_evalset(tmp_path / "no")
    message = f"^{tmp_path} is not an evaluation set: it has no manifest.json. {built}"
    with pytest.raises(StoreError, match=message):
        open_evalset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "sae-pipe activation store"}')
    message = (
        f"^{tmp_path} is not an evaluation set: manifest.json does not name the format "
        f"'sae-pipe evaluation set'. {built}"
    )
    with pytest.raises(StoreError, match=message):
        open_evalset(tmp_path)
    rewrite(evalset, lambda manifest: manifest.update(format_version=2))
    message = (
        f"^Evaluation set {evalset.path} has format version 2, and this sae-pipe reads up to 1. "
        "Upgrade it: pip install --upgrade sae-pipe.$"
    )
    with pytest.raises(StoreError, match=message):
        open_evalset(evalset.path)
    rewrite(evalset, lambda manifest: manifest.update(format_version=1, state="building"))
    message = (
        f"^Evaluation set {evalset.path} is not finished: its state is 'building'. Run the "
        "`sae-pipe eval-set build` command that began it once more; it goes on where it stopped.$"
    )
    with pytest.raises(StoreError, match=message):
        open_evalset(evalset.path)


def rewrite(
    evalset: EvalSet, change: Callable[[dict[str, Any]], Any], *, sign: bool = False
) -> None:
    """Change the manifest. sign: make its digest right again, as someone hostile would."""
    file = evalset.path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    if sign:
        manifest["digest"] = content_digest(manifest)
    file.write_text(json.dumps(manifest))


def test_a_changed_manifest_does_not_match_its_digest(evalset: EvalSet) -> None:
    rewrite(evalset, lambda manifest: manifest["tasks"][0].update(name="other"))
    message = (
        f"^Evaluation set {evalset.path} is damaged: manifest.json: it does not match its own "
        "digest. Remove it and build or fetch it again.$"
    )
    with pytest.raises(StoreError, match=message):
        open_evalset(evalset.path)


def _more_rows(manifest: dict[str, Any]) -> None:
    manifest["n_rows"] = 2**27


def _escape(manifest: dict[str, Any]) -> None:
    manifest["files"]["../../etc/passwd"] = manifest["files"]["tokenizer.json"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_more_rows, "its sizes ask for more than the 28 files it lists"),
        (lambda m: m.update(n_rows=-1), "n_rows is -1"),
        (lambda m: m.update(n_rows=True), "n_rows is True"),
        (lambda m: m.update(d_in=10**9), "a chunk of 10 rows of 1000000000 values"),
        (lambda m: m.update(n_items=2**60), "more rows, items or text than any set that is built"),
        (lambda m: m.update(pooling="max"), "its pooling is 'max'"),
        (_escape, r"it names the file '\.\./\.\./etc/passwd'"),
        (lambda m: m["files"].pop("tokenizer.json"), "tokenizer.json is not among its files"),
        (lambda m: m["files"].pop("rows/item/c/0"), "rows/item/c/0 is not among its files"),
        (lambda m: m["files"]["zarr.json"].update(bytes="x"), "file zarr.json has"),
        (lambda m: m["files"]["zarr.json"].update(sha256="x"), "file zarr.json has"),
        (lambda m: m["tasks"].append(3), "not subscriptable"),
        (lambda m: m["tasks"][0].update(classes=[1]), r"a task has \[1\]"),
        (lambda m: m.update(tasks={}), "its layer is no number or its tasks are no list"),
        (lambda m: m.pop("recipe"), "'recipe'"),
        (lambda m: m["recipe"].update(model=1), "its recipe or provenance is not an object"),
        (lambda m: m["recipe"]["model"].pop("name"), "'name'"),
        (lambda m: m.update(dropped={"a": "b"}), "it counts what is no number"),
    ],
)
def test_a_hostile_manifest_is_refused_before_memory_is_taken(
    evalset: EvalSet, change: Callable[[dict[str, Any]], Any], what: str
) -> None:
    try:
        rewrite(evalset, change, sign=True)
    except KeyError:
        rewrite(evalset, change)
    with pytest.raises(StoreError, match=f"is damaged: manifest.json: .*{what}"):
        open_evalset(evalset.path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00"])
def test_a_manifest_that_is_no_json_is_refused(evalset: EvalSet, text: str) -> None:
    (evalset.path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"is damaged: manifest\.json: "):
        open_evalset(evalset.path)


@pytest.mark.parametrize("name", ["activations/c/1/0", "rows/item/c/0", "items/text/c/0"])
def test_a_flipped_bit_is_found_when_it_is_read(evalset: EvalSet, name: str) -> None:
    file = evalset.path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    opened = open_evalset(evalset.path)
    message = (
        f"^Evaluation set {evalset.path} is damaged: {name}: a chunk fails its checksum. Remove it "
        "and build or fetch it again.$"
    )
    with pytest.raises(StoreError, match=message):
        _ = opened.read(0, 24), opened.row_item, opened.text(3)
    with pytest.raises(StoreError, match=f"{name} does not have the SHA-256 recorded for it"):
        opened.verify()


def test_a_file_that_is_missing_or_cut_is_found_when_the_set_is_opened(evalset: EvalSet) -> None:
    file = evalset.path / "items/label/c/0"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    what = f"items/label/c/0 has {len(data) - 1} bytes instead of {len(data)}"
    with pytest.raises(StoreError, match=what):
        open_evalset(evalset.path)
    file.unlink()
    with pytest.raises(StoreError, match="items/label/c/0 is missing"):
        open_evalset(evalset.path)


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("items/label", [9] * 12, "items/label has labels that no task names"),
        ("items/task", [0] * 12, "items/task is not the tasks one after another"),
        ("items/split", [7] * 12, "items/split has 7"),
        ("rows/item", list(range(24)), "rows/item is not the items one after another"),
        ("items/text_end", [10**9] * 12, "items/text_end does not cut items/text"),
    ],
)
def test_arrays_that_contradict_one_another_are_refused(
    evalset: EvalSet, name: str, values: list[int], what: str
) -> None:
    sizes = Sizes(n_rows=24, n_items=12, text_bytes=150, d_in=5, chunk_rows=10)
    file = evalset.path / name / "c/0"
    file.write_bytes(encode_chunk(np.array(values), sizes, name))
    n_bytes = file.stat().st_size
    rewrite(evalset, lambda m: m["files"][f"{name}/c/0"].update(bytes=n_bytes), sign=True)
    opened = open_evalset(evalset.path)
    with pytest.raises(StoreError, match=what):
        _ = opened.item_task, opened.item_label, opened.item_split, opened.row_item, opened.text(0)


def test_a_frame_of_another_size_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    small = Sizes(n_rows=4, n_items=1, text_bytes=1, d_in=5, chunk_rows=4)
    large = Sizes(n_rows=4, n_items=1, text_bytes=1, d_in=5, chunk_rows=400_000)
    file = tmp_path / "chunk"
    file.write_bytes(encode_chunk(np.zeros((4, 5)), large, "activations"))
    with pytest.raises(ValueError, match="it holds 8,000,000 bytes instead of 80"):
        decode_chunk(file, small, "activations")
    file.write_bytes(bytes(5000))
    with pytest.raises(ValueError, match="it is larger than its chunk can be"):
        decode_chunk(file, small, "activations")


def test_rows_and_items_that_are_not_there_are_refused(kept: EvalSet) -> None:
    message = (
        f"^Rows 20 to 25 were asked for, and evaluation set {kept.path} has 24. Pass 0 <= start <= "
        "stop <= that.$"
    )
    with pytest.raises(InputError, match=message):
        kept.read(20, 25)
    message = f"^Item 12 was asked for, and evaluation set {kept.path} has 12. Pass 0 or more"
    with pytest.raises(InputError, match=message):
        kept.text(12)
