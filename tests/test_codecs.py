"""Every codec, run over the registry: what goes in comes out, for us and for plain readers."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array
import numcodecs.blosc
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sae_pipe.storage import ActivationStore, InputError, open_store, zarr_metadata
from sae_pipe.storage.codecs import CODECS, Codec, get_codec
from sae_pipe.storage.codecs.blosc import BloscFrames
from sae_pipe.storage.codecs.compact import Compact, typical_deviation
from sae_pipe.storage.errors import NonFiniteError
from sae_pipe.storage.layout import Layout
from sae_pipe.storage.recode import recode
from sae_pipe.storage.rows import SplitReader
from sae_pipe.storage.statistics import Distortion
from sae_pipe.storage.values import VALUE_TYPES, Floats
from sae_pipe.storage.writer import SplitWriter

ALL = [(name, dtype) for name in CODECS for dtype in VALUE_TYPES]
# zarr-python says of numcodecs' filters that the specification does not know them.
WARNED = "ignore:Numcodecs codecs are not in the Zarr version 3 specification"


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def some_rows(n_rows: int, d_in: int, seed: int = 0) -> Floats:
    """Correlated rows with a mean of several standard deviations."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n_rows, d_in)) * rng.uniform(0.5, 2, d_in)
    return (rows + rng.uniform(-6, 6, d_in)).astype(np.float32)


def write_rows(
    root: Path, pool: ThreadPoolExecutor, codec: Codec, values_RD: Floats
) -> tuple[SplitReader, SplitWriter, Floats]:
    """Write rows with a codec; also gives the rows as the store's number format rounds them."""
    rows = codec.values.of_floats(values_RD)
    rounded = np.empty(values_RD.shape, np.float32)
    codec.values.to_floats(rows, rounded)
    codec = codec.calibrated(rounded)
    layout = Layout(
        n_rows=len(rows), d_in=rows.shape[1], chunk_rows=64, shard_rows=256, block_rows=512
    )
    writer = SplitWriter(root, "", layout, codec, pool, with_masked=False)
    for shard in range(layout.n_shards):
        part = slice(*layout.rows_of_shard(shard))
        writer.write(shard, rows[part], np.arange(part.start, part.stop))
    zarr_metadata.write_metadata(root, writer.metadata())
    return SplitReader(root, "", layout, writer.collect().shards, codec), writer, rounded


@pytest.mark.filterwarnings(WARNED)
@pytest.mark.parametrize(("name", "dtype"), ALL)
@pytest.mark.parametrize("d_in", [1, 12, 48, 131])
def test_our_reader_zarr_and_dask_read_the_same_numbers(
    tmp_path: Path, pool: ThreadPoolExecutor, name: str, dtype: str, d_in: int
) -> None:
    reader, writer, rounded = write_rows(
        tmp_path, pool, get_codec(name, dtype), some_rows(300, d_in)
    )
    read = reader.read(slice(None))
    if writer.codec.is_lossy:
        assert np.abs(read - rounded).max() <= 0.5001 * writer.codec.served.step
    else:
        np.testing.assert_array_equal(read, rounded)
    array = zarr.open_array(store=tmp_path / "activations", mode="r")
    np.testing.assert_array_equal(array[:], read)
    lazy = dask.array.from_zarr(str(tmp_path), component="activations")
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), read)


@pytest.mark.filterwarnings(WARNED)
@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_our_reader_reads_shards_that_zarr_wrote(
    tmp_path: Path, pool: ThreadPoolExecutor, name: str, dtype: str
) -> None:
    reader, writer, _ = write_rows(tmp_path, pool, get_codec(name, dtype), some_rows(300, 48))
    expected = reader.read(slice(None))[::-1].copy()
    array = zarr.open_array(store=tmp_path / "activations", mode="r+")
    array[:] = expected
    records = [
        {"files": {"activations": {"bytes": reader.shard_path(shard).stat().st_size}}}
        for shard in range(reader.layout.n_shards)
    ]
    again = SplitReader(tmp_path, "", reader.layout, records, writer.codec)
    np.testing.assert_array_equal(again.read(slice(None)), expected)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    d_in=st.integers(1, 70),
    scale=st.floats(1e-3, 500),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_a_chunk_of_any_shape_comes_back(
    name: str, dtype: str, rows: int, d_in: int, scale: float, seed: int
) -> None:
    values = (np.random.default_rng(seed).standard_normal((rows, d_in)) + 2).astype(np.float32)
    values *= np.float32(scale)
    values += np.arange(rows, dtype=np.float32)[:, None] * np.float32(scale)
    codec = get_codec(name, dtype)
    rounded = np.empty_like(values)
    codec.values.to_floats(codec.values.of_floats(values), rounded)
    codec = codec.calibrated(np.concatenate([rounded, rounded + np.float32(scale)]))
    np.testing.assert_array_equal(round_trip(codec, rounded), codec.kept(rounded))


