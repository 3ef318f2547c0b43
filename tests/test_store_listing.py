"""store ls and store info: what stands in the manifests, and what a damaged one shows."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage import InputError, list_stores, open_store
from sae_pipe.storage.manifest import COMMITS
from sae_pipe.storage.provenance import owner

from .harvesting import config_for, quiet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(lm: Path, text: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete, a lossy, an unfinished, a damaged and a future store, and what is none."""
    folder = tmp_path_factory.mktemp("stores")
    shutil.copytree(store, folder / "a.zarr")
    quiet(config_for(lm, text, folder / "b.zarr", codec="compact", mask_p=(0.0,)))
    for name, state in (("c", "harvesting"), ("d", "tokenising")):
        (folder / f"{name}.zarr" / COMMITS / "train").mkdir(parents=True)
        manifest = json.loads((store / "manifest.json").read_text()) | {"state": state}
        if state == "tokenising":
            del manifest["train"], manifest["heldout"]
        (folder / f"{name}.zarr" / "manifest.json").write_text(json.dumps(manifest))
    for shard in range(3):
        (folder / "c.zarr" / COMMITS / "train" / f"{shard:08d}.json").write_text("{}")
    for name, content in (("e", '{"format": '), ("f", '{"format": "sae-pipe activation store"}')):
        (folder / f"{name}.zarr").mkdir()
        (folder / f"{name}.zarr" / "manifest.json").write_text(content)
    (folder / "notes").mkdir()
    return folder


def run(*arguments: object) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["store", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


def shown(*arguments: object) -> str:
    return run(*arguments)[0]


def test_ls_shows_every_store_of_a_folder_with_its_state(folder: Path, lm: Path) -> None:
    out, err = run("ls", folder)
    lines = [line.split("  ") for line in out.splitlines()]
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    names = ["store", "model", "layer", "hook", "p", "rows", "size", "codec", "state", "owner"]
    names += ["date"]
    assert cells[0] == names
    by_name = {row[0]: dict(zip(names, row, strict=True)) for row in cells[2:]}
    assert sorted(by_name) == ["a.zarr", "b.zarr", "c.zarr", "d.zarr"]
    states = ["complete", "complete", "3 of 12 shards", "tokenising"]
    assert [by_name[name]["state"] for name in sorted(by_name)] == states
    first = by_name["a.zarr"]
    assert (first["model"], first["layer"], first["p"], first["rows"], first["codec"]) == (
        lm.name,
        "1",
        "0.3",
        "6,000",
        "lossless",
    )
    assert (first["hook"], first["owner"]) == ("resid_post", owner())
    assert by_name["b.zarr"]["codec"] == "compact:0.25"
    assert err.splitlines() == [
        f"Warning: {folder}/e.zarr/manifest.json is damaged: it is not JSON (Expecting value: line "
        "1 column 12 (char 11)). Fetch or harvest the store again.",
        f"Warning: Store {folder}/f.zarr has format version None, and this sae-pipe reads up to 1. "
        "Upgrade it: pip install --upgrade sae-pipe.",
    ]


def test_ls_as_json_has_the_numbers(folder: Path) -> None:
    found = {entry["store"]: entry for entry in json.loads(shown("ls", folder, "--json"))}
    store = folder / "a.zarr"
    files = [
        f
        for f in store.rglob("*")
        if f.is_file() and f.name not in (".lock", "manifest.json", "README.md")
    ]
    counted = [f for f in files if "corpus" not in f.parts or f.name == "corpus.json"]
    assert found["a.zarr"]["bytes"] == sum(file.stat().st_size for file in counted)
    assert found["a.zarr"]["n_heldout_rows"] == open_store(store).heldout.n_rows
    assert found["a.zarr"]["ratio"] < found["b.zarr"]["ratio"]
    assert (found["c.zarr"]["n_sealed"], found["c.zarr"]["n_shards"]) == (3, 12)
    assert found.keys() == {"a.zarr", "b.zarr", "c.zarr", "d.zarr"}
    (entry,) = list_stores(store)
    assert entry.as_json() == found["a.zarr"]


def test_ls_of_a_folder_without_stores_says_so(tmp_path: Path) -> None:
    assert shown("ls", tmp_path) == f"There are no stores in {tmp_path}.\n"
    message = f"^There is no folder {tmp_path}/no. Pass one that holds stores.$"
    with pytest.raises(InputError, match=message):
        list_stores(tmp_path / "no")


def test_info_shows_how_values_are_stored_and_what_that_has_cost(folder: Path) -> None:
    manifest = open_store(folder / "b.zarr").manifest
    lines = dict(line.split(None, 1) for line in shown("info", folder / "b.zarr").splitlines())
    step, error = manifest["encoding"]["parameters"]["step"], manifest["encoding"]["error"]
    assert lines["values"] == f"bfloat16, in float32 for Zarr; whole steps of {step:.6g}"
    assert lines["error"] == (
        f"{error['relative']:.3g} of the variance is lost, {error['of_typical_variance']:.3g} of "
        "that of an ordinary dimension, of a dimension "
        f"{error['per_dimension_median']:.3g} in the median and {error['per_dimension_max']:.3g} "
        "at most; 0 values were clipped"
    )
    assert lines["sizes"] == (
        "12 shards; raw, a chunk of 512 rows is 32.8 kB, a shard of 512 rows is 32.8 kB, a block "
        "of 1,024 rows is 65.5 kB"
    )
    assert "compact:0.25" in lines["size"]
    assert {"files", "order", "made", "command", "versions", "speed", "digest"} <= lines.keys()
