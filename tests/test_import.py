"""Activations from elsewhere, into a store: every kind of input, every row once, nothing believed."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from sae_pipe.stages.fit import fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.importing import IMPORTERS
from sae_pipe.stages.importing.order import InputOrder
from sae_pipe.stages.latents import top_activations
from sae_pipe.stages.sae import load_sae
from sae_pipe.stages.store_import import ImportConfig, import_rows
from sae_pipe.storage import ActivationStore, DiskError, InputError, open_store
from sae_pipe.storage.info import describe
from sae_pipe.storage.layout import Layout
from sae_pipe.storage.recode import recode
from sae_pipe.storage.values import VALUE_TYPES

from .copying import content, killed_until_done, run_in_child, runs_in_memory

Array = NDArray[np.float32]
HOOK = "blocks.3.hook_resid_post"


def write_npy(folder: Path, values: Array) -> Path:
    np.save(folder / "acts.npy", values)
    return folder / "acts.npy"


def write_safetensors(folder: Path, values: Array) -> Path:
    half = len(values) // 2
    parts = {"part_10": torch.from_numpy(values[half:]), "part_9": torch.from_numpy(values[:half])}
    save_file({**parts, "bias": torch.zeros(3)}, folder / "acts.safetensors")
    return folder / "acts.safetensors"


def write_datasets(folder: Path, values: Array) -> Path:
    """As SAELens does: one record a context, here in two files."""
    import datasets

    feature: Any = datasets.Sequence(datasets.Value("float32"), length=values.shape[-1])
    if values.ndim == 3:
        feature = datasets.Array2D(shape=values.shape[1:], dtype="float32")
    columns: dict[str, Any] = {HOOK: feature, "token_ids": datasets.Value("int32")}
    data = {HOOK: values, "token_ids": np.arange(len(values))}
    made = datasets.Dataset.from_dict(data, features=datasets.Features(columns))
    datasets.disable_progress_bars()
    made.save_to_disk(folder / "acts", num_shards=2)
    return folder / "acts"


def write_zarr(folder: Path, values: Array) -> Path:
    group = zarr.open_group(folder / "acts", mode="w", zarr_format=3)
    group.create_array("other", shape=(4,), dtype="int32")
    made = group.create_array(
        "acts", shape=values.shape, dtype="float32", chunks=(100, *values.shape[1:])
    )
    made[:] = values
    return folder / "acts"


def write_arrow(folder: Path, values: Array) -> Path:
    """A record a row, as `sae-pipe store export` writes them: quickly, for large inputs."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    table = pa.table({HOOK: lists})
    with pa.ipc.new_stream(folder / "acts.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "acts.arrow"


WRITERS: dict[str, Callable[[Path, Array], Path]] = {
    "npy": write_npy,
    "safetensors": write_safetensors,
    "datasets": write_datasets,
    "zarr": write_zarr,
}
MEMBERS = {"tensor": "part_*", "column": HOOK, "array": "acts"}


def members_for(kind: str, **given: str | None) -> dict[str, str | None]:
    selector = IMPORTERS[kind].selector
    members: dict[str, str | None] = dict.fromkeys(MEMBERS)
    return members | ({} if selector is None else {selector: MEMBERS[selector]}) | given


def rows_of(n_rows: int, d_in: int) -> Array:
    """Rows that are all different, with a mean, and exact in bfloat16: row i holds i in its bits."""
    bits = (np.arange(n_rows)[:, None] >> np.arange(24)[None, :]) & 1
    return np.ascontiguousarray(np.resize(bits.astype(np.float32).T, (d_in, n_rows)).T) + 3


def config_of(kind: str, path: Path, out: Path, **changes: Any) -> ImportConfig:
    options: dict[str, Any] = {
        "source": path,
        "out": out,
        "members": members_for(kind),
        "block_bytes": 1024 * 24 * 2,
        "shard_rows": 512,
        "heldout_rows": 100,
    }
    return ImportConfig(**(options | changes))


def quietly(config: ImportConfig) -> ActivationStore:
    return import_rows(config, say=lambda line: None)


def stored(store: ActivationStore) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    """All rows with their sources, training rows first, and the sources of the held-out ones."""
    n = store.heldout.n_rows
    heldout = store.heldout.source(0, n)
    source = np.concatenate([store._train.read_source(slice(None)), heldout])
    return np.concatenate([store.read(slice(None)), store.heldout.read(0, n)]), source, heldout


def test_every_importer_has_a_writer_here() -> None:
    assert WRITERS.keys() == IMPORTERS.keys()
    assert {each.selector for each in IMPORTERS.values()} - {None} == MEMBERS.keys()
    assert all(each.kind == name for name, each in IMPORTERS.items())


@pytest.mark.parametrize("kind", IMPORTERS)
@pytest.mark.parametrize("shape", [(3000, 24), (150, 20, 24)])
def test_every_row_is_stored_once_under_its_number(
    kind: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    rows = rows_of(3000, 24)
    path = WRITERS[kind](tmp_path, rows.reshape(shape))
    store = quietly(config_of(kind, path, tmp_path / "acts.zarr"))
    found, source, heldout = stored(store)
    np.testing.assert_array_equal(np.sort(source), np.arange(3000))
    np.testing.assert_array_equal(found, rows[source])
    assert (store.n_rows, len(heldout)) == (2900, 100)
    size = 1 if len(shape) == 2 else 20
    assert store.context_size == size
    np.testing.assert_array_equal(heldout, np.sort(heldout))  # in the order of the input
    contexts = heldout // size
    assert np.unique(contexts, return_counts=True)[1].tolist() == [size] * (100 // size)
    train_contexts, positions = store.source(slice(None))
    assert not set(train_contexts.tolist()) & set(contexts.tolist())
    np.testing.assert_array_equal(train_contexts * size + positions, source[:2900])
    assert abs(np.corrcoef(np.arange(2900), source[:2900])[0, 1]) < 0.1
    assert not store.masked(slice(None)).any()
    described = store.recipe["imported"]
    assert (described["kind"], described["shape"], described["dtype"]) == (
        kind,
        list(shape),
        "float32",
    )


def test_all_kinds_of_input_give_the_same_rows_in_the_same_places(tmp_path: Path) -> None:
    rows, digests = rows_of(3000, 24), set()
    for kind, write in WRITERS.items():
        (tmp_path / kind).mkdir()
        path = write(tmp_path / kind, rows)
        # A Zarr array moves in runs of its chunks where it may; here blocks are too small for it.
        store = quietly(config_of(kind, path, tmp_path / f"{kind}.zarr", block_bytes=512 * 24 * 2))
        shards = store.manifest["train"]["shards"]
        digests.add(json.dumps([shard["files"]["source"]["sha256"] for shard in shards]))
    assert len(digests) <= 2


@settings(max_examples=200, deadline=None)
@given(
    n_rows=st.integers(1, 3000),
    context_size=st.integers(1, 40),
    together=st.integers(1, 400),
    block_rows=st.integers(1, 40),
    heldout=st.integers(0, 100),
    seed=st.integers(0, 9),
)
def test_the_order_holds_every_row_once_whatever_the_sizes(
    n_rows: int, context_size: int, together: int, block_rows: int, heldout: int, seed: int
) -> None:
    block_rows *= 16
    sizes: dict[str, Any] = {
        "context_size": context_size,
        "rows_together": together,
        "block_rows": block_rows,
        "heldout_rows": heldout,
        "seed": seed,
    }
    if heldout > n_rows - context_size:
        return
    order = InputOrder(n_rows, **sizes)
    parts = {"d_in": 1, "chunk_rows": block_rows, "shard_rows": block_rows}
    rows = []
    for n, block_of in ((order.n_train, order.train_block), (order.n_heldout, order.heldout_block)):
        layout = Layout(n_rows=n, block_rows=block_rows, **parts)
        blocks = [block_of(layout, block) for block in range(layout.n_blocks)]
        for block in blocks:
            np.testing.assert_array_equal(np.sort(block.places_R), np.arange(len(block.rows_R)))
            assert (np.diff(block.rows_R) > 0).all()
        rows.append(np.concatenate([np.empty(0, np.int64), *(b.rows_R for b in blocks)]))
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(n_rows))
    assert heldout <= order.n_heldout < heldout + context_size or heldout == 0 == order.n_heldout
    assert not set((rows[0] // context_size).tolist()) & set((rows[1] // context_size).tolist())
    assert (np.diff(rows[1]) > 0).all()


def test_blocks_are_fair_samples_of_the_input() -> None:
    order = InputOrder(
        200_000, context_size=1, rows_together=1, block_rows=20_000, heldout_rows=0, seed=0
    )
    layout = Layout(n_rows=200_000, d_in=1, chunk_rows=1000, shard_rows=1000, block_rows=20_000)
    for block in range(10):
        counts, _ = np.histogram(order.train_block(layout, block).rows_R, 10, (0, 200_000))
        assert np.abs(counts - 2000).max() < 350  # runs of 3 rows: 5 standard deviations are 390


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("store_dtype", VALUE_TYPES)
def test_number_formats_are_rounded_once(
    dtype: torch.dtype, store_dtype: str, tmp_path: Path
) -> None:
    values = (torch.randn(600, 8, generator=torch.Generator().manual_seed(0)) + 2).to(dtype)
    save_file({"x": values}, tmp_path / "x.safetensors")
    store = quietly(
        config_of(
            "npy",
            tmp_path / "x.safetensors",
            tmp_path / "acts.zarr",
            members={"tensor": None},
            store_dtype=store_dtype,
        )
    )
    found, source, _ = stored(store)
    expected = values.float().to(getattr(torch, store_dtype)).float().numpy()
    np.testing.assert_array_equal(found, expected[source])


def test_several_files_of_big_endian_numbers_are_read_one_after_another(tmp_path: Path) -> None:
    rows = rows_of(900, 24)
    (tmp_path / "in").mkdir()
    for i, part in enumerate(np.split(rows, [100, 500])):
        np.save(tmp_path / "in" / f"part{i + 8}.npy", part.astype(">f4"))
    found, source, _ = stored(quietly(config_of("npy", tmp_path / "in", tmp_path / "acts.zarr")))
    np.testing.assert_array_equal(found, rows[source])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("sharded", [False, True])
def test_zarr_arrays_of_both_versions_are_read(
    zarr_format: Any, sharded: bool, tmp_path: Path
) -> None:
    if sharded and zarr_format == 2:
        return
    rows = rows_of(1000, 24)
    made = zarr.create_array(
        tmp_path / "in",
        shape=rows.shape,
        chunks=(100, 12),
        shards=(500, 24) if sharded else None,
        dtype="float32",
        zarr_format=zarr_format,
    )
    made[:] = rows
    config = config_of("zarr", tmp_path / "in", tmp_path / "acts.zarr", members={})
    found, source, _ = stored(quietly(config))
    np.testing.assert_array_equal(found, rows[source])


def test_a_store_can_be_imported_by_its_activations(store: Path, tmp_path: Path) -> None:
    config = config_of("zarr", store, tmp_path / "acts.zarr", members={"array": "activations"})
    found, source, _ = stored(quietly(config))
    np.testing.assert_array_equal(found, open_store(store).read(slice(None))[source])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_random_instants_an_import_has_the_bytes_of_one_never_interrupted(
    tmp_path: Path,
) -> None:
    path = write_npy(tmp_path, rows_of(6000, 24))
    config = config_of("npy", path, tmp_path / "whole.zarr", codec="compact")
    code, events = run_in_child(lambda: quietly(config))
    assert code == 0
    again = config_of("npy", path, tmp_path / "killed.zarr", codec="compact")
    assert killed_until_done(lambda: quietly(again), events, seed=2) >= 6
    assert content(again.out) == content(config.out)


def test_a_complete_import_has_nothing_to_do_and_other_flags_are_told_apart(tmp_path: Path) -> None:
    path = write_npy(tmp_path, rows_of(3000, 24))
    config = config_of("npy", path, tmp_path / "acts.zarr")
    quietly(config)
    said: list[str] = []
    import_rows(config, say=said.append)
    assert said == [f"{config.out} is complete: 2,900 rows of this input. Nothing to do."]
    for changes, difference in (
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"block_bytes": 512 * 24 * 2}, "block_rows is 1024 there and 512 here"),
        ({"layer": 2}, "layer is None there and 2 here"),
    ):
        message = (
            f"^Store {config.out} was begun with another recipe: {difference}. "
            "Pass the same flags to go on with it, or another --out.$"
        )
        with pytest.raises(InputError, match=message):
            quietly(config_of("npy", path, config.out, **changes))


def test_an_imported_store_does_all_that_needs_no_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "acts.npy", (rng.standard_normal((40, 50, 16)) + 2).astype(np.float32))
    config = config_of(
        "npy", tmp_path / "acts.npy", tmp_path / "a.zarr", model="m", layer=3, hook="h", note="n"
    )
    store = quietly(config)
    assert store.manifest["provenance"]["imported"]["note"] == "n"
    assert store.manifest["shuffle"]["failures"] == []
    pairs = dict(describe(store.path, store.manifest))
    assert pairs["imported"] == ("acts.npy (npy), 40 x 50 x 16 values in float32, 128 kB; seed 0")
    assert pairs["contexts"] == "50 rows; their tokens are unknown"
    assert pairs["layer"] == "3, as the importer said"
    message = (
        f"^Store {store.path} was imported without its tokens, so they cannot be looked up. "
        "Harvest a store to see the text behind its rows.$"
    )
    with pytest.raises(InputError, match=message):
        _ = store.corpus
    settings = FitConfig(arch="topk", k=4, d_sae=32, batch_size=64, tokens=640, device="cpu")
    fit(store, settings, tmp_path / "run", show_progress=False)
    with pytest.raises(InputError, match=message):
        top_activations(load_sae(tmp_path / "run"), store, None, count=1, examples=1)
    recode(store.path, tmp_path / "b.zarr", "compact", say=lambda line: None)
    copy = open_store(tmp_path / "b.zarr")
    assert not copy.has_corpus
    np.testing.assert_array_equal(copy.source(slice(None)), store.source(slice(None)))


@pytest.mark.parametrize("kind", IMPORTERS)
def test_memory_does_not_grow_with_the_input(kind: str, tmp_path: Path) -> None:
    def importing(name: str, rows: Array, shard_rows: int) -> Callable[[], object]:
        (tmp_path / name).mkdir()
        path = (WRITERS | {"datasets": write_arrow})[kind](tmp_path / name, rows)
        out = tmp_path / f"{name}.zarr"
        config = config_of(kind, path, out, block_bytes=4 << 20, shard_rows=shard_rows)
        return partial(import_rows, config, say=str)

    rows = np.resize(np.arange(4096, dtype=np.float32), (60_000, 512))  # 123 MB
    small, large = importing("small", rows[:2000], 512), importing("large", rows, 4096)
    assert not runs_in_memory(partial(np.ones, 123_000_000, np.uint8), 84 << 20, small)
    shutil.rmtree(tmp_path / "small.zarr")
    assert runs_in_memory(large, 84 << 20, small)
    assert open_store(tmp_path / "large.zarr").n_rows == 59_900


# --- refused ---


def refuses(message: str, config: ImportConfig, error: type[Exception] = InputError) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        quietly(config)
    assert not (config.out / "manifest.json").exists()


def test_rows_that_a_store_cannot_hold_are_named(tmp_path: Path) -> None:
    rows = rows_of(3000, 24)
    for value, shown in ((np.nan, "nan"), (-np.inf, "-inf")):
        rows[1234, 5] = value
        path = write_npy(tmp_path, rows)
        config = config_of("npy", path, tmp_path / f"{shown}.zarr")
        message = (
            f"^Row 1234 of {path} holds {shown} at dimension 5, which a store cannot hold. Leave "
            "such rows out of the input.$"
        )
        with pytest.raises(InputError, match=message):
            quietly(config)
    rows[1234, 5] = 70_000
    path = write_npy(tmp_path, rows)
    message = (
        f"Row 1234 of {path} holds 70000 at dimension 5, and float16 ends at 65504. Pass another "
        "--store-dtype."
    )
    config = config_of("npy", path, tmp_path / "half.zarr", store_dtype="float16")
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        quietly(config)


def test_mistaken_flags_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_npy(tmp_path, rows_of(3000, 24)), tmp_path / "acts.zarr"
    known = "; ".join(each.about for each in IMPORTERS.values())
    (tmp_path / "acts.pt").write_bytes(b"PK")
    many = write_safetensors(tmp_path, rows_of(10, 24))
    np.save(tmp_path / "cube.npy", rows_of(3000, 24).reshape(150, 20, 24))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    for message, changes in (
        (
            f"There is nothing at {tmp_path / 'gone'}. Pass a file or folder of activations.",
            {"source": tmp_path / "gone"},
        ),
        (
            f"{tmp_path / 'acts.pt'} is nothing that can be imported. Known are {known}.",
            {"source": tmp_path / "acts.pt"},
        ),
        (
            f"--column is not for {path}, which is read as npy. Leave it out.",
            {"members": {"column": "x"}},
        ),
        (
            f"--array is not for {many}, which is read as safetensors. Pass --tensor.",
            {"source": many, "members": {"array": "x"}},
        ),
        (
            f"{many} has several tensors of floats that could be rows: 'part_10', 'part_9'. Pass "
            "one as --tensor.",
            {"source": many, "members": {}},
        ),
        (
            f"{many} has no tensor 'x' of floats. Pass one of 'part_10', 'part_9' as --tensor.",
            {"source": many, "members": {"tensor": "x"}},
        ),
        (
            f"--context-size is 7, and {tmp_path / 'cube.npy'} has contexts of 20. Leave it out.",
            {"source": tmp_path / "cube.npy", "context_size": 7},
        ),
        (
            "--heldout-rows 3000 takes all 3,000 rows of the input, which are held out in runs of "
            "1. Pass fewer, or 0.",
            {"heldout_rows": 3000},
        ),
        (
            f"{tmp_path / 'mine'} exists and is not an activation store. Pass another --out, or "
            "move it away.",
            {"out": tmp_path / "mine"},
        ),
    ):
        options: dict[str, Any] = {"path": path, "out": out} | changes
        refuses(message, config_of("npy", **options))
    monkeypatch.setattr("sae_pipe.storage.disk.free_bytes", lambda path: 1000)
    message = (
        f"^The disk is too small: {out} needs about [0-9.]+ kB, and 1 kB are free at {tmp_path}. "
        "Free space there, or pass a place on a larger disk.$"
    )
    with pytest.raises(DiskError, match=message):
        quietly(config_of("npy", path, out))


def test_an_import_does_not_go_on_with_a_harvest(store: Path, tmp_path: Path) -> None:
    path = write_npy(tmp_path, rows_of(300, 24))
    message = f"^{store} was not made by an import. Pass another --out, or move it away.$"
    with pytest.raises(InputError, match=message):
        quietly(config_of("npy", path, store))


def npy_header(path: Path, descr: str, shape: object, data: bytes, order: bool = False) -> Path:
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("descr", "shape", "message"),
    [
        (
            "|O",
            (2, 2),
            "{0} holds pickled Python objects, which are not read. Save the activations as an "
            "array of float16 or float32.",
        ),
        (
            "<f4",
            (2**40, 2**20),
            "The array (1099511627776, 1048576) of {0} needs 4,611,686,018,427,387,904 bytes by "
            "its header, and 16 are there: it is cut off or damaged. Fetch it again.",
        ),
        (
            "<f4",
            (2**62, 2**62),
            f"The array ({2**62}, {2**62}) of {{0}} needs {4 * 2**124:,} bytes by its header, and "
            "16 are there: it is cut off or damaged. Fetch it again.",
        ),
        (
            "<f4",
            (-2, -2),
            "{0} has shape (-2, -2), and activations are (rows, d_in) or (contexts, positions, "
            "d_in) with at least one of each.",
        ),
        (
            "<i4",
            (2, 2),
            "{0} holds values of type int32, and activations are float16, float32 or float64. "
            "bfloat16 has no place in .npy files: use .safetensors for it.",
        ),
        (
            "<f4",
            (4,),
            "{0} has shape (4,), and activations are (rows, d_in) or (contexts, positions, d_in) "
            "with at least one of each.",
        ),
    ],
)
def test_npy_headers_that_lie_are_refused(
    descr: str, shape: Any, message: str, tmp_path: Path
) -> None:
    path = npy_header(tmp_path / "acts.npy", descr, shape, bytes(16))
    refuses(message.format(path), config_of("npy", path, tmp_path / "acts.zarr"))