def round_trip(codec: Codec, values_RD: Floats) -> Floats:
    served = np.empty(values_RD.shape, codec.served.memory)
    columns = codec.columns(values_RD.shape[1])
    for number, frame in enumerate(codec.encode(values_RD)):
        stored = np.empty((len(values_RD), columns), codec.stored)
        codec.decode(memoryview(frame), stored)
        codec.serve(stored, served[:, number * columns : (number + 1) * columns])
    out = np.empty_like(values_RD)
    codec.to_floats(served, out)
    return out


@pytest.mark.parametrize(("name", "dtype"), ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_no_numbers_are_refused(
    tmp_path: Path, pool: ThreadPoolExecutor, name: str, dtype: str, bad: float
) -> None:
    codec = get_codec(name, dtype)
    values = some_rows(256, 16)
    codec = codec.calibrated(values)
    values[100, 3] = bad
    layout = Layout(n_rows=256, d_in=16, chunk_rows=64, shard_rows=256, block_rows=256)
    writer = SplitWriter(tmp_path, "", layout, codec, pool, with_masked=False)
    message = (
        f"^Shard 0 of {tmp_path} was given rows with NaN or Inf. "
        "Find out where they come from: a store cannot hold them.$"
    )
    with pytest.raises(NonFiniteError, match=message):
        writer.write(0, codec.values.of_floats(values), np.arange(256))
    assert not writer.committed
    assert not list(tmp_path.rglob("c"))


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_a_frame_of_another_size_is_refused_before_it_is_decoded(name: str, dtype: str) -> None:
    codec = get_codec(name, dtype).calibrated(some_rows(64, 16))
    frame = codec.encode(some_rows(64, 16))[0]
    room = np.empty((32, codec.columns(16)), codec.stored)
    with pytest.raises(ValueError, match=r"^frame holds \d+ bytes where \d+ belong$"):
        codec.decode(memoryview(frame), room)
    with pytest.raises(ValueError, match=r"bytes"):
        codec.decode(memoryview(frame)[:10], room)


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_frames_are_the_same_bytes_on_every_run(name: str, dtype: str) -> None:
    codec = get_codec(name, dtype).calibrated(some_rows(64, 48))
    assert codec.encode(some_rows(64, 48)) == codec.encode(some_rows(64, 48))


@pytest.mark.parametrize("name", CODECS)
def test_all_stored_numbers_are_little_endian_whatever_the_host_is(name: str) -> None:
    codec = get_codec(name).calibrated(some_rows(64, 48))
    assert {"name": "bytes", "configuration": {"endian": "little"}} in codec.zarr_codecs(48)
    assert codec.zarr_codecs(48)[-1] == {"name": "crc32c"}


def test_an_unknown_codec_or_option_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        InputError, match=r"^Unknown codec 'zip': choose one of compact, lossless, none\.$"
    ):
        get_codec("zip")
    message = "^Codec 'lossless' takes no option, found lossless:3. Pass --codec lossless.$"
    with pytest.raises(InputError, match=message):
        get_codec("lossless:3")
    for option in ("0", "-1", "nan", "x", "", "9"):
        with pytest.raises(
            InputError, match=f"^The step of --codec compact:{option} is a share of"
        ):
            get_codec(f"compact:{option}")
    message = "^Unknown number format 'float8' of stored values: choose one of bfloat16, float16, float32.$"
    with pytest.raises(InputError, match=message):
        get_codec("lossless", "float8")


