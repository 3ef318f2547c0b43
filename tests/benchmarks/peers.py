"""An activation store beside raw files and other tools' caches, on the same real rows.

For each format of peer_formats.py: bytes on disk (1 is raw bfloat16), write rate (files flushed to
the disk), rate of shuffled batches of 4,096 rows as the tool's own reader hands them over (from
opening on, page cache warm), memory of that reader, and how many of nine bit flips in the largest
data file it notices. Rates count the rows as raw bfloat16, whatever a tool stores or serves. Every
figure comes from a process of its own; formats take turns, and the median over the rounds is given
with its range. Bytes per processor second, of all threads and workers, suffer less from other work
on the machine than those by the clock.

Tools that are not installed are named and left out. Those that are not dependencies of sae-pipe go
into an environment of their own: sae-lens, mosaicml-streaming, litdata.

    python tests/benchmarks/peers.py                            # rows of the demo model, d_in 128
    python tests/benchmarks/peers.py --d-in 768 --rows 196608   # its rows side by side
    python tests/benchmarks/peers.py --store acts.zarr --only sae-pipe memmap zarr
"""

# N rows, D d_in

import argparse
import datetime
import importlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_formats import BATCH, FORMATS, UNIT, Format, floats_of, shards_of

from sae_pipe.pipeline import cli_demo
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import open_store
from sae_pipe.storage.provenance import hardware
from sae_pipe.storage.values import Bits, Floats, round_to_bfloat16