def test_npy_files_in_fortran_order_or_of_no_format_are_refused(tmp_path: Path) -> None:
    path = npy_header(tmp_path / "acts.npy", "<f4", (2, 2), bytes(16), order=True)
    config = config_of("npy", path, tmp_path / "acts.zarr")
    refuses(
        f"{path} is stored column by column (Fortran order), so no row can be read by itself. Save "
        "it again with numpy.ascontiguousarray.",
        config,
    )
    for data in (b"", b"\x93NUMPY\x01\x00\xff\xff{", b"\x80\x04 a pickle."):
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"^{path} is no .npy file that can be read \\("):
            quietly(config)


def test_files_of_different_widths_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows_of(4, 24))
    np.save(tmp_path / "b.npy", rows_of(4, 23))
    refuses(
        f"{tmp_path / 'b.npy'} holds float32 of shape (4, 23), and {tmp_path / 'a.npy'} float32 of "
        "shape (4, 24). Pass files of one width and number format.",
        config_of("npy", tmp_path, tmp_path / "acts.zarr"),
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 2**60]},
            "Tensor 'x' of {0} is said to stand at [0, 1152921504606846976] of 16 bytes of data: "
            "the file is cut off or damaged. Fetch it again.",
        ),
        (
            {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 16]},
            "Tensor 'x' of {0} needs 16 bytes by its header, and 8 are there: it is cut off or "
            "damaged. Fetch it again.",
        ),
        (
            {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
            f"Tensor 'x' of {{0}} needs {4 * 2**80:,} bytes by its header, and 16 are there: it is "
            "cut off or damaged. Fetch it again.",
        ),
        (
            {"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]},
            "Tensor 'x' of {0} has shape [2, -2], and activations are (rows, d_in) or (contexts, "
            "positions, d_in) with at least one of each.",
        ),
        (
            {"dtype": "F32", "shape": [2, 2]},
            "Tensor 'x' of {0} is said to stand at None of 16 bytes of data: the file is cut off "
            "or damaged. Fetch it again.",
        ),
    ],
)
def test_safetensors_headers_that_lie_are_refused(
    entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path, header = tmp_path / "acts.safetensors", json.dumps({"x": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    config = config_of("npy", path, tmp_path / "acts.zarr", members={})
    refuses(message.format(path), config)
    path.write_bytes(struct.pack("<Q", 2**63) + header)
    refuses(
        f"{path} is no .safetensors file that can be read (its header claims "
        f"{2**63:,} of {len(header) + 8:,} bytes). Fetch it again.",
        config,
    )


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "a/b.arrow", "..", "", 3])
def test_a_datasets_folder_leads_nowhere_else(name: object, tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    write_datasets(tmp_path, rows_of(20, 4)).joinpath("state.json").write_text(
        json.dumps({"_data_files": [{"filename": name}]})
    )
    refuses(
        f"{tmp_path / 'acts' / 'state.json'} names the file {name!r}, which is not a plain name in "
        "its folder. Do not use this dataset unless you know where it comes from.",
        config_of("datasets", tmp_path / "acts", tmp_path / "acts.zarr"),
    )


def test_datasets_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = write_datasets(tmp_path, rows_of(20, 4))
    config = config_of("datasets", path, tmp_path / "acts.zarr", members={"column": "nope"})
    first = path / "data-00000-of-00002.arrow"
    refuses(f"{first} has no column 'nope' of floats. Pass one of {HOOK!r} as --column.", config)
    (path / "data-00001-of-00002.arrow").unlink()
    config = config_of("datasets", path, tmp_path / "acts.zarr")
    refuses(
        f"{path / 'data-00001-of-00002.arrow'}, of which state.json speaks, is missing. Fetch it.",
        config,
    )
    ragged = pa.table({"x": pa.array([[1.0, 2.0], [3.0]], pa.list_(pa.float32()))})
    with pa.ipc.new_stream(tmp_path / "x.arrow", ragged.schema) as writer:
        writer.write_table(ragged)
    refuses(
        f"Column 'x' of {tmp_path / 'x.arrow'} is not a table of numbers (its lists have 1 to 2 "
        "values). Pass another --column, or save the dataset again.",
        config_of("npy", tmp_path / "x.arrow", tmp_path / "acts.zarr", members={}),
    )
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refuses(
        f"{tmp_path / 'both'} is a dataset of several splits ('train', 'test'). Pass the folder of "
        "one of them.",
        config_of("npy", tmp_path / "both", tmp_path / "acts.zarr", members={}),
    )


def test_zarr_arrays_that_are_no_plain_floats_are_refused(tmp_path: Path) -> None:
    def array(name: str, meta: dict[str, Any]) -> ImportConfig:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".zarray").write_text(json.dumps(meta))
        return config_of("npy", tmp_path / name, tmp_path / "acts.zarr", members={})

    plain: dict[str, Any] = {
        "zarr_format": 2,
        "shape": [4, 4],
        "chunks": [2, 4],
        "dtype": "<f4",
        "compressor": None,
        "filters": None,
        "fill_value": 0,
        "order": "C",
    }
    refuses(
        f"Array {tmp_path / 'strings'} holds values of type |O, and activations are float16, "
        "float32 or float64.",
        array("strings", plain | {"dtype": "|O", "filters": [{"id": "pickle"}]}),
    )
    refuses(
        f"Array {tmp_path / 'pickles'} is packed with 'pickle', which is not read here. Write it "
        "again with one of blosc, gzip, zstd or none.",
        array("pickles", plain | {"filters": [{"id": "pickle"}]}),
    )
    refuses(
        f"Array {tmp_path / 'holes'} lacks 2 of its chunks, which would be read as its fill "
        "value. Fetch them.",
        array("holes", plain),
    )
    refuses(
        f"One chunk of {tmp_path / 'huge'} holds 17,592,186,044,416 bytes of rows, more than is "
        "read at once (1,073,741,824). Write it again with smaller chunks.",
        array("huge", plain | {"shape": [2**40, 4], "chunks": [2**40, 4]}),
    )
    zarr.create_array(tmp_path / "words", shape=(3,), dtype="str")
    refuses(
        f"Array {tmp_path / 'words'} holds values of type string, and activations are float16, "
        "float32 or float64.",
        config_of("npy", tmp_path / "words", tmp_path / "acts.zarr", members={}),
    )
