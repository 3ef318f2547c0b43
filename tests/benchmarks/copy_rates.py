"""How fast stores are recoded, imported and exported, in rows and in raw bfloat16 bytes a second.

Rows of a random sparse code. Every figure is one run of the whole command, fsync included, with the
page cache warm; the processor time tells how much of it was waiting for other work.

    python tests/benchmarks/copy_rates.py                       # 200,000 rows of d_in 768
    python tests/benchmarks/copy_rates.py --rows 1000000 --folder /data
"""

# N rows, D d_in

import argparse
import datetime
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import zarr

from sae_pipe.stages.exporting import EXPORTERS
from sae_pipe.stages.store_export import ExportConfig, export_rows
from sae_pipe.stages.store_import import ImportConfig, import_rows
from sae_pipe.storage.provenance import hardware
from sae_pipe.storage.recode import recode


def quiet(line: str) -> None: ...


def write_rows(path: Path, n_rows: int, d_in: int) -> None:
    """A .npy file of float32, written in parts."""
    random = np.random.default_rng(0)
    directions_FD = random.standard_normal((2 * d_in, d_in), dtype=np.float32)
    rows_ND = np.lib.format.open_memmap(path, "w+", np.float32, (n_rows, d_in))
    for start in range(0, n_rows, 8192):
        part = rows_ND[start : start + 8192]
        active_NF = random.random((len(part), 2 * d_in), dtype=np.float32) < 0.02
        part[...] = active_NF.astype(np.float32) @ directions_FD + 1
    rows_ND.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    n_rows, d_in = arguments.rows, arguments.d_in
    versions = {name: importlib.metadata.version(name) for name in ("sae-pipe", "numpy", "zarr")}
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {hardware()['processor']}, {hardware()['cores']} cores")
    print(f"versions  {versions}")
    print(f"config    {vars(arguments)}", flush=True)

    def timed(what: str, run: Callable[[], object]) -> None:
        begun, worked = time.perf_counter(), time.process_time()
        run()
        seconds, cpu_s = time.perf_counter() - begun, time.process_time() - worked
        gigabytes = n_rows * d_in * 2 / 1e9
        print(
            f"{what:32s}{n_rows / seconds:>12,.0f} rows/s {gigabytes / seconds:6.3f} GB/s, "
            f"{cpu_s:6.2f} s of processor time",
            flush=True,
        )

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_rows(folder / "rows.npy", n_rows, d_in)

        def imported(
            source: Path, out: str, column: str | None = None, codec: str = "lossless"
        ) -> None:
            config = ImportConfig(
                source=source,
                out=folder / out,
                members={"column": column},
                heldout_rows=0,
                codec=codec,
            )
            import_rows(config, say=quiet)

        timed("import npy", lambda: imported(folder / "rows.npy", "a.zarr"))
        timed(
            "import npy, contexts of 1000",
            lambda: import_rows(
                ImportConfig(
                    source=folder / "rows.npy",
                    out=folder / "c.zarr",
                    members={},
                    heldout_rows=0,
                    context_size=1000,
                ),
                say=quiet,
            ),
        )
        timed(
            "import npy, compact", lambda: imported(folder / "rows.npy", "e.zarr", codec="compact")
        )
        rows_ND = np.load(folder / "rows.npy", mmap_mode="r")
        array = zarr.create_array(
            folder / "rows.zarr", shape=rows_ND.shape, chunks=(4096, d_in), dtype="float32"
        )
        lists = pa.list_(pa.float32(), d_in)
        with pa.ipc.new_stream(folder / "rows.arrow", pa.schema([("x", lists)])) as writer:
            for start in range(0, n_rows, 4096):
                part = np.ascontiguousarray(rows_ND[start : start + 4096])
                array[start : start + 4096] = part
                column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), type=lists)
                writer.write_batch(pa.record_batch([column], names=["x"]))
        timed("import zarr", lambda: imported(folder / "rows.zarr", "z.zarr"))
        timed("import datasets", lambda: imported(folder / "rows.arrow", "d.zarr"))
        for codec in ("compact", "none"):
            timed(
                f"recode lossless to {codec}",
                partial(recode, folder / "a.zarr", folder / f"{codec}.zarr", codec, say=quiet),
            )
        timed(
            "recode none to lossless",
            lambda: recode(folder / "none.zarr", folder / "l.zarr", "lossless", say=quiet),
        )
        for format, exporter in EXPORTERS.items():
            for dtype in exporter.number_formats:
                config = ExportConfig(
                    store=folder / "a.zarr",
                    out=folder / f"{format}-{dtype}",
                    format=format,
                    dtype=dtype,
                )
                timed(
                    f"export {format}, {dtype}",
                    partial(export_rows, config, say=quiet),
                )
        timed(
            "import safetensors, bfloat16",
            lambda: imported(folder / "safetensors-bfloat16", "s.zarr"),
        )


if __name__ == "__main__":
    main()
