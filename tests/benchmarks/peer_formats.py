"""Ways to keep rows on disk and to read them in shuffled batches: what peers.py compares.

Each is written and read as its tool's documentation says, with the tool's defaults; where a tool
leaves the shuffling of rows to its user, a file at a time is permuted. A reader yields batches of
4,096 rows without end. Tools that are no dependencies are imported when they are asked for.
"""

# N rows, D d_in, B batch rows

import functools
import importlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_pipe.stages.batches import TorchBatches
from sae_pipe.storage import open_store
from sae_pipe.storage.builder import StoreBuilder
from sae_pipe.storage.corpus_writer import complete as complete_corpus
from sae_pipe.storage.corpus_writer import create_groups
from sae_pipe.storage.layout import choose_layout
from sae_pipe.storage.values import Bits, Floats, widen

BATCH, CONTEXT, HOOK = 4096, 1024, "blocks.3.hook_resid_post"
UNIT = 32 * CONTEXT  # rows: the batch in which SAELens reads its cache with its defaults
GROUP = 128  # rows a record, where a record holds many
SHARD_ROWS = 16_384  # of formats whose files the user cuts
WORKERS = 2  # of the tools that read in processes


def floats_of(bits: Bits) -> Floats:
    """float32 values of bfloat16 bits."""
    values = np.empty(bits.shape, np.float32)
    widen(bits, values)
    return values


def shards_of(bits: Bits) -> Iterator[tuple[int, Bits]]:
    """Runs of rows with their number."""
    for number, start in enumerate(range(0, len(bits), SHARD_ROWS)):
        yield number, bits[start : start + SHARD_ROWS]


def cut(rows: Any, order: Any) -> Iterator[Any]:
    """Batches of rows in a given order; what is left over is dropped."""
    for start in range(0, len(order) - BATCH + 1, BATCH):
        yield rows[order[start : start + BATCH]]


