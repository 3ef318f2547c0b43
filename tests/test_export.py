"""Rows of a store as files that other tools open: all of them, in stored order, whole or not."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from sae_pipe.stages.exporting import ACTIVATIONS, EXPORTERS, SOURCE
from sae_pipe.stages.store_export import ExportConfig, export_rows
from sae_pipe.stages.store_import import ImportConfig, import_rows
from sae_pipe.storage import ActivationStore, DiskError, InputError, open_store
from sae_pipe.storage.files import json_digest
from sae_pipe.storage.recode import recode

from .copying import run_in_child, runs_in_memory

Read = tuple[NDArray[Any], NDArray[np.int64]]


def read_numpy(out: Path) -> Read:
    rows = np.load(out / "activations.npy", allow_pickle=False)
    return rows, np.load(out / "source.npy", allow_pickle=False)


def read_safetensors(out: Path) -> Read:
    with safe_open(out / "activations.safetensors", "pt") as file:
        assert set(file.keys()) == {ACTIVATIONS, SOURCE}
        return file.get_tensor(ACTIVATIONS).float().numpy(), file.get_tensor(SOURCE).numpy()


def read_arrow(out: Path) -> Read:
    import datasets

    whole = datasets.load_from_disk(str(out)).with_format("numpy")
    one = datasets.Dataset.from_file(str(out / "data-00000-of-00001.arrow")).with_format("numpy")
    np.testing.assert_array_equal(whole[ACTIVATIONS][:], one[ACTIVATIONS][:])
    return whole[ACTIVATIONS][:], whole[SOURCE][:]


READERS: dict[str, Callable[[Path], Read]] = {
    "numpy": read_numpy,
    "safetensors": read_safetensors,
    "arrow": read_arrow,
}
MAIN = {"numpy": "activations.npy", "safetensors": "activations.safetensors", "arrow": "."}


def quietly(store: Path, out: Path, format: str, **changes: Any) -> Path:
    config = ExportConfig(store=store, out=out, format=format, **changes)
    return export_rows(config, say=lambda line: None)


def test_every_exporter_has_a_reader_here() -> None:
    assert READERS.keys() == EXPORTERS.keys() == MAIN.keys()


@pytest.mark.parametrize("format", EXPORTERS)
@pytest.mark.parametrize(
    ("split", "rows", "span"),
    [
        ("train", None, slice(0, 4096)),
        ("train", "1000:1531", slice(1000, 1531)),
        ("train", ":1", slice(0, 1)),
        ("train", "4095:", slice(4095, 4096)),
        ("heldout", None, slice(0, 512)),
    ],
)
def test_what_is_read_back_is_what_the_store_holds(
    small_store: ActivationStore,
    tmp_path: Path,
    format: str,
    split: str,
    rows: str | None,
    span: slice,
) -> None:
    out = quietly(small_store.path, tmp_path / "out", format, split=split, rows=rows)
    found, source = READERS[format](out)
    reader = small_store._train if split == "train" else small_store.heldout._reader
    np.testing.assert_array_equal(found, reader.read(span))
    np.testing.assert_array_equal(source, reader.read_source(span))
    notes = json.loads((out / "export.json").read_text())
    assert notes["digest"] == small_store.digest
    assert notes["recipe_digest"] == json_digest(small_store.recipe)
    assert (notes["split"], notes["rows"]) == (split, f"{span.start}:{span.stop}")
    assert (notes["order"], notes["n_rows"]) == ("stored", span.stop - span.start)
    files = {name: (out / name).stat().st_size for name in notes["files"]}
    assert {name: entry["bytes"] for name, entry in notes["files"].items()} == files
    assert {file.name for file in out.iterdir()} == {*files, "export.json"}


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(name, d) for name, each in EXPORTERS.items() for d in each.number_formats],
)
@pytest.mark.parametrize("codec", ["lossless", "compact"])
def test_every_number_format_is_rounded_to_nearest(
    small_store: ActivationStore, tmp_path: Path, format: str, dtype: str, codec: str
) -> None:
    path = small_store.path
    if codec != "lossless":
        path = tmp_path / "lossy.zarr"
        recode(small_store.path, path, codec, say=lambda line: None)
    out = quietly(path, tmp_path / "out", format, dtype=dtype, rows="0:700")
    found, _ = READERS[format](out)
    rows = torch.from_numpy(open_store(path).read(slice(0, 700)))
    expected = rows.to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


def test_the_default_number_format_loses_nothing(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    lossy = tmp_path / "lossy.zarr"
    recode(small_store.path, lossy, "compact", say=lambda line: None)
    for format in EXPORTERS:
        for path in (small_store.path, lossy):
            out = quietly(path, tmp_path / f"{path.name}-{format}", format, rows="0:300")
            store = open_store(path)
            np.testing.assert_array_equal(READERS[format](out)[0], store.read(slice(0, 300)))


@pytest.mark.parametrize("format", EXPORTERS)
def test_an_export_that_is_imported_has_the_same_rows(
    small_store: ActivationStore, tmp_path: Path, format: str
) -> None:
    out = quietly(small_store.path, tmp_path / "out", format)
    config = ImportConfig(source=out / MAIN[format], out=tmp_path / "again.zarr", members={})
    again = import_rows(config, say=lambda line: None)
    n = again.heldout.n_rows
    found = np.concatenate([again.read(slice(None)), again.heldout.read(0, n)])
    expected = small_store.read(slice(None))
    assert n == 40
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])
    assert not np.array_equal(found, expected)  # shuffled once more


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("format", EXPORTERS)
def test_a_killed_export_leaves_nothing_and_the_same_command_begins_again(
    small_store: ActivationStore, tmp_path: Path, format: str
) -> None:
    whole = quietly(small_store.path, tmp_path / "whole", format)
    out = tmp_path / "out"
    _, events = run_in_child(lambda: quietly(small_store.path, tmp_path / "counted", format))
    assert events >= 4
    for event in range(1, events):
        assert run_in_child(lambda: quietly(small_store.path, out, format), event)[0] == -9
        assert not out.exists()
    quietly(small_store.path, out, format)
    assert not list(tmp_path.glob(".out*"))
    for file in whole.iterdir():
        if file.name != "export.json":
            assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("format", EXPORTERS)
def test_memory_does_not_grow_with_the_store(
    tmp_path: Path, small_store: ActivationStore, large_store: Path, format: str
) -> None:
    def exporting(store: Path, name: str) -> Callable[[], object]:
        config = ExportConfig(store=store, out=tmp_path / name, format=format, dtype="float32")
        return partial(export_rows, config, say=str)

    small, large = exporting(small_store.path, "small"), exporting(large_store, "large")
    assert runs_in_memory(large, 84 << 20, small)
    out = tmp_path / "large"
    assert len(READERS[format](out)[0]) == 60_000 if format == "numpy" else out.is_dir()


@pytest.fixture(scope="module")
def large_store(
    tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., ActivationStore]
) -> Path:
    """123 MB of float32."""
    rows = np.resize(np.arange(4096, dtype=np.float32), (60_000, 512))
    return make_store(tmp_path_factory.mktemp("large") / "a.zarr", rows, rows[:4]).path


# --- refused ---


def refuses(message: str, run: Callable[[], object], error: type[Exception] = InputError) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        run()


def test_mistakes_are_refused_before_anything_is_written(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = small_store.path, tmp_path / "out"
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            "--format is 'csv', and has to be one of numpy, safetensors, arrow.",
            {"format": "csv"},
        ),
        ("--split is 'test', and has to be one of train, heldout.", {"split": "test"}),
        (
            "--dtype is 'int8', and has to be one of bfloat16, float16, float32.",
            {"dtype": "int8"},
        ),
        (
            "numpy has no bfloat16, so --format numpy cannot be written in it. Pass --dtype "
            "float32 or float16, or --format safetensors.",
            {"dtype": "bfloat16"},
        ),
        (
            "Arrow has no bfloat16, so --format arrow cannot be written in it. Pass --dtype "
            "float32 or float16, or --format safetensors.",
            {"format": "arrow", "dtype": "bfloat16"},
        ),
        (
            "--rows is '1-2', and has to be A:B with whole numbers, such as 0:1000.",
            {"rows": "1-2"},
        ),
        (
            f"Rows 5 to 5000 of the train rows of {path} were asked for, and it has 4,096. Pass "
            "--rows A:B with 0 <= A < B <= 4096.",
            {"rows": "5:5000"},
        ),
        (
            f"Rows 7 to 7 of the heldout rows of {path} were asked for, and it has 512. Pass "
            "--rows A:B with 0 <= A < B <= 512.",
            {"rows": "7:7", "split": "heldout"},
        ),
    ]
    for message, changes in cases:
        options = {"format": "numpy"} | changes
        refuses(message, partial(quietly, path, out, **options))
    inside = path / "export"
    refuses(
        f"{inside} would stand inside {path}, which is left alone. Pass another place for the export.",
        partial(quietly, path, inside, "numpy"),
    )
    refuses(
        f"{tmp_path} exists. Pass another place for the export, or remove it.",
        lambda: quietly(path, tmp_path, "numpy"),
    )
    monkeypatch.setattr("sae_pipe.storage.disk.free_bytes", lambda path: 1000)
    refuses(
        f"The disk is too small: {out} needs about 1.34 MB, and 1 kB are free at {tmp_path}. Free "
        "space there, or pass a place on a larger disk.",
        lambda: quietly(path, out, "numpy"),
        DiskError,
    )
    assert not list(tmp_path.iterdir())


def test_a_store_without_rows_of_a_split_and_values_beyond_float16_are_said(
    tmp_path: Path, make_store: Callable[..., ActivationStore]
) -> None:
    rows = np.ones((600, 8), np.float32)
    rows[517, 3] = -70_000
    path = make_store(tmp_path / "a.zarr", rows, rows[:0]).path
    refuses(
        f"Store {path} has no heldout rows to export. Pass another --split.",
        lambda: quietly(path, tmp_path / "out", "numpy", split="heldout"),
    )
    refuses(
        f"Row 517 of {path} holds -70144, and float16 ends at 65504. Pass --dtype float32.",
        lambda: quietly(path, tmp_path / "out", "numpy", dtype="float16", rows="300:"),
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zarr"]
