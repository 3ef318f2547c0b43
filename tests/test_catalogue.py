"""A catalogue: which stores are found, what is asked of them, and the file that remembers."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.pipeline.store_table import HEADER, store_table
from sae_pipe.storage import (
    ActivationStore,
    InputError,
    StoreEntry,
    StoreError,
    StoreFilter,
    catalogue,
    list_stores,
)
from sae_pipe.storage.catalogue import CATALOG, LIMIT_BYTES, catalogue_place
from sae_pipe.storage.files import json_digest
from sae_pipe.storage.manifest import COMMITS, HARVESTING, MANIFEST
from sae_pipe.storage.provenance import OWNER, owner

from .services import HERE, S3

RECIPE = {
    "model": {"name": "EleutherAI/pythia-160m", "revision": "0" * 40, "architecture": "GPTNeoX"},
    "hook": "resid_post",
    "layer": 8,
    "mask": {"p": 0.3, "string": "...", "id": 1, "special_ids": []},
    "rows": 4096,
    "corpus": {
        "config": {"context_size": 16},
        "tokenizer": {"fingerprint": "f" * 64},
        "source": {"parts": []},
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(CATALOG, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    (tmp_path / "lab").mkdir()
    return tmp_path / "lab"


@pytest.fixture
def manifest(small_store: ActivationStore) -> dict[str, Any]:
    """Of a complete store of pythia-160m, layer 8, p = 0.3."""
    made = small_store.manifest["provenance"] | {"owner": "ann", "finished": "2026-11-20T10:00:00"}
    return small_store.manifest | {"recipe": RECIPE, "provenance": made}


def put(store: Path, manifest: dict[str, Any], **recipe: Any) -> Path:
    """A store of which there is only the manifest, a minute old; returns the manifest's file."""
    store.mkdir(parents=True, exist_ok=True)
    file = store / MANIFEST
    file.write_text(json.dumps(manifest | {"recipe": manifest["recipe"] | recipe}))
    return age(file)


def age(file: Path, seconds: float = 60) -> Path:
    os.utime(file, (time.time() - seconds,) * 2)
    return file


def names(place: Path | str, **asked: Any) -> list[str]:
    return [entry.store for entry in list_stores(place, StoreFilter(**asked), warn=fail)]


def fail(line: str) -> None:
    raise AssertionError(line)


