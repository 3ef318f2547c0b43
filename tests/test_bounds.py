"""Limits that are met before memory is taken, and links that nothing is read or written through."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sae_pipe.stages.fit import _read_summary
from sae_pipe.stages.repair import repair
from sae_pipe.stages.rundir import RunFolder
from sae_pipe.stages.sources.jsonl import _decompressed
from sae_pipe.stages.tokens import decode_tokens
from sae_pipe.storage import ActivationStore, DiskError, InputError, StoreError
from sae_pipe.storage.files import is_plain_name, plain_size, read_plain
from sae_pipe.storage.lock import sole_writer
from sae_pipe.storage.plain_json import parse_plain_json
from sae_pipe.storage.shard_cache import Cache

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=30,
)  # fmt: skip


@given(JSON)
def test_any_json_comes_back_as_it_was(value: Any) -> None:
    assert parse_plain_json(json.dumps(value)) == value
    assert parse_plain_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("NaN", "NaN is not a number of JSON"),
        ("-Infinity", "-Infinity is not a number of JSON"),
        ("1e999", "1e999 is not a number of JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' stands twice in one object"),
        ('["\\uD83D"]', "a text in it has half of a surrogate pair"),
        ("[" * 101 + "]" * 101, "it is nested more than 100 deep"),
        ('{"a":' * 100_000, "it is nested more than 100 deep"),
        ("[1,1,1,1,1]", "it has more than 4 values"),
    ],
)
def test_what_is_no_plain_json_says_why(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(what)}$"):
        parse_plain_json(text, 4 if "values" in what else 1_000_000)


def test_whole_pairs_of_surrogates_are_a_character() -> None:
    assert parse_plain_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("name", "is_plain"),
    [
        ("activations/c/0/0", True),
        ("corpus/corpus.json", True),
        ("README.md", True),
        ("a..b/c", True),
        ("..", False),
        ("a/../b", False),
        (".lock", False),
        ("a/.b", False),
        ("/a", False),
        ("a/", False),
        ("a//b", False),
        ("a\\b", False),
        ("C:a", False),
        ("a\0", False),
        ("a\n", False),
        ("ä", False),
        ("", False),
        ("a" * 1001, False),
        (7, False),
    ],
)
def test_names_that_cannot_leave_their_folder(name: object, is_plain: bool) -> None:
    assert is_plain_name(name) == is_plain


def test_only_plain_files_are_read_and_no_more_than_their_limit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(b"1234")
    assert plain_size(tmp_path, "a/file") == 4
    assert read_plain(tmp_path, "a/file", 4) == b"1234"
    with pytest.raises(ValueError, match=r"^it has 4 bytes, and none needs more than 3$"):
        read_plain(tmp_path, "a/file", 3)
    (tmp_path / "link").symlink_to("a/file")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    for name, what in (
        ("link", "link is a symbolic link"),
        ("b/file", "b is a symbolic link"),
        ("pipe", "pipe is no plain file"),
        ("a", "a is no plain file"),
    ):
        with pytest.raises(
            StoreError, match=rf"^{tmp_path}/{what}, and only plain files are read\."
        ):
            plain_size(tmp_path, name)
    with pytest.raises(FileNotFoundError):
        plain_size(tmp_path, "a/none")


def test_a_cache_gives_nothing_up_for_what_the_disk_could_not_hold(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit_bytes=1 << 61)
    kept = cache.folder("key") / "activations/c/0/0"
    os.close(cache.fetch(kept, 4, lambda part: os.pwrite(part, b"rows", 0)))
    with pytest.raises(DiskError, match=r"^The disk is full: "):
        cache.fetch(kept.with_name("1"), 1 << 60, lambda part: None)
    small = replace(cache, limit_bytes=100)
    message = "activations/c/0/1 of a store is said to have 1 kB, and the cache "
    with pytest.raises(InputError, match=rf"^{message}{cache.root} may hold 100 bytes\."):
        small.fetch(kept.with_name("1"), 1000, lambda part: None)
    assert kept.read_bytes() == b"rows"


# --- what is written to ---


def test_a_lock_is_not_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/.lock").symlink_to("../precious")
    with (
        pytest.raises(DiskError, match=r"store could not be written \(Too many levels of symbolic"),
        sole_writer(tmp_path / "store", "Store"),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "years of work"


def test_a_repair_writes_through_no_link(small_store: ActivationStore, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(small_store.path, tmp_path / "acts.zarr"))
    (tmp_path / "outside").mkdir()
    shutil.rmtree(copy / "source")
    (copy / "source").symlink_to("../outside")
    message = (
        f"{copy}/source is a symbolic link, and nothing is written through one. Remove it, or "
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}"):
        repair(copy, say=lambda line: None)
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint"])
def test_a_run_goes_on_through_no_link(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / name).symlink_to("../outside")
    message = (
        f"{tmp_path}/run/{name} is a symbolic link, and nothing is written through one. Put what it "
        "leads to in its place, or pass another --out."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        RunFolder(tmp_path / "run").check_place()


# --- runs ---


@pytest.mark.parametrize(
    "content",
    [
        {"step": 1, "state": "../../../etc/passwd"},
        {"step": 1, "state": "/etc/passwd"},
        {"step": 1, "state": ["state-1.safetensors"]},
        {"step": 1},
        {"step": 1, "state": "state-1.safetensors", "older": [{"state": "../x"}]},
        {"step": 1, "state": "state-1.safetensors", "older": 7},
    ],
)
def test_a_checkpoint_names_states_of_its_own_run(tmp_path: Path, content: Any) -> None:
    (tmp_path / "checkpoint").mkdir()
    file = tmp_path / "checkpoint/checkpoint.json"
    file.write_text(json.dumps(content))
    message = (
        f"{file} is damaged: it names no state of this run. Remove the folder it is in to begin the "
        "run anew."
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        RunFolder(tmp_path).read_checkpoint()


def test_metrics_without_end_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.touch()
    os.truncate(file, 1 << 40)
    with pytest.raises(
        StoreError, match=rf"^{file} has more than the 268,435,456 bytes that a run "
    ):
        RunFolder(tmp_path).read_metrics()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rows_per_s": "fast"}, "rows_per_s is 'fast'"),
        ({"l0": [1]}, r"l0 is '\[1\]'"),
        ({"d_sae": True}, "d_sae is 'True'"),
        ({"d_sae": 1.5}, "d_sae is '1.5'"),
        ({"command": "rm"}, r".*unexpected keyword argument 'command'"),
    ],
)
def test_a_summary_holds_what_a_summary_holds(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    good = {
        "run": "a", "arch": "topk", "k": None, "d_sae": 4, "seed": 0, "steps": 1, "tokens": 8, "store_digest": "0",
        "heldout_rows": 0, "explained_variance": None, "fvu": 1, "mse": 0.5, "l0": 3.0, "dead_fraction": None,
        "gamma": None, "seconds": 1, "rows_per_s": 8.0, "wait_share": 0,
    }  # fmt: skip
    assert _read_summary(good, RunFolder(tmp_path)).l0 == 3.0
    with pytest.raises(StoreError, match=rf"^{tmp_path}/summary\.json is damaged \({what}\)\. Rem"):
        _read_summary(good | changes, RunFolder(tmp_path))


# --- texts and tokenizers ---


def test_text_that_unpacks_to_half_a_gigabyte_comes_in_pieces(tmp_path: Path) -> None:
    """All of it would come at once from the 34 kB that it is packed into."""
    file = tmp_path / "text.jsonl.zst"
    file.write_bytes(zstandard.ZstdCompressor(level=1).compress(b" " * (1 << 28)) * 2)
    assert file.stat().st_size < 1 << 16
    sizes = [len(piece) for piece in _decompressed(file)]
    assert sum(sizes) == 1 << 29
    assert max(sizes) <= 1 << 27


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", '{"model": {"type": "BPE"}}', "\ud800"])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=rf"^{file} is not a tokenizer \("):
        decode_tokens(file, [0])


def test_a_tokenizer_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.touch()
    os.truncate(file, 1 << 40)
    with pytest.raises(
        InputError, match=r"is not a tokenizer \(its size is that of no tokenizer\)"
    ):
        decode_tokens(file, [0])
