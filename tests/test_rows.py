"""Shards, readers and batch order: what is written is what is read, by us and by plain Zarr."""

import gc
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sae_pipe.storage import InputError, StoreError, zarr_metadata
from sae_pipe.storage.codecs import Codec, get_codec
from sae_pipe.storage.layout import Layout
from sae_pipe.storage.loader import BatchLoader
from sae_pipe.storage.order import Order
from sae_pipe.storage.rows import SplitReader
from sae_pipe.storage.statistics import Moments
from sae_pipe.storage.values import Bits, round_to_bfloat16
from sae_pipe.storage.writer import SplitWriter

LOSSLESS = get_codec("lossless")
LAYOUT = Layout(n_rows=1000, d_in=12, chunk_rows=64, shard_rows=256, block_rows=512)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def some_bits(layout: Layout) -> Bits:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((layout.n_rows, layout.d_in)) * 3 + 7
    return round_to_bfloat16(values.astype(np.float32))


def as_floats(bits: Bits) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_split(
    root: Path, pool: ThreadPoolExecutor, layout: Layout = LAYOUT, codec: Codec = LOSSLESS
) -> SplitReader:
    bits, source = some_bits(layout), np.arange(layout.n_rows, dtype=np.int64) * 7
    writer = SplitWriter(root, "", layout, codec, pool, with_masked=True)
    for shard in reversed(range(layout.n_shards)):
        rows = slice(*layout.rows_of_shard(shard))
        writer.write(shard, bits[rows], source[rows], source[rows] % 2 == 0)
    zarr_metadata.write_metadata(root, writer.metadata())
    return SplitReader(root, "", layout, writer.collect().shards, codec)