def ls(*arguments: object) -> tuple[str, str]:
    """What `store ls` prints, and what it warns of."""
    result = CliRunner().invoke(app, ["store", "ls", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


# --- what is found ---


def test_stores_are_found_in_whatever_folder_they_are_and_nothing_inside_them(
    lab: Path, manifest: dict[str, Any]
) -> None:
    put(lab / "a.zarr", manifest)
    put(lab / "ann/pythia/layer8/b.zarr", manifest)
    put(lab / "activations/c/c.zarr", manifest)  # not chunks, though a store's have such names
    (lab / "activations/b").mkdir()
    put(lab / "a.zarr/inside.zarr", manifest)
    put(lab / ".hidden/d.zarr", manifest)
    put(lab / "begun.zarr/activations/c/7", manifest)  # a push that has not ended
    put(lab / "1/2/3/4/5/deep.zarr", manifest)
    put(lab / "1/2/3/4/5/6/too-deep.zarr", manifest)
    found = names(lab)
    assert sorted(found) == [
        "1/2/3/4/5/deep.zarr",
        "a.zarr",
        "activations/c/c.zarr",
        "ann/pythia/layer8/b.zarr",
    ]
    # A store is a catalogue of itself.
    assert names(lab / "a.zarr") == ["a.zarr"]


def test_links_are_not_followed(lab: Path, tmp_path: Path, manifest: dict[str, Any]) -> None:
    put(tmp_path / "elsewhere.zarr", manifest)
    (lab / "link.zarr").symlink_to(tmp_path / "elsewhere.zarr")
    (lab / "b.zarr").mkdir()
    (lab / "b.zarr" / MANIFEST).symlink_to(tmp_path / "elsewhere.zarr" / MANIFEST)
    (lab / "round").symlink_to(lab)
    (lab / "c.zarr" / MANIFEST).mkdir(parents=True)
    (lab / "d.zarr").mkdir()
    os.mkfifo(lab / "d.zarr" / MANIFEST)
    assert names(lab) == []
    # The place itself may be one.
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere.zarr")
    assert names(tmp_path / "linked") == ["elsewhere.zarr"]


def test_an_entry_says_what_the_manifest_says(
    lab: Path, manifest: dict[str, Any], small_store: ActivationStore
) -> None:
    shutil.copytree(small_store.path, lab / "a.zarr")
    put(lab / "a.zarr", manifest)
    (entry,) = list_stores(lab)
    files = [
        file
        for file in (lab / "a.zarr").rglob("*")
        if file.is_file()
        and file.name not in (MANIFEST, ".lock", "README.md")
        and (file.relative_to(lab / "a.zarr").parts[0] != "corpus" or file.name == "corpus.json")
    ]
    assert entry.bytes == sum(file.stat().st_size for file in files)
    assert (entry.store, entry.address, entry.state) == ("a.zarr", str(lab / "a.zarr"), "complete")
    assert (entry.model, entry.layer, entry.hook, entry.mask_p) == (
        "EleutherAI/pythia-160m",
        8,
        "resid_post",
        0.3,
    )
    assert (entry.n_rows, entry.n_heldout_rows, entry.d_in) == (4096, 512, 16)
    assert (entry.owner, entry.date) == ("ann", "2026-11-20T10:00:00")
    assert entry.digest == small_store.digest
    assert entry.recipe == json_digest(RECIPE)
    assert entry.corpus == manifest["corpus"]["digest"]
    assert (entry.n_sealed, entry.progress) == (entry.n_shards, "complete")


def test_of_an_unfinished_store_the_shards_that_are_sealed_are_counted_each_time(
    lab: Path, manifest: dict[str, Any]
) -> None:
    put(lab / "a.zarr", manifest | {"state": HARVESTING})
    commits = lab / "a.zarr" / COMMITS / "train"
    commits.mkdir(parents=True)
    for shard in range(3):
        assert [entry.progress for entry in list_stores(lab)] == [f"{shard} of 4 shards"]
        (commits / f"{shard:08d}.json").touch()
    put(lab / "a.zarr", manifest)
    assert [entry.progress for entry in list_stores(lab)] == ["complete"]
    tokenising = {name: manifest[name] for name in manifest.keys() - {"train", "heldout"}}
    put(lab / "a.zarr", tokenising | {"state": "tokenising"})
    assert [(e.progress, e.n_rows) for e in list_stores(lab)] == [("tokenising", None)]


# --- strangers' manifests ---

HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "no JSON": (
        lambda m: '{"format": ',
        "/manifest.json is damaged: it is not JSON (Expecting value: line 1 column 12 (char 11)). "
        "Fetch or harvest the store again.",
    ),
    "deep": (
        lambda m: json.dumps(m)[:-1] + ', "x": ' + "[" * 200_000 + "]" * 200_000 + "}",
        "/manifest.json is damaged: it is not JSON (",
    ),
    "of something else": (
        lambda m: '{"name": "An app", "icons": []}',
        "/manifest.json is not that of an activation store.",
    ),
    "a list": (lambda m: "[]", "/manifest.json is not that of an activation store."),
    "of the future": (
        lambda m: json.dumps(m | {"format_version": 99}),
        " has format version 99, and this sae-pipe reads up to 1. Upgrade it: pip install --upgrade "
        "sae-pipe.",
    ),
    "without a recipe": (
        lambda m: json.dumps({k: v for k, v in m.items() if k != "recipe"}),
        "it lacks what every store has, or has it in another form ('recipe')",
    ),
    "a number for a name": (
        lambda m: json.dumps(m | {"recipe": RECIPE | {"model": {"name": 7}}}),
        "has it in another form (a name is '7')",
    ),
    "half of a surrogate pair": (
        lambda m: json.dumps(m | {"provenance": m["provenance"] | {"owner": "\ud800"}}),
        "surrogate",
    ),
    "a huge name": (
        lambda m: json.dumps(m | {"codec": "x" * 1000}),
        "has it in another form (a name is 'xxxxxxxxxxxxxxxx",
    ),
    "a negative layer": (
        lambda m: json.dumps(m | {"recipe": RECIPE | {"layer": -1}}),
        "has it in another form (a number is -1)",
    ),
    "true for a layer": (
        lambda m: json.dumps(m | {"recipe": RECIPE | {"layer": True}}),
        "has it in another form (a number is True)",
    ),
    "NaN for a ratio": (
        lambda m: json.dumps(m | {"recipe": RECIPE | {"mask": {"p": float("nan")}}}),
        " is damaged: ",
    ),
    "a huge number": (
        lambda m: json.dumps(m).replace('"layer": 8', '"layer": ' + "9" * 5000),
        "/manifest.json is damaged: it is not JSON (",
    ),
    "no state": (
        lambda m: json.dumps(m | {"state": "sold"}),
        "has it in another form (there is no state 'sold')",
    ),
    "a digest that is none": (
        lambda m: json.dumps(m | {"digest": "abc"}),
        "has it in another form (a digest is 'abc')",
    ),
    "negative sizes": (
        lambda m: json.dumps(m | {"train": {"layout": m["train"]["layout"] | {"n_rows": -5}}}),
        "is damaged: its layout cannot be (A layout needs positive whole sizes, found (-5, ",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_manifest_that_is_damaged_or_foreign_is_a_line_and_not_the_end(
    kind: str, lab: Path, manifest: dict[str, Any]
) -> None:
    make, message = HOSTILE[kind]
    put(lab / "b.zarr", manifest)
    (lab / "a.zarr").mkdir()
    (lab / "a.zarr" / MANIFEST).write_text(make(manifest))
    age(lab / "a.zarr" / MANIFEST)
    for _ in range(2):  # the second is from the index
        said: list[str] = []
        assert [entry.store for entry in list_stores(lab, warn=said.append)] == ["b.zarr"]
        (line,) = said
        assert f"{lab}/a.zarr" in line
        assert message in line


@pytest.mark.parametrize("most", [2, 3, 4])
def test_where_there_are_too_many_folders_that_is_said(
    lab: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    for name in ("a", "b"):
        put(lab / name / "acts.zarr", manifest)
    monkeypatch.setattr(catalogue, "MAX_FOLDERS", most)
    said: list[str] = []
    list_stores(lab, warn=said.append)
    assert said == [
        f"There are more than {most} folders below {lab}, and not all were looked into. Pass one that "
        "has fewer."
    ]
    monkeypatch.setattr(catalogue, "MAX_FOLDERS", 5)
    assert len(list_stores(lab, warn=fail)) == 2


@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", "a" * 300])
def test_whatever_is_typed_is_no_place_or_no_model(text: str, lab: Path) -> None:
    result = CliRunner().invoke(app, ["store", "ls", text])
    assert (result.exit_code, result.stderr) == (
        2, f"Error: There is no folder {text}. Pass one that holds stores.\n"
    )  # fmt: skip
    assert ls(lab, "--model", text)[0] == f"There are no such stores in {lab}.\n"


def test_a_manifest_that_is_too_large_is_not_read(lab: Path, manifest: dict[str, Any]) -> None:
    (lab / "a.zarr").mkdir()
    with (lab / "a.zarr" / MANIFEST).open("wb") as file:
        file.truncate(10**12)  # none of it on the disk
    put(lab / "b.zarr", manifest)
    said: list[str] = []
    assert [entry.store for entry in list_stores(lab, warn=said.append)] == ["b.zarr"]
    assert said == [
        f"{lab}/a.zarr/manifest.json has 1,000,000,000,000 bytes, more than a catalogue reads "
        f"of a manifest ({LIMIT_BYTES:,})."
    ]


def test_stores_below_a_foreign_manifest_are_found_and_evaluation_sets_are_left_out(
    lab: Path, manifest: dict[str, Any]
) -> None:
    (lab / MANIFEST).write_text('{"name": "An app"}')
    put(lab / "a.zarr", manifest)
    put(lab / "e.zarr", manifest | {"format": "sae-pipe evaluation set"})
    put(lab / "e.zarr/inside.zarr", manifest)
    said: list[str] = []
    assert [entry.store for entry in list_stores(lab, warn=said.append)] == ["a.zarr"]
    assert said == [f"{lab}/manifest.json is not that of an activation store."]


def test_what_a_manifest_says_cannot_move_the_cursor(lab: Path, manifest: dict[str, Any]) -> None:
    made = manifest["provenance"] | {"owner": "\x1b[31mred\x07"}
    put(lab / "a\r.zarr", manifest | {"provenance": made})
    (lab / "b\x1b[2J.zarr").mkdir()
    (lab / "b\x1b[2J.zarr" / MANIFEST).write_text("{")
    shown, warned = ls(lab)
    assert "a\\r.zarr" in shown
    assert "\\x1b[31mred\\x07" in shown
    assert "b\\x1b[2J.zarr/manifest.json is damaged" in warned
    assert all(c.isprintable() or c == "\n" for c in shown + warned)


# --- what is asked for ---


@pytest.fixture
def three(lab: Path, manifest: dict[str, Any]) -> Path:
    """a: pythia-160m, layer 8, p 0.3, the oldest; b: gpt2, layer 4, p 0; c: a folder's model, newest."""
    made = manifest["provenance"]
    put(lab / "a.zarr", manifest)
    put(
        lab / "b.zarr",
        manifest | {"codec": "compact:0.25", "provenance": made | {"finished": "2026-11-21"}},
        model={"name": "openai-community/gpt2"}, layer=4, mask={"p": 0.0}, hook="mlp_out",
    )  # fmt: skip
    runs = {"runs": [{"started": "2026-11-22"}]}
    put(
        lab / "c.zarr",
        manifest | {"state": HARVESTING, "provenance": made | runs},
        model={"name": "My-Model"},
    )
    return lab


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "cba"),
        ({"models": ["EleutherAI/pythia-160m"]}, "a"),
        ({"models": ["pythia-160m"]}, "a"),
        ({"models": ["eleutherai/PYTHIA-160m"]}, "a"),
        ({"models": ["someone/pythia-160m"]}, ""),
        ({"models": ["pythia"]}, ""),
        ({"models": ["my-model", "gpt2"]}, "cb"),
        ({"layers": [8]}, "ca"),
        ({"layers": [4, 8]}, "cba"),
        ({"layers": [8], "mask_p": [0.0]}, ""),
        ({"mask_p": [0.3]}, "ca"),
        ({"mask_p": [0]}, "b"),
        ({"hooks": ["mlp_out"]}, "b"),
        ({"states": ["complete"]}, "ba"),
        ({"states": ["harvesting", "tokenising"]}, "c"),
        ({"codecs": ["compact"]}, "b"),
        ({"codecs": ["compact:0.25", "none"]}, "b"),
        ({"codecs": ["compact:0.5"]}, ""),
    ],
)
def test_filters_leave_what_is_asked_for_the_newest_first(
    three: Path, asked: dict[str, Any], expected: str
) -> None:
    assert names(three, **asked) == [f"{letter}.zarr" for letter in expected]


def test_filters_are_flags_of_ls_and_models_are_named_as_for_harvest(
    three: Path, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(*flags: str) -> list[str]:
        return [entry["store"] for entry in json.loads(ls(lab, "--json", *flags)[0])]

    assert shown("--model", "pythia-160m", "--layer", "8", "--mask-p", "0.3") == ["a.zarr"]
    assert shown("--model", "gpt2") == ["b.zarr"]
    assert shown("--model", "my-model", "--model", "gpt2") == ["c.zarr", "b.zarr"]
    (lab / "models" / "my-model").mkdir(parents=True)
    monkeypatch.chdir(lab / "models")
    assert shown("--model", "./my-model", "--state", "harvesting") == ["c.zarr"]
    assert shown("--hook", "resid_post", "--codec", "lossless") == ["c.zarr", "a.zarr"]
    with pytest.raises(
        InputError,
        match=r"^--state is 'sold', and has to be one of tokenising, harvesting, extending, "
        r"complete\.$",
    ):
        StoreFilter(states=["sold"])
    for p in (7.0, -0.1, float("nan")):
        with pytest.raises(
            InputError, match=rf"^--mask-p is {p}, and has to be a number from 0 to 1\.$"
        ):
            StoreFilter(mask_p=[p])
    with pytest.raises(
        InputError, match=r"^--codec is 'zip', and has to be one of lossless, compact, none\.$"
    ):
        StoreFilter(codecs=["zip:3"])


@given(
    layers=st.lists(st.integers(0, 3), max_size=3),
    mask_p=st.lists(st.sampled_from([0.0, 0.1, 0.3]), max_size=2),
    layer=st.none() | st.integers(0, 3),
    p=st.none() | st.sampled_from([0.0, 0.1, 0.3]),
)
def test_a_store_is_taken_when_it_has_one_value_of_each_that_is_asked(
    layers: list[int], mask_p: list[float], layer: int | None, p: float | None
) -> None:
    wanted = StoreFilter(layers=layers, mask_p=mask_p)
    is_taken = (layers == [] or layer in layers) and (mask_p == [] or p in mask_p)
    assert wanted.takes(replace(ENTRY, layer=layer, mask_p=p)) == is_taken


# --- how it is shown ---

ENTRY = StoreEntry(
    store="ann/pythia-160m-layer8-p0.3.zarr",
    address="s3://lab/stores/ann/pythia-160m-layer8-p0.3.zarr",
    state="complete",
    model="EleutherAI/pythia-160m",
    revision="0" * 40,
    layer=8,
    hook="resid_post",
    mask_p=0.3,
    n_rows=500_000_000,
    n_heldout_rows=1_000_000,
    d_in=768,
    bytes=516_000_000_000,
    codec="lossless",
    ratio=1.49,
    owner="ann",
    date="2026-11-26T01:02:03+00:00",
    digest="d" * 64,
    recipe="e" * 64,
    is_sampled=False,
    corpus="c" * 64,
    corpus_key="b" * 64,
    n_shards=3815,
    n_sealed=3815,
)


def test_the_table_says_what_is_asked_first() -> None:
    other = replace(
        ENTRY, store="b.zarr", state="harvesting", n_sealed=1200, bytes=None, owner=None, model=None
    )
    part = replace(ENTRY, store="c.zarr", is_sampled=True, mask_p=0.0, layer=None, date=None)
    lines = store_table([ENTRY, other, part], None).splitlines()
    assert [" ".join(line.split()) for line in lines if "--" not in line] == [
        " ".join(HEADER),
        (
            "ann/pythia-160m-layer8-p0.3.zarr EleutherAI/pythia-160m 8 resid_post 0.3 500,000,000 "
            "516 GB lossless complete ann 2026-11-26"
        ),
        (
            "b.zarr - 8 resid_post 0.3 500,000,000 - lossless 1,200 of 3,815 shards - 2026-11-26"
        ),
        (
            "c.zarr EleutherAI/pythia-160m - resid_post 0 500,000,000 516 GB lossless part, "
            "complete ann -"
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("width", [300, 130, 110, 100, 80])
def test_the_table_fits_the_terminal(width: int) -> None:
    shown = store_table([ENTRY, replace(ENTRY, store="b.zarr", owner="someone-else")], width)
    assert max(map(len, shown.splitlines())) <= width
    assert "500,000,000" in shown
    assert ("…" in shown) == (width < 150)
    is_cut = width < 110
    assert ("Left out for lack of room: " in shown) == is_cut
    if width == 80:
        assert shown.splitlines()[-1] == (
            "Left out for lack of room: hook, owner, codec; --json has all."
        )


def test_ls_as_json_is_one_array_with_all_that_is_known(three: Path, lab: Path) -> None:
    found = json.loads(ls(lab, "--json", "--layer", "8", "--state", "complete")[0])
    (entry,) = found
    assert list(entry) == [
        "store", "address", "state", "model", "revision", "layer", "hook", "mask_p", "n_rows",
        "n_heldout_rows", "d_in", "bytes", "codec", "ratio", "owner", "date", "digest", "recipe",
        "is_sampled", "corpus", "n_shards", "n_sealed",
    ]  # fmt: skip
    assert entry["address"] == str(lab / "a.zarr")
    assert entry["recipe"] == json_digest(RECIPE)
    assert json.loads(ls(lab, "--json", "--layer", "77")[0]) == []


def test_ls_looks_where_it_is_told_or_the_environment_says_or_here(
    three: Path, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert ls() == ("There are no stores in this folder.\n", "")
    monkeypatch.setenv(CATALOG, str(lab))
    assert "a.zarr" in ls()[0]
    assert ls(tmp_path / "here")[0] == f"There are no stores in {tmp_path / 'here'}.\n"
    assert ls("--catalog", "")[0] == "There are no stores in this folder.\n"
    assert ls("--model", "nobody/x")[0] == f"There are no such stores in {lab}.\n"
    for arguments, message in {
        (str(lab), "--catalog", "x"): (
            "--catalog and PLACE both say where to look. Pass one of them."
        ),
        ("no",): "There is no folder no. Pass one that holds stores.",
        ("https://host/stores",): (
            "https://host/stores cannot be listed: a web server does not say what it has. Pass a "
            "folder, or an address that begins with s3://, gs://, az:// or hf://."
        ),
    }.items():
        result = CliRunner().invoke(app, ["store", "ls", *arguments])
        assert (result.exit_code, result.stderr) == (2, f"Error: {message}\n")


def test_a_catalogue_is_a_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalogue_place(None) is None
    monkeypatch.setenv(CATALOG, "~/stores")
    assert catalogue_place(None) == Path.home() / "stores"
    assert str(catalogue_place("s3://lab")) == "s3://lab"
    assert catalogue_place("") is None
    with pytest.raises(InputError, match=r"^s3:// is not the address of a store\."):
        catalogue_place("s3://")


def test_many_warnings_are_counted(lab: Path) -> None:
    for number in range(23):
        (lab / f"{number}").mkdir()
        (lab / f"{number}" / MANIFEST).write_text("{}")
    _, warned = ls(lab)
    lines = warned.splitlines()
    assert len(lines) == 21
    assert lines[0] == f"Warning: {lab}/0/manifest.json is not that of an activation store."
    assert lines[-1] == "and 3 more warnings."


# --- who made it ---


def test_the_owner_is_the_user_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(OWNER, raising=False)
    monkeypatch.setenv("LOGNAME", "ann")
    assert owner() == "ann"
    monkeypatch.setenv(OWNER, " Ann of the lab\x1b ")
    assert owner() == "Ann of the lab\\x1b"
    monkeypatch.setenv(OWNER, "")
    assert owner() is None
    monkeypatch.setenv(OWNER, "a" * 1000)
    assert owner() == "a" * 100


# --- the index ---


def index_of(cache: Path) -> Path:
    (file,) = (cache / "catalogues").glob("*.json")
    return file


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what an index notes, so that it is one that we could have written."""
    index = json.loads(file.read_text())
    change(index["manifests"])
    index["digest"] = json_digest(index["manifests"])
    file.write_text(json.dumps(index))


def owners(place: Path) -> list[str | None]:
    return [entry.owner for entry in list_stores(place, warn=fail)]


def claim(manifests: dict[str, Any]) -> None:
    """What no manifest says: seen only where the index is believed."""
    manifests["a.zarr"]["facts"]["owner"] = "the index"


def test_a_manifest_that_has_not_changed_is_not_read_again(
    lab: Path, cache: Path, manifest: dict[str, Any]
) -> None:
    put(lab / "a.zarr", manifest)
    assert owners(lab) == ["ann"]
    rewrite(index_of(cache), claim)
    assert owners(lab) == ["the index"]
    # A store that has come is read, the other one is not.
    put(lab / "b.zarr", manifest)
    assert owners(lab) == ["the index", "ann"]
    # One that has gone is not listed, nor noted any more.
    shutil.rmtree(lab / "b.zarr")
    assert owners(lab) == ["the index"]
    assert json.loads(index_of(cache).read_text())["manifests"].keys() == {"a.zarr"}


def other_time(file: Path) -> None:
    age(file, 61)


def same_size_and_time(file: Path) -> None:
    """As copying tools do that keep times."""
    before, data = file.stat(), file.read_text()
    file.with_name("new").write_text(data.replace('"ann"', '"bob"'))
    os.replace(file.with_name("new"), file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def other_size(file: Path) -> None:
    before = file.stat()
    file.write_text(file.read_text() + " ")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "expected"),
    [(other_time, "ann"), (same_size_and_time, "bob"), (other_size, "ann")],
)
def test_a_manifest_that_may_have_changed_is_read_again(
    change: Callable[[Path], None],
    expected: str,
    lab: Path,
    cache: Path,
    manifest: dict[str, Any],
) -> None:
    file = put(lab / "a.zarr", manifest)
    assert owners(lab) == ["ann"]
    rewrite(index_of(cache), claim)
    change(file)
    assert owners(lab) == [expected]
    assert owners(lab) == [expected]


def test_a_manifest_that_has_just_been_written_is_not_noted(
    lab: Path, cache: Path, manifest: dict[str, Any]
) -> None:
    file = put(lab / "a.zarr", manifest)
    age(file, 0)
    assert owners(lab) == ["ann"]
    assert not (cache / "catalogues").exists()


DAMAGES: dict[str, Callable[[dict[str, Any], str], str]] = {
    "cut off": lambda index, text: text[: len(text) // 2],
    "empty": lambda index, text: "",
    "no JSON": lambda index, text: "\x00" * 100,
    "deep": lambda index, text: "[" * 200_000,
    "a list": lambda index, text: "[]",
    "another version": lambda index, text: json.dumps(index | {"version": 0}),
    "of another catalogue": lambda index, text: json.dumps(index | {"catalogue": "/other"}),
    "another digest": lambda index, text: text.replace("the index", "the enemy"),
    "other facts": lambda index, text: json.dumps(
        index
        | {
            "manifests": {"a.zarr": index["manifests"]["a.zarr"] | {"facts": {"owner": "x"}}},
            "digest": json_digest(
                {"a.zarr": index["manifests"]["a.zarr"] | {"facts": {"owner": "x"}}}
            ),
        }
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_is_damaged_or_of_another_version_is_made_anew_without_a_word(
    damage: str, lab: Path, cache: Path, manifest: dict[str, Any]
) -> None:
    put(lab / "a.zarr", manifest)
    assert owners(lab) == ["ann"]
    whole = index_of(cache).read_text()
    rewrite(index_of(cache), claim)
    text = index_of(cache).read_text()
    index_of(cache).write_text(DAMAGES[damage](json.loads(text), text))
    assert owners(lab) == ["ann"]
    assert index_of(cache).read_text() == whole


def test_an_index_that_cannot_be_written_is_done_without(
    lab: Path, tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(lab / "a.zarr", manifest)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "file"))
    assert owners(lab) == ["ann"]


def test_what_others_have_noted_meanwhile_is_kept(
    lab: Path, cache: Path, manifest: dict[str, Any]
) -> None:
    from sae_pipe.storage.catalogue_index import read_index, write_index

    put(lab / "a.zarr", manifest)
    put(lab / "b.zarr", manifest)
    owners(lab)
    both = read_index(lab)
    assert both.keys() == {"a.zarr", "b.zarr"}
    one = {"a.zarr": both["a.zarr"]}
    write_index(lab, {}, one, {"a.zarr"})  # by who began when nothing was noted
    assert read_index(lab) == both
    write_index(lab, both, one, {"a.zarr"})  # by who has seen that b has gone
    assert read_index(lab) == one


def test_ten_processes_that_write_and_list_at_once_see_every_complete_store_and_no_half_of_one(
    small_store: ActivationStore, lab: Path, cache: Path
) -> None:
    crowd = [sys.executable, str(HERE / "catalogue_crowd.py"), str(small_store.path), str(lab)]
    done = subprocess.run(crowd, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"failed": 0, "stores": 40}, done.stderr
    assert len(list_stores(lab, warn=fail)) == 40
    index_of(cache)  # a valid one: what it notes is believed
    rewrite(index_of(cache), lambda manifests: manifests)


# --- in a bucket ---


def manifest_reads(s3: S3, before: int) -> list[str]:
    return [path for path in s3.requests("GET")[before:] if path.endswith(MANIFEST)]


def test_the_stores_of_a_bucket_are_listed_and_their_manifests_read_once(
    s3: S3, tmp_path: Path, manifest: dict[str, Any], small_store: ActivationStore
) -> None:
    root = tmp_path / "there"
    put(root / "ann/a.zarr", manifest)
    put(root / "b.zarr", manifest)
    for number in range(30):  # a push that has not ended
        (root / f"begun.zarr/activations/c/{number}").mkdir(parents=True)
        (root / f"begun.zarr/activations/c/{number}/0").touch()
    (root / "foreign").mkdir()
    (root / "foreign" / MANIFEST).write_text("[]")
    place = s3.put(root, "catalogue")
    before, said = len(s3.requests("GET")), list[str]()
    found = {entry.store: entry for entry in list_stores(place, warn=said.append)}
    assert found.keys() == {"ann/a.zarr", "b.zarr"}
    assert found["ann/a.zarr"].address == f"{place}/ann/a.zarr"
    assert said == [f"{place}/foreign/manifest.json is not that of an activation store."]
    reads = s3.requests("GET")[before:]
    assert sorted(path for path in reads if path.endswith(MANIFEST)) == [
        "catalogue/ann/a.zarr/manifest.json",
        "catalogue/b.zarr/manifest.json",
        "catalogue/foreign/manifest.json",
    ]
    # One request for each folder: the catalogue, ann, foreign, three stores, activations of one.
    assert len(reads) == 3 + 7
    # Nothing is read that has not changed.
    before = len(s3.requests("GET"))
    assert {entry.store for entry in list_stores(place, warn=said.append)} == found.keys()
    assert manifest_reads(s3, before) == []
    # What is replaced by other bytes of the same size is read, and the others are not.
    file = root / "b.zarr" / MANIFEST
    file.write_text(file.read_text().replace('"ann"', '"bob"'))
    s3.put(root / "b.zarr", "catalogue/b.zarr")
    assert {e.store: e.owner for e in list_stores(place, warn=said.append)} == {
        "ann/a.zarr": "ann",
        "b.zarr": "bob",
    }
    assert manifest_reads(s3, before) == ["catalogue/b.zarr/manifest.json"]
    # A bucket as a whole is a place too, and so is a store.
    assert {"catalogue/b.zarr", "catalogue/ann/a.zarr"} <= set(names_of("s3://lab"))
    assert names_of(f"{place}/b.zarr") == ["b.zarr"]
    shown, _ = ls(place, "--json")
    assert [entry["address"] for entry in json.loads(shown)] == [
        f"{place}/ann/a.zarr",
        f"{place}/b.zarr",
    ]


def names_of(place: str) -> list[str]:
    return [entry.store for entry in list_stores(place, warn=lambda line: None)]


def test_a_prefix_without_anything_and_a_bucket_that_is_not_there_have_no_stores(s3: S3) -> None:
    for place in ("s3://lab/nothing-here", "s3://no-such-bucket"):
        shown, warned = ls(place)
        assert shown == f"There are no stores in {place}.\n"
        assert warned == (
            f"Warning: There is nothing at {place}, or no such bucket, container or repository.\n"
        )


def test_a_bucket_that_may_not_be_read_is_one_sentence(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nothing")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nothing")
    with pytest.raises(
        StoreError, match=r"^s3://lab/x needs credentials, and there are none that "
    ):
        list_stores("s3://lab/x")