EPOCHS, FLIPS = 3, 9
FLIP_TIMEOUT_S = 90


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def timed_write(of: Format, bits: Bits, folder: Path, seconds: float) -> dict[str, Any]:
    folder.mkdir()
    begun = time.perf_counter()
    of.write(bits, folder)
    for file in files_of(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    took = time.perf_counter() - begun
    # Our tokens of a row and the like are counted: they are what a format needs.
    size = sum(file.stat().st_size for file in files_of(folder))
    return {"write": bits.nbytes / took / 1e9, "bytes": size / bits.nbytes}


def timed_read(of: Format, bits: Bits, folder: Path, seconds: float) -> dict[str, Any]:
    for file in files_of(folder):
        file.read_bytes()
    served, begun, before = 0, time.perf_counter(), processor_s(os.getpid())
    for batch in itertools.islice(of.read(folder), EPOCHS * len(bits) // BATCH):
        served += math.prod(batch.shape) // bits.shape[1]
        if (took := time.perf_counter() - begun) > seconds:
            break
    busy = processor_s(os.getpid()) - before
    gigabytes = served * bits.shape[1] * 2 / 1e9
    return {"rows": served / took, "read": gigabytes / took, "core": gigabytes / max(busy, 0.01)}


def checked_read(of: Format, bits: Bits, folder: Path, seconds: float) -> dict[str, Any]:
    """Memory of an epoch, beyond what stood before, and whether its values are right."""
    total, before = 0.0, memory_of(os.getpid())
    peak = before
    for batch in itertools.islice(of.read(folder), len(bits) // BATCH):
        peak = max(peak, memory_of(os.getpid()))
        if of.exact:
            total += float(values_of(batch).sum(dtype=np.float64))
    if of.exact:
        expected = sum(float(floats_of(part).sum(dtype=np.float64)) for _, part in shards_of(bits))
        assert math.isclose(total, expected, rel_tol=1e-9), f"{of.label}: {total} for {expected}"
    return {"memory": (peak - before) / 1e6}


def values_of(batch: Any) -> Floats:
    """float32 of a batch in any of the types that the readers serve."""
    if isinstance(batch, torch.Tensor):
        batch = batch.view(torch.bfloat16) if batch.dtype == torch.uint16 else batch
        batch = batch.float().numpy()
    return floats_of(batch) if batch.dtype == np.uint16 else batch


def memory_of(process: int) -> int:
    """Bytes of a process and its children that are not file pages; 0 where Linux does not say."""
    found = 0
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon", "Pss_Shmem")):
                found += int(line.split()[1]) * 1024
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return found
    return found + sum(memory_of(int(child)) for child in children)


def processor_s(process: int) -> float:
    """Processor seconds of a process, its children and those that it has waited for."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(processor_s(int(child)) for child in children)


def flips(of: Format, bits: Bits, folder: Path, seconds: float) -> dict[str, Any]:
    """Flip one bit, read everything in a process of its own, put the bit back: on a small copy."""
    small = folder.parent / "small"
    copy = small / folder.name
    copy.mkdir(parents=True)
    np.save(small / "rows.npy", bits[:UNIT])
    said = _in_a_fork(of.write, np.array(bits[:UNIT]), copy)
    said = said or _in_a_fork(_read_all, of, copy)
    assert said is None, f"{of.label}: {said} without any flip"
    file = max(files_of(copy), key=lambda file: file.stat().st_size)
    names = []
    for flip in range(FLIPS):
        place = int((flip + 0.5) / FLIPS * file.stat().st_size)
        _flip(file, place)
        names.append(_in_a_fork(_read_all, of, copy))
        _flip(file, place)
    shutil.rmtree(small)
    noticed = [name for name in names if name is not None]
    return {"flips": len(noticed), "said": sorted(set(noticed))}


def _in_a_fork(work: Callable[..., None], *arguments: Any) -> str | None:
    """The name of what it raises, "died" or "hangs"; forked, because imports take seconds."""
    fork = multiprocessing.get_context("fork")
    said = fork.SimpleQueue()

    def child() -> None:
        try:
            work(*arguments)
            said.put(None)
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is what is asked
            said.put(type(error).__name__)
        os._exit(0)

    process = fork.Process(target=child)
    process.start()
    process.join(FLIP_TIMEOUT_S)
    if process.is_alive():
        process.kill()
        return "hangs"
    return "died" if said.empty() else said.get()


def _flip(file: Path, place: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 8]))


def _read_all(of: Format, folder: Path) -> None:
    # Readers that mix serve rows later than they read them: two epochs are enough.
    for _ in itertools.islice(of.read(folder), (1 if of.exact else 2) * UNIT // BATCH):
        pass


ACTIONS = {"write": timed_write, "read": timed_read, "memory": checked_read, "flips": flips}


def act(action: str, name: str, folder: Path, seconds: float) -> None:
    """What a process of its own does: its last line of output is JSON."""
    warnings.simplefilter("ignore")
    of = FORMATS[name]
    try:
        importlib.import_module(of.module)
        version = importlib.metadata.version(of.package)
    except (ImportError, OSError, RuntimeError) as error:
        print(json.dumps({"missing": f"{type(error).__name__}: {error}".partition("\n")[0]}))
        return
    bits = np.load(folder / "rows.npy", mmap_mode="r" if action != "write" else None)
    done = {} if action == "probe" else ACTIONS[action](of, bits, folder / name, seconds)
    print(json.dumps({"version": version, **done}), flush=True)
    os._exit(0)  # some readers' threads and workers would keep the process for long


def real_rows(folder: Path, store: Path | None, n_rows: int, d_in: int | None) -> Bits:
    """Rows of a store, those of the demo model by default; wider ones are rows side by side."""
    if store is None:
        config = HarvestConfig(
            model=str(cli_demo.MODEL),
            layers=(cli_demo.LAYER,),
            out=folder / "demo.zarr",
            text=TextConfig(dataset=str(cli_demo.TEXT)),
            tokens=-(-(d_in or 128) // 128) * n_rows,
            heldout_tokens=1000,
        )
        store = harvest(config, say=lambda _: None)[0]
    source = open_store(store)
    each = -(-(d_in or source.d_in) // source.d_in)
    n_rows = min(n_rows, source.n_rows // each) // UNIT * UNIT
    assert n_rows, f"{store} has too few rows: {each * UNIT:,} are needed."
    rows = np.empty((n_rows, d_in or source.d_in), np.uint16)
    for start in range(0, n_rows, UNIT):
        values = source.read(slice(start * each, (start + UNIT) * each))
        rows[start : start + UNIT] = round_to_bfloat16(values.reshape(UNIT, -1)[:, : rows.shape[1]])
    return rows


def run(action: str, name: str, folder: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--act", action, name, str(folder)]
    command += ["--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        return {"missing": f"{action} failed: {(done.stderr.strip() or '?').splitlines()[-1]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(names: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of each format, rounds as lists."""
    found: dict[str, Any] = {
        name: {"write": [], "rows": [], "read": [], "core": []} for name in names
    }
    for number in range(arguments.repeats):
        for name in list(found):
            actions = ["write", "read"] + (["memory", "flips"] if number == 0 else [])
            for action in actions:
                begun = time.perf_counter()
                answer = run(action, name, folder, arguments.seconds)
                took = time.perf_counter() - begun
                print(
                    f"round {number + 1}, {name}, {action}: {took:.0f} s {answer}", file=sys.stderr
                )
                if "missing" in answer:
                    print(f"{FORMATS[name].label}: {answer['missing']}", flush=True)
                    del found[name]
                    break
                for key, value in answer.items():
                    if isinstance(found[name].get(key), list) and key != "said":
                        found[name][key].append(value)
                    else:
                        found[name][key] = value
            shutil.rmtree(folder / name, ignore_errors=True)
    return found


def table(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "| format | version | bytes | write GB/s (range) | rows/s | read GB/s (range) | "
        "read GB a core-second | memory MB | flips noticed |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, of in found.items():
        middle = {key: statistics.median(of[key]) for key in ("write", "rows", "read", "core")}
        span = {key: f"{min(of[key]):.3f} to {max(of[key]):.3f}" for key in ("write", "read")}
        said = f" ({', '.join(of['said'])})" if of["said"] else ""
        yield (
            f"| {FORMATS[name].label} | {of['version']} | {of['bytes']:.3f} | "
            f"{middle['write']:.3f} ({span['write']}) | {middle['rows']:,.0f} | "
            f"{middle['read']:.3f} ({span['read']}) | {middle['core']:.3f} | "
            f"{of['memory']:,.0f} | {of['flips']} of {FLIPS}{said} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", type=Path, help="take rows from this store")
    parser.add_argument("--rows", type=int, default=6 * UNIT)
    parser.add_argument("--d-in", type=int, help="default: that of the store")
    parser.add_argument("--only", nargs="+", choices=sorted(FORMATS), default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="at most this long a read")
    parser.add_argument("--act", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.act:
        action, name, folder = arguments.act
        act(action, name, Path(folder), arguments.seconds)
        return
    with tempfile.TemporaryDirectory() as scratch:
        bits = real_rows(Path(scratch), arguments.store, arguments.rows, arguments.d_in)
        np.save(Path(scratch) / "rows.npy", bits)
        machine = hardware()
        print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
        print(f"hardware  {machine['processor']}, {machine['cores']} cores, page cache warm")
        print(f"command   {' '.join(sys.argv)}")
        print(f"load      {os.getloadavg()[0]:.1f} before the first round")
        print(f"rows      {len(bits):,} of d_in {bits.shape[1]}, {bits.nbytes / 1e6:,.0f} MB")
        names = arguments.only or [name for name in FORMATS if name != "saelens-format"]
        for name in list(names):
            missing = run("probe", name, Path(scratch), 0).get("missing")
            if missing:
                print(f"{FORMATS[name].label}: not installed ({missing})")
                names.remove(name)
                if name == "saelens":
                    names.append("saelens-format")
        print("\n".join(table(measure(names, Path(scratch), arguments))))


if __name__ == "__main__":
    main()