def test_shards_do_not_depend_on_order_or_thread_count(tmp_path: Path) -> None:
    for threads in (1, 3):
        with ThreadPoolExecutor(threads) as pool:
            write_split(tmp_path / str(threads), pool)
    files = sorted(
        p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file()
    )
    assert len(files) > 12
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 999), max_size=40))
def test_rows_come_in_the_order_asked_for(
    rows: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "rows-in-order"
    if not root.exists():
        with ThreadPoolExecutor(1) as pool:
            write_split(root, pool)
    writer_records = [
        json.loads(file.read_bytes()) for file in sorted((root / ".commits/train").glob("*.json"))
    ]
    reader = SplitReader(root, "", LAYOUT, writer_records, LOSSLESS)
    np.testing.assert_array_equal(reader.read(rows), as_floats(some_bits(LAYOUT))[rows])
    assert reader.read_source(rows).tolist() == [row * 7 for row in rows]
    reader.close()


def test_a_boolean_mask_takes_the_rows_it_marks(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    reader = write_split(tmp_path, pool)
    marked = reader.read_masked(slice(None))
    np.testing.assert_array_equal(reader.read(marked), as_floats(some_bits(LAYOUT))[marked])
    np.testing.assert_array_equal(reader.read_source(marked), np.flatnonzero(marked) * 7)


@pytest.mark.parametrize("rows", [[0.9, 1.7], 5, [[1, 2]], [True, False]])
def test_rows_that_are_no_whole_numbers_are_refused(
    tmp_path: Path, pool: ThreadPoolExecutor, rows: Any
) -> None:
    reader = write_split(tmp_path, pool)
    message = "^Rows are a slice, a list of whole numbers, or 1000 booleans; found "
    with pytest.raises(InputError, match=message):
        reader.read(rows)


def test_readers_that_are_gone_hold_no_files(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    write_split(tmp_path, pool)
    records = [json.loads(f.read_bytes()) for f in sorted((tmp_path / ".commits/train").glob("*"))]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        SplitReader(tmp_path, "", LAYOUT, records, LOSSLESS).read(slice(None))
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + LAYOUT.n_shards


def test_a_loader_is_an_iterator_that_goes_on_where_it_was(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    reader = write_split(tmp_path, pool)
    expected = served_rows(reader, 100, 0, 4)
    with BatchLoader(reader, batch_size=100, seed=5, window_rows=128, threads=2) as loader:
        rows = [as_floats(next(loader)) for _ in range(2)]
        for bits in loader:
            rows.append(as_floats(bits))
            if len(rows) == 4:
                break
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_tensorstore_reads_the_numbers_of_our_reader(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    reader = write_split(tmp_path, pool)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/activations/"}}
    array = tensorstore.open(spec, read=True).result()
    np.testing.assert_array_equal(array.read().result(), reader.read(slice(None)))


def test_rows_outside_the_store_are_refused(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    reader = write_split(tmp_path, pool)
    message = r"^Rows 3 to 1000 were asked for, and the store has rows 0 to 999\.$"
    with pytest.raises(InputError, match=message):
        reader.read([3, 1000])


def test_a_flipped_bit_anywhere_in_a_shard_is_detected(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    write_split(tmp_path, pool)
    file = tmp_path / "activations/c/1/0"
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    for place in [*rng.integers(0, len(whole), 40), len(whole) - 1, len(whole) - 9]:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        records = [
            json.loads(f.read_bytes()) for f in sorted((tmp_path / ".commits/train").glob("*"))
        ]
        reader = SplitReader(tmp_path, "", LAYOUT, records, LOSSLESS)
        with pytest.raises(StoreError, match=r"^Shard 1 of .* is damaged: activations/c/1/0: "):
            reader.read(slice(256, 512))
        reader.close()


def test_a_missing_shard_is_an_error_and_never_zeros(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    reader = write_split(tmp_path, pool)
    (tmp_path / "activations/c/2/0").unlink()
    message = (
        rf"^Shard 2 of {tmp_path} is damaged: activations/c/2/0: No such file or directory\. "
        rf"Run `sae-pipe store repair {tmp_path}`: it makes damaged files again and touches nothing "
        r"else\.$"
    )
    with pytest.raises(StoreError, match=message):
        reader.read(slice(None))
    with pytest.raises(StoreError, match="activations/c/2/0: it is missing"):
        reader.check_files()
    plain = zarr.open_array(store=tmp_path / "activations", mode="r")
    assert np.isnan(plain[512:768]).all()  # a plain reader gets NaN, not a number


def test_a_truncated_shard_is_named_with_both_sizes(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    reader = write_split(tmp_path, pool)
    file = tmp_path / "activations/c/0/0"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        StoreError, match=rf"activations/c/0/0: it has 100 bytes instead of {size:,}"
    ):
        reader.check_files()


def epoch_of(order: Order, epoch: int) -> list[int]:
    """The row numbers that one rank serves in an epoch, in order."""
    layout = order.layout
    served: list[int] = []
    for window in order.windows(epoch * order.n_rows):
        if window.epoch > epoch:
            break
        assert window.first_row == len(served)
        assert 0 < window.n_rows <= order.largest_window
        step = layout.chunk_rows
        laid = [np.arange(c * step, min(c * step + step, layout.n_rows)) for c in window.chunks]
        rows = np.empty(window.n_rows, np.int64)
        rows[window.places()] = np.concatenate(laid)
        served += rows.tolist()
    assert len(served) == order.n_rows
    return served


@settings(max_examples=80, deadline=None)
@given(
    n_rows=st.integers(64, 3000),
    chunks=st.integers(1, 4),
    open_shards=st.integers(1, 5),
    window_rows=st.integers(1, 500),
    seed=st.integers(0, 9),
    world_size=st.integers(1, 4),
    in_stored_order=st.booleans(),
)
def test_in_each_epoch_the_ranks_together_serve_every_row_exactly_once(
    n_rows: int,
    chunks: int,
    open_shards: int,
    window_rows: int,
    seed: int,
    world_size: int,
    in_stored_order: bool,
) -> None:
    layout = Layout(
        n_rows=n_rows, d_in=1, chunk_rows=16, shard_rows=16 * chunks, block_rows=16 * chunks
    )
    orders = [
        Order(
            layout=layout,
            seed=seed,
            open_shards=open_shards,
            window_rows=window_rows,
            world_size=world_size,
            rank=rank,
            in_stored_order=in_stored_order,
        )
        for rank in range(world_size)
    ]
    assert max(o.n_rows for o in orders) - min(o.n_rows for o in orders) <= 16
    for epoch in range(3):
        served = [row for order in orders for row in epoch_of(order, epoch)]
        assert sorted(served) == list(range(n_rows))


def test_the_first_groups_of_the_stored_order_need_only_the_first_shards() -> None:
    layout = Layout(n_rows=4000, d_in=1, chunk_rows=16, shard_rows=64, block_rows=64)
    order = Order(layout=layout, seed=3, open_shards=8, in_stored_order=True)
    assert max(epoch_of(order, 0)[: 8 * 64]) < 8 * 64
    assert order.shards_of_group(0, 1).tolist() == list(range(8, 16))


def test_a_rank_that_is_none_or_would_get_no_row_is_refused() -> None:
    layout = Layout(n_rows=40, d_in=1, chunk_rows=16, shard_rows=64, block_rows=64)
    message = "^Rank 2 is not one of 2. Pass a rank from 0 to the world size less 1.$"
    with pytest.raises(InputError, match=message):
        Order(layout=layout, seed=0, world_size=2, rank=2)
    message = "^3 chunks cannot be dealt to 4 ranks. Use fewer ranks, or a larger store.$"
    with pytest.raises(InputError, match=message):
        Order(layout=layout, seed=0, world_size=4, rank=2)


def test_batches_of_the_ranks_hold_every_row_once_and_resume(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    reader = write_split(tmp_path, pool)
    everything = np.sort(as_floats(some_bits(LAYOUT)), axis=0)
    orders = [Order(layout=LAYOUT, seed=5, window_rows=128, world_size=3, rank=r) for r in range(3)]
    served = []
    for rank, order in enumerate(orders):
        options: dict[str, Any] = {"seed": 5, "window_rows": 128, "world_size": 3, "rank": rank}
        with BatchLoader(reader, batch_size=50, **options) as loader:
            rows = np.concatenate([loader.to_floats(next(loader)) for _ in range(14)])
        served.append(rows[: order.n_rows])
        with BatchLoader(reader, batch_size=50, start=9, **options) as loader:
            np.testing.assert_array_equal(loader.to_floats(next(loader)), rows[450:500])
    np.testing.assert_array_equal(np.sort(np.concatenate(served), axis=0), everything)


def served_rows(reader: SplitReader, batch: int, start: int, count: int) -> NDArray[np.float32]:
    loader = BatchLoader(reader, batch_size=batch, seed=5, start=start, window_rows=128, threads=2)
    batches = iter(loader)
    rows = np.concatenate([as_floats(next(batches)) for _ in range(count)])
    loader.close()
    return rows


@pytest.mark.parametrize("batch", [1, 37, 100, 128, 700, 2500])
def test_batches_hold_each_row_once_an_epoch_and_resume_at_any_batch(
    tmp_path: Path, pool: ThreadPoolExecutor, batch: int
) -> None:
    reader = write_split(tmp_path, pool)
    total = 3 * LAYOUT.n_rows
    count = -(-total // batch)
    rows = served_rows(reader, batch, 0, count)
    everything = np.sort(as_floats(some_bits(LAYOUT)), axis=0)
    epochs = [rows[start : start + 1000] for start in range(0, total, 1000)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch, axis=0), everything)
    assert not np.array_equal(epochs[0], epochs[1])
    for start in {0, 1, count // 2, count - 1}:
        np.testing.assert_array_equal(
            served_rows(reader, batch, start, 1), rows[start * batch : (start + 1) * batch]
        )


def test_a_damaged_shard_stops_the_batches_with_its_name(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    reader = write_split(tmp_path, pool)
    file = tmp_path / "activations/c/3/0"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"^Shard 3 of .*: a chunk fails its checksum\. "):
        served_rows(reader, 100, 0, 10)


def test_the_variance_is_right_beside_a_mean_a_thousand_times_larger() -> None:
    values = (np.random.default_rng(4).standard_normal((8192, 4)) + 3000).astype(np.float32)
    exact = values.astype(np.float64).var(0)
    np.testing.assert_allclose(Moments.of(values).variance, exact, rtol=2e-6)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(1, 399), max_size=6), shift=st.floats(-100, 100))
def test_moments_are_those_of_all_rows_however_they_are_cut(cuts: list[int], shift: float) -> None:
    values = (np.random.default_rng(2).standard_normal((400, 3)) + shift).astype(np.float32)
    moments = Moments.empty(3)
    for part in np.split(values, sorted(cuts)):
        if len(part):
            moments.merge(Moments.from_json(Moments.of(part).to_json()))
    exact = values.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, exact.var(0), rtol=2e-6)
    np.testing.assert_allclose(moments.mean_squared_norm, (exact**2).sum(1).mean(), rtol=1e-6)