# --- blosc frames ---


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 400),
    type_bytes=st.sampled_from([1, 2, 4, 8, 24, 128, 240]),
    block=st.integers(1, 9),
    spread=st.integers(1, 256),
    seed=st.integers(0, 99),
)
def test_blosc_itself_opens_the_frames_we_write(
    rows: int, type_bytes: int, block: int, spread: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, spread, (rows, type_bytes)).astype(np.uint8)
    frames = BloscFrames(type_bytes=type_bytes, block_bytes=type_bytes * 16 * block)
    frame = frames.encode_planes(values)
    assert bytes(numcodecs.blosc.decompress(frame)) == values.tobytes()


# --- the compact codec ---


def compact(values_RD: Floats, step: str = "compact") -> Compact:
    codec = get_codec(step).calibrated(values_RD)
    assert isinstance(codec, Compact)
    return codec


def relative_errors(codec: Codec, values_RD: Floats) -> tuple[float, NDArray[np.float64]]:
    """By the definition: ||x - x_hat||^2 / ||x - mean||^2, pooled and per dimension."""
    exact = values_RD.astype(np.float64)
    errors = (exact - round_trip(codec, values_RD)) ** 2
    spread = (exact - exact.mean(0)) ** 2
    return errors.sum() / spread.sum(), errors.sum(0) / spread.sum(0)


@pytest.mark.parametrize("step", [0.05, 0.25, 0.5])
def test_the_relative_error_is_a_twelfth_of_the_squared_step(step: float) -> None:
    values = some_rows(8192, 64)
    pooled, _ = relative_errors(compact(values, f"compact:{step}"), values)
    assert pooled == pytest.approx(step**2 / 12, rel=0.03)


def test_massive_dimensions_and_rows_leave_the_ordinary_dimensions_alone() -> None:
    values = some_rows(8192, 64)
    plain, _ = relative_errors(compact(values), values)
    outliers = values.copy()
    outliers[:, [3, 17, 40]] *= 30  # massive dimensions
    outliers[::500, 5] = 2000 * values[:, 5].std()  # massive rows: a spike in one dimension
    outliers[7::500] *= 300  # and rows that are massive throughout
    codec = compact(outliers)
    kept = round_trip(codec, outliers)
    ordinary_rows = np.ones(8192, np.bool_)
    ordinary_rows[::500] = ordinary_rows[7::500] = False
    ordinary = np.setdiff1d(np.arange(64), [3, 17, 40])
    exact = values[np.ix_(ordinary_rows, ordinary)].astype(np.float64)
    errors = (exact - kept[np.ix_(ordinary_rows, ordinary)]) ** 2
    pooled = errors.sum() / ((exact - exact.mean(0)) ** 2).sum()
    assert plain < 0.0054
    assert (
        pooled < 0.013
    )  # three of 64 capped at 4 times the median: at most 1.7 times the variance
    # The massive rows themselves keep their value to half a step: nothing is clipped.
    assert np.abs(kept - outliers).max() <= 0.5001 * codec.step * (1 + 1e-3)


def test_massive_rows_do_not_make_the_recorded_error_look_small(
    make_store: Callable[..., ActivationStore], tmp_path: Path
) -> None:
    """They raise the variance that the relative error is over, but not the typical one."""
    values = some_rows(4096, 32)
    values[::500] *= 3000
    source = make_store(tmp_path / "a.zarr", values, values[:4])
    recode(source.path, tmp_path / "b.zarr", "compact", say=lambda line: None)
    error = open_store(tmp_path / "b.zarr").manifest["encoding"]["error"]
    assert error["relative"] < 1e-5
    assert error["of_typical_variance"] == pytest.approx(0.25**2 / 12, rel=0.05)


