"""The recipes of docs/reading-a-store.md, run as they stand there, against our own reader."""

# R rows, D d_in

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.recode import recode

from .conftest import write_store
from .services import free_port, web_server

PAGE = Path(__file__).resolve().parent.parent / "docs/reading-a-store.md"
D_IN = 128  # of `compact`, two frames a chunk
N_ROWS = 20_480  # more than one piece of dask's, twenty batches of 1024
# A mean of N float64 that are at most M, summed in whatever order, is at most N * 2^-53 * M off: no
# value here is above 20, and no product of two that are centred above 400.
OFF = N_ROWS * 2.0**-53

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")


def recipes() -> list[tuple[str, str, str]]:
    """Heading, word behind `python` (a codec, `remote`, or nothing), and code of every recipe."""
    found = []
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading = section.partition("\n")[0]
        for word, code in re.findall(
            r"^```python ?(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL
        ):
            found.append((heading, word, code))
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Codec -> a folder with acts.zarr, and with its rows as numpy files in `exported`.

    The dimensions have means and spreads of their own.
    """
    rng = np.random.default_rng(0)
    spread_D = rng.uniform(0.5, 2, D_IN)
    rows_RD = rng.standard_normal((N_ROWS + 512, D_IN)) * spread_D + rng.uniform(-4, 4, D_IN)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("lossless", "compact")}
    lossless, compact = (folder / "acts.zarr" for folder in folders.values())
    write_store(lossless, rows_RD[:N_ROWS].astype("f4"), rows_RD[N_ROWS:].astype("f4"))
    recode(lossless, compact, "compact", say=lambda line: None)
    for folder in folders.values():
        command = ["store", "export", "acts.zarr", "exported", "--format", "numpy"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert CliRunner().invoke(app, command).exit_code == 0
    return folders


def run(code: str) -> dict[str, Any]:
    """What the names of a recipe stand for at its end."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "recipe", "exec"), names)  # noqa: S102  # of our own documentation
    return names


def found_in(heading: str, folder: Path, codec: str, patch: pytest.MonkeyPatch) -> list[Any]:
    """The names of each recipe below a heading that is meant for a codec."""
    patch.chdir(folder)
    codes = [c for h, word, c in recipes() if h.startswith(heading) and word in ("", codec)]
    assert codes
    return [run(code) for code in codes]


@pytest.fixture(params=["lossless", "compact"])
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kept(stores: dict[str, Path], codec: str) -> ActivationStore:
    return open_store(stores[codec] / "acts.zarr")


def rows_of(kept: ActivationStore) -> NDArray[np.float64]:
    return kept.read(slice(None)).astype("f8")


def same_mean(found_D: NDArray[np.float64], kept: ActivationStore) -> None:
    rows_RD = rows_of(kept)
    assert np.abs(rows_RD.mean(0)).max() > 3
    np.testing.assert_allclose(found_D, rows_RD.mean(0), rtol=0, atol=2 * 20 * OFF)


def test_every_recipe_is_short_and_run_by_a_test() -> None:
    found = recipes()
    for heading, _, code in found:
        lines = [
            line for line in code.splitlines() if line and not line.startswith(("import", "from"))
        ]
        assert len(lines) <= 11, heading
    run_here = {
        heading: word for heading, word, _ in found for name in HEADINGS if heading.startswith(name)
    }
    assert set(run_here) == {heading for heading, *_ in found}
    assert {word for _, word, _ in found} == {"", "lossless", "compact", "remote"}


HEADINGS = (
    "zarr-python", "Which token", "dask", "xarray", "tensorstore", "numpy", "PyTorch", "Check every",
)  # fmt: skip