def again_and_again(epoch: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Epochs without end."""
    while True:
        yield from epoch()


def write_ours(bits: Bits, folder: Path, codec: str) -> None:
    create_groups(folder / "corpus")
    complete_corpus(folder / "corpus", {})
    builder = StoreBuilder.begin(folder, {}, {"benchmark": "peers"}, codec)
    sizes = {"d_in": bits.shape[1], "block_bytes": 1 << 30}
    chunk_rows = builder.uncalibrated_codec.chunk_rows(bits.shape[1])
    layout, none = (choose_layout(n_rows=n, chunk_rows=chunk_rows, **sizes) for n in (len(bits), 0))
    builder.lay_out(layout, none, {}, floats_of(bits[:SHARD_ROWS]))
    with ThreadPoolExecutor() as pool:
        train, heldout = builder.writers(pool)
        for shard in range(layout.n_shards):
            first, last = layout.rows_of_shard(shard)
            train.write(
                shard, bits[first:last], np.arange(first, last), np.zeros(last - first, np.bool_)
            )
        builder.finish(train, heldout)


def read_ours(folder: Path) -> Iterator[Any]:
    return open_store(folder).batches(BATCH)


def read_ours_as_tensors(folder: Path) -> Iterator[Any]:
    return TorchBatches(open_store(folder), batch_size=BATCH)


def write_memmap(bits: Bits, folder: Path) -> None:
    np.save(folder / "rows.npy", bits)


def read_memmap(folder: Path) -> Iterator[Any]:
    rows, random = np.load(folder / "rows.npy", mmap_mode="r"), np.random.default_rng(0)
    return again_and_again(lambda: cut(rows, random.permutation(len(rows))))


def write_safetensors(bits: Bits, folder: Path) -> None:
    save_file = importlib.import_module("safetensors.torch").save_file
    for number, part in shards_of(bits):
        rows = torch.from_numpy(part).view(torch.bfloat16)
        save_file({"rows": rows}, folder / f"{number:05d}.safetensors")


def read_safetensors(folder: Path) -> Iterator[Any]:
    load_file = importlib.import_module("safetensors.torch").load_file
    files, random = sorted(folder.iterdir()), np.random.default_rng(0)

    def epoch() -> Iterator[Any]:
        for file in random.permutation(np.array(files, dtype=object)):
            rows = load_file(file)["rows"]
            yield from cut(rows, torch.randperm(len(rows)))

    return again_and_again(epoch)


def write_zarr(bits: Bits, folder: Path) -> None:
    zarr = importlib.import_module("zarr")
    array = zarr.create_array(folder / "rows.zarr", shape=bits.shape, dtype="float32")
    step = -(-SHARD_ROWS // array.chunks[0]) * array.chunks[0]  # whole chunks, each written once
    for start in range(0, len(bits), step):
        array[start : start + step] = floats_of(bits[start : start + step])


def read_zarr(folder: Path) -> Iterator[Any]:
    array = importlib.import_module("zarr").open_array(folder / "rows.zarr", mode="r")
    step = -(-SHARD_ROWS // array.chunks[0]) * array.chunks[0]
    random = np.random.default_rng(0)

    def epoch() -> Iterator[Any]:
        left = np.empty((0, array.shape[1]), np.float32)
        for start in random.permutation(np.arange(0, array.shape[0], step)):
            rows = np.concatenate([left, array[start : start + step]])
            order = random.permutation(len(rows))
            yield from cut(rows, order)
            left = rows[order[len(rows) - len(rows) % BATCH :]]

    return again_and_again(epoch)


def write_arrow(bits: Bits, folder: Path) -> None:
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    value = datasets.Value("float32")
    features = datasets.Features({"rows": datasets.Sequence(value, length=bits.shape[1])})
    writer = importlib.import_module("pyarrow")

    def tables() -> Iterator[Any]:
        for _, part in shards_of(bits):
            flat = writer.array(floats_of(part).reshape(-1))
            yield writer.table({"rows": writer.FixedSizeListArray.from_arrays(flat, bits.shape[1])})

    dataset = datasets.Dataset(writer.concat_tables(tables())).cast(features)
    dataset.save_to_disk(folder / "rows", num_shards=-(-len(bits) // SHARD_ROWS))


def read_arrow(folder: Path) -> Iterator[Any]:
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    rows = datasets.load_from_disk(folder / "rows").with_format("numpy")
    seeds = itertools.count()

    def epoch() -> Iterator[Any]:
        # keep_in_memory: the order is not to be found in, or written to, the folder of the rows.
        shuffled = rows.shuffle(seed=next(seeds), keep_in_memory=True)
        return (batch["rows"] for batch in shuffled.iter(BATCH, drop_last_batch=True))

    return again_and_again(epoch)


def write_saelens(bits: Bits, folder: Path) -> None:
    """Contexts of rows as float32, one table a buffer, columns as the cache of SAELens has them."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    columns: dict[str, Any] = {HOOK: datasets.Array2D((CONTEXT, bits.shape[1]), "float32")}
    columns["token_ids"] = datasets.Sequence(datasets.Value("int32"), length=CONTEXT)
    features, parts = datasets.Features(columns), []
    for start in range(0, len(bits), 2 * UNIT):
        values = floats_of(bits[start : start + 2 * UNIT])
        rows = torch.from_numpy(values.reshape(-1, CONTEXT, bits.shape[1]))
        ids = torch.zeros(len(rows), CONTEXT, dtype=torch.int32)
        part = datasets.Dataset.from_dict({HOOK: rows, "token_ids": ids}, features=features)
        part.save_to_disk(folder / f".parts-{start}", num_shards=1)
        parts.append(datasets.load_from_disk(folder / f".parts-{start}"))
    # SAELens moves the files of its parts together; the bytes are the same.
    files = [Path(entry["filename"]) for part in parts for entry in part.cache_files]
    whole = folder / "rows"
    whole.mkdir()
    names = [f"data-{n:05d}-of-{len(files):05d}.arrow" for n in range(len(files))]
    shutil.copy(files[0].parent / "dataset_info.json", whole)
    state = json.loads((files[0].parent / "state.json").read_text())
    (whole / "state.json").write_text(
        json.dumps(state | {"_data_files": [{"filename": name} for name in names]})
    )
    for file, name in zip(files, names, strict=True):
        file.rename(whole / name)
        shutil.rmtree(file.parent)


def read_saelens(folder: Path) -> Iterator[Any]:
    store = importlib.import_module("sae_lens.training.activations_store").ActivationsStore
    info = json.loads((folder / "rows" / "dataset_info.json").read_text())
    defaults = {"n_batches_in_buffer": 20, "store_batch_size_prompts": UNIT // CONTEXT}
    batches: Iterator[Any] = store(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=info["features"][HOOK]["shape"][1],
        total_training_tokens=1,
        train_batch_size_tokens=BATCH,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(folder / "rows"),
        **defaults,
    ).get_data_loader()
    return batches


def read_saelens_format(folder: Path) -> Iterator[Any]:
    """The rule of SAELens: a permuted buffer of 20 contexts, half of which stays to be mixed in."""
    rows = importlib.import_module("datasets").load_from_disk(folder / "rows").with_format("torch")
    size, step = 20 * CONTEXT, UNIT // CONTEXT
    pool = torch.empty(0)
    for start in itertools.cycle(range(0, len(rows) - step + 1, step)):
        new = rows[start : start + step][HOOK].flatten(0, 1)
        pool = torch.cat([pool, new]) if len(pool) else new
        if len(pool) >= size:
            pool = pool[torch.randperm(len(pool))]
            served = max(1, (len(pool) - size // 2) // BATCH) * BATCH
            yield from pool[:served].split(BATCH)
            pool = pool[served:]


def write_mds(bits: Bits, folder: Path, group: int) -> None:
    streaming = importlib.import_module("streaming")
    records = bits if group == 1 else bits.reshape(-1, group, bits.shape[1])
    encoding = "ndarray:uint16:" + ",".join(map(str, records.shape[1:]))
    with streaming.MDSWriter(out=str(folder), columns={"rows": encoding}) as writer:
        for record in records:
            writer.write({"rows": record})


def read_mds(folder: Path, group: int) -> Iterator[Any]:
    streaming = importlib.import_module("streaming")
    importlib.import_module("streaming.base.util").clean_stale_shared_memory()
    size = BATCH // group
    rows = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=size)
    loader = streaming.StreamingDataLoader(rows, batch_size=size, num_workers=WORKERS)
    return again_and_again(lambda: (batch["rows"] for batch in loader))


@functools.cache
def _mapped(rows_path: Path) -> Any:
    return np.load(rows_path, mmap_mode="r")


def litdata_record(number: int, rows_path: Path, group: int) -> Bits:
    """One record, as bits: LitData 0.2.76 cannot serialise bfloat16 tensors."""
    rows = _mapped(rows_path)
    return np.array(rows[number] if group == 1 else rows[number * group : (number + 1) * group])


def write_litdata(bits: Bits, folder: Path, group: int) -> None:
    litdata = importlib.import_module("litdata")
    litdata.optimize(
        fn=functools.partial(litdata_record, rows_path=folder.parent / "rows.npy", group=group),
        inputs=list(range(len(bits) // group)),
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=WORKERS,
    )


def read_litdata(folder: Path, group: int) -> Iterator[Any]:
    litdata = importlib.import_module("litdata")
    rows = litdata.StreamingDataset(str(folder), shuffle=True)
    loader = litdata.StreamingDataLoader(rows, batch_size=BATCH // group, num_workers=WORKERS)
    return again_and_again(lambda: loader)


@dataclass(frozen=True)
class Format:
    """One way to keep rows. module: imported first, of what has to be installed (package); exact:
    an epoch holds every row once and unchanged, which is checked.
    """

    label: str
    package: str
    module: str
    write: Callable[[Bits, Path], None]
    read: Callable[[Path], Iterator[Any]]
    exact: bool = True


_lossless = functools.partial(write_ours, codec="lossless")
_compact = functools.partial(write_ours, codec="compact")
_mds = ("mosaicml-streaming", "streaming")
FORMATS = {
    "sae-pipe": Format("sae-pipe", "sae-pipe", "sae_pipe", _lossless, read_ours),
    "sae-pipe-f32": Format(
        "sae-pipe, as float32 tensors", "sae-pipe", "sae_pipe", _lossless, read_ours_as_tensors
    ),
    "compact": Format(
        "sae-pipe, compact (lossy)", "sae-pipe", "sae_pipe", _compact, read_ours, False
    ),
    "memmap": Format("raw .npy, memmap", "numpy", "numpy", write_memmap, read_memmap),
    "safetensors": Format(
        "safetensors shards",
        "safetensors",
        "safetensors.torch",
        write_safetensors,
        read_safetensors,
    ),
    "zarr": Format("zarr, its defaults", "zarr", "zarr", write_zarr, read_zarr),
    "arrow": Format("datasets, Arrow", "datasets", "datasets", write_arrow, read_arrow),
    "saelens": Format(
        "SAELens cache",
        "sae-lens",
        "sae_lens.training.activations_store",
        write_saelens,
        read_saelens,
        False,
    ),
    "saelens-format": Format(
        "the format of SAELens, by datasets",
        "datasets",
        "datasets",
        write_saelens,
        read_saelens_format,
        False,
    ),
}
for _group in (1, GROUP):
    _size = "a row a record" if _group == 1 else f"{_group} rows a record"
    FORMATS[f"mds-{_group}"] = Format(
        f"MosaicML MDS, {_size}",
        *_mds,
        functools.partial(write_mds, group=_group),
        functools.partial(read_mds, group=_group),
    )
    FORMATS[f"litdata-{_group}"] = Format(
        f"LitData, {_size}",
        "litdata",
        "litdata",
        functools.partial(write_litdata, group=_group),
        functools.partial(read_litdata, group=_group),
    )