def test_values_beyond_the_range_of_codes_are_clipped_and_counted(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    values = some_rows(256, 16)
    codec = compact(values)
    assert codec.code == "int16"
    values[10, 3], values[20, 4] = 1e6, -1e6
    layout = Layout(n_rows=256, d_in=16, chunk_rows=64, shard_rows=256, block_rows=256)
    writer = SplitWriter(tmp_path, "", layout, codec, pool, with_masked=False)
    writer.write(0, codec.values.of_floats(values), np.arange(256))
    collected = writer.collect()
    assert collected.distortion is not None
    assert collected.distortion.clipped == 2
    reader = SplitReader(tmp_path, "", layout, collected.shards, codec)
    read = reader.read(slice(None))
    assert read[10, 3] > 3e4 * codec.step
    assert read[20, 4] < -3e4 * codec.step
    np.testing.assert_allclose(read[:10], values[:10], atol=0.6 * codec.step)


@pytest.mark.filterwarnings(WARNED)
def test_a_sample_with_a_long_reach_gets_wide_codes(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    values = some_rows(300, 16)
    values[5, 3] = 40_000 * values.std()
    reader, writer, rounded = write_rows(tmp_path, pool, get_codec("compact"), values)
    assert writer.codec.parameters["code"] == "int32"
    read = reader.read(slice(None))
    assert np.abs(read - rounded).max() <= 0.6 * writer.codec.served.step
    plain = np.asarray(zarr.open_array(store=tmp_path / "activations", mode="r")[:])
    np.testing.assert_allclose(plain, read, rtol=1e-7)


def test_a_store_of_equal_rows_has_no_step(pool: ThreadPoolExecutor) -> None:
    message = (
        "^--codec compact takes its step from the spread of the rows, and the first rows of this "
        r"store have none \(found 0\). Pass --codec lossless.$"
    )
    with pytest.raises(InputError, match=message):
        get_codec("compact").calibrated(np.ones((100, 8), np.float32))


def test_the_typical_deviation_is_the_root_mean_square_where_nothing_is_massive() -> None:
    values = some_rows(16_384, 48)
    assert typical_deviation(values) == pytest.approx(
        float(np.sqrt(values.var(0).mean())), rel=2e-3
    )


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 299), max_size=5))
def test_the_distortion_is_that_of_all_rows_however_they_are_cut(cuts: list[int]) -> None:
    values = some_rows(300, 16)
    codec = compact(values)
    total = Distortion.empty(16)
    for part in np.split(values, sorted(cuts)):
        if len(part):
            found = Distortion.of(part, codec.kept(part), codec.step)
            total.merge(Distortion.from_json(found.to_json()))
    pooled, per_dimension = relative_errors(codec, values)
    assert total.relative_error == pytest.approx(pooled, rel=1e-5)
    np.testing.assert_allclose(total.relative_error_per_dimension, per_dimension, rtol=1e-5)
    assert total.clipped == 0


def frame_bytes(codec: Codec, values_RD: Floats) -> int:
    return sum(map(len, codec.encode(values_RD)))


def test_means_of_dimensions_cost_nothing() -> None:
    values: Any = np.random.default_rng(0).standard_normal((8192, 64)).astype(np.float32)
    centred = frame_bytes(compact(values), values)
    values += np.random.default_rng(1).uniform(-3, 3, 64).astype(np.float32)
    shifted = frame_bytes(compact(values), values)
    assert shifted < 1.01 * centred
    assert values.size * 2 / shifted > 3.8


@pytest.mark.filterwarnings(WARNED)
@pytest.mark.parametrize(("name", "dtype"), ALL)
@pytest.mark.parametrize("n_rows", [0, 1])
def test_a_split_of_no_row_or_of_one_is_read_as_such(
    tmp_path: Path, pool: ThreadPoolExecutor, name: str, dtype: str, n_rows: int
) -> None:
    codec = get_codec(name, dtype).calibrated(some_rows(64, 16))
    layout = Layout(n_rows=n_rows, d_in=16, chunk_rows=64, shard_rows=256, block_rows=256)
    writer = SplitWriter(tmp_path, "", layout, codec, pool, with_masked=False)
    values = some_rows(64, 16)[:n_rows]
    for shard in range(layout.n_shards):
        writer.write(shard, codec.values.of_floats(values), np.arange(n_rows))
    zarr_metadata.write_metadata(tmp_path, writer.metadata())
    reader = SplitReader(tmp_path, "", layout, writer.collect().shards, codec)
    read = reader.read(slice(None))
    assert read.shape == (n_rows, 16)
    plain = np.asarray(zarr.open_array(store=tmp_path / "activations", mode="r")[:])
    np.testing.assert_array_equal(plain, read)
    np.testing.assert_allclose(read, values, rtol=0.01, atol=0.6 * codec.served.step)