def test_zarr_python_reads_the_rows(
    kept: ActivationStore, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [found] = found_in("zarr-python", kept.path.parent, codec, monkeypatch)
    np.testing.assert_array_equal(found["rows"], kept.read(slice(1000)))
    np.testing.assert_array_equal(found["source"], np.arange(1000))
    np.testing.assert_array_equal(found["mean"], kept.mean)
    np.testing.assert_array_equal(found["variance"], kept.variance)
    np.testing.assert_array_equal(found["heldout"], kept.heldout.read(0, 512))


def test_zarr_python_reads_from_a_web_server(
    kept: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    [code] = [code for _, word, code in recipes() if word == "remote"]
    port = free_port()
    with web_server(kept.path.parent, port, tmp_path / "web.log"):
        found = run(code.replace("https://host/", f"http://127.0.0.1:{port}/"))
    np.testing.assert_array_equal(found["rows"], kept.read(slice(2000, 3000)))


def test_dask_finds_mean_and_covariance_on_a_local_cluster(
    kept: ActivationStore, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [found] = found_in("dask", kept.path.parent, codec, monkeypatch)
    same_mean(found["mean"], kept)
    assert found["x"].numblocks == (2, 1)
    centred_RD = rows_of(kept) - rows_of(kept).mean(0)
    covariance_DD = centred_RD.T @ centred_RD / N_ROWS
    np.testing.assert_allclose(found["covariance"], covariance_DD, rtol=0, atol=2 * 400 * OFF)
    np.testing.assert_allclose(np.diag(found["covariance"]), kept.variance, rtol=1e-5)


def test_xarray_opens_the_group(
    kept: ActivationStore, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [found] = found_in("xarray", kept.path.parent, codec, monkeypatch)
    opened = found["store"]
    assert opened.activations.dims == ("row", "d_in")
    assert opened.source.dims == opened.masked.dims == ("row",)
    np.testing.assert_array_equal(opened.activations[:300].values, kept.read(slice(300)))
    np.testing.assert_array_equal(opened.source.values, np.arange(N_ROWS))
    assert opened.source.dtype == np.int64
    np.testing.assert_array_equal(found["heldout"].activations.values, kept.heldout.read(0, 512))
    same_mean(found["mean"], kept)
    assert found["masked_rows"] == 0


def test_tensorstore_reads_the_rows_and_misses_none_silently(
    kept: ActivationStore, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kept.path.parent
    [found] = found_in("tensorstore", folder, codec, monkeypatch)
    np.testing.assert_array_equal(found["rows"], kept.read(slice(1000)))
    shutil.copytree(kept.path, tmp_path / "acts.zarr")
    (tmp_path / "acts.zarr/activations/c/0/0").unlink()
    with pytest.raises(ValueError, match=r"NOT_FOUND: .* is missing"):
        found_in("tensorstore", tmp_path, codec, monkeypatch)


def test_a_missing_shard_is_nan_in_zarr_python(
    kept: ActivationStore, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(kept.path, tmp_path / "acts.zarr")
    (tmp_path / "acts.zarr/activations/c/0/0").unlink()
    with pytest.raises(AssertionError, match=r"^a shard is missing$"):
        found_in("zarr-python", tmp_path, codec, monkeypatch)


def test_numpy_reads_the_exported_form_and_a_shard(
    kept: ActivationStore, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported, shard = found_in("numpy", kept.path.parent, codec, monkeypatch)
    np.testing.assert_array_equal(exported["rows"], kept.read(slice(None)))
    np.testing.assert_array_equal(exported["source"], np.arange(N_ROWS))
    same_mean(exported["mean"], kept)
    assert shard["rows"].dtype == np.float32
    np.testing.assert_array_equal(shard["rows"], kept.read(slice(1024)))


def test_pytorch_reads_an_epoch(
    kept: ActivationStore, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, loader = found_in("PyTorch", kept.path.parent, codec, monkeypatch)
    same_mean(loop["mean"].numpy(), kept)
    with kept.batches(1024, seed=0) as batches:
        first = batches.to_floats(next(batches))
    np.testing.assert_array_equal(loader["x"].numpy(), first)


def test_the_check_of_every_file_finds_a_flipped_bit(
    kept: ActivationStore, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [found] = found_in("Check every", kept.path.parent, codec, monkeypatch)
    assert len(found["wanted"]) == 20 * 3 + 2
    shutil.copytree(kept.path, tmp_path / "acts.zarr")
    file = tmp_path / "acts.zarr/heldout/activations/c/0/0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(AssertionError, match=r"^heldout/activations/c/0/0$"):
        found_in("Check every", tmp_path, codec, monkeypatch)


def test_a_row_is_traced_to_its_token(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvested = open_store(store)
    (tmp_path / "acts.zarr").symlink_to(harvested.path)
    [found] = found_in("Which token", tmp_path, "lossless", monkeypatch)
    context, position = harvested.source([1234])
    assert (found["context"], found["position"]) == (context[0], position[0])
    np.testing.assert_array_equal(found["tokens"], harvested.corpus.train.context(int(context[0])))
    assert found["before"]
