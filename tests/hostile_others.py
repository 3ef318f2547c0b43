"""Evaluation sets, runs, SAEs of other tools and rows to import, as a stranger might send them.

Importing this adds them to `hostile.KINDS`.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sae_pipe.stages.sae.weights import save_sae
from sae_pipe.storage.evalset import content_digest as evalset_digest

from .hostile import CANARY, Evil, Json, entry_of, kind, link, load, with_crc
from .hostile_tokens import zstd_saying
from .saes import make_sae

# --- evaluation sets ---


def evalset(name: str, edit: Callable[[Path], object], **options: Any) -> None:
    def make(good: Path, inside: Path) -> list[str]:
        path = Path(shutil.copytree(good, inside / "set.zarr"))
        edit(path)
        return ["eval-set", "info", "--verify", str(path)]

    kind(f"evaluation set: {name}", base="evalset", **options)(make)


def change_set(path: Path, *changes: Callable[[Json], object]) -> None:
    manifest = load(path / "manifest.json")
    for each in changes:
        each(manifest)
    manifest["digest"] = evalset_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def _set_size(**sizes: Any) -> Callable[[Path], None]:
    return lambda path: change_set(path, lambda m: m.update(sizes))


def _set_chunk(path: Path, name: str, data: bytes) -> None:
    (path / name).write_bytes(with_crc(data))
    change_set(path, lambda m: m["files"].update({name: entry_of(path / name)}))


evalset("2^40 items", _set_size(n_items=1 << 40), is_huge=True)
evalset("2^40 bytes of text", _set_size(text_bytes=1 << 40), is_huge=True)
evalset("chunks of 2^40 rows", _set_size(chunk_rows=1 << 40), is_huge=True)
evalset("rows that are true", _set_size(n_rows=True))
evalset("nested 500 deep", lambda p: (p / "manifest.json").write_text("[" * 500 + "]" * 500))
evalset(
    "a file outside",
    lambda p: change_set(
        p, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}})
    ),
)
evalset("rows that are a link", lambda p: link("activations/c/0/0", "/etc/hostname")(p))
evalset(
    "a chunk that says 2^60 bytes",
    lambda p: _set_chunk(p, "items/task/c/0", zstd_saying(1 << 60)),
    is_huge=True,
)
evalset("a task that is a number", lambda p: change_set(p, lambda m: m.update(tasks=[7])))

# --- SAEs ---


def run(name: str, edit: Callable[[Path], object], command: Any = None, **options: Any) -> None:
    def make(good: Path, inside: Path) -> list[str]:
        folder = inside / "run"
        folder.mkdir()
        save_sae(make_sae("topk"), folder)
        edit(folder)
        if callable(command):
            found: list[str] = command(folder)
            return found
        return ["export", str(folder), "--format", "safetensors", "--out", str(inside / "out")]

    kind(f"run: {name}", base="none", **options)(make)


def _sae(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = load(folder / "config.json")
        config["sae"] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def _config(folder: Path, **values: Any) -> None:
    config = load(folder / "config.json") | values
    (folder / "config.json").write_text(json.dumps(config))


def _weights(data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "sae.safetensors"
        file.write_bytes(data(file.read_bytes()))

    return edit


def _header(data: bytes, edit: Callable[[Json], object]) -> bytes:
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    edit(header)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + data[8 + n :]


run("a config of 64 MB", lambda f: os.truncate(f / "config.json", 1 << 26), is_huge=True)
run("a config nested 500 deep", lambda f: (f / "config.json").write_text("[" * 500 + "]" * 500))
run("a config with a key twice", lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'))
run("2^40 latents", _sae(d_sae=1 << 40), is_huge=True)
run("10^30 latents", _sae(d_sae=10**30), is_huge=True)
run("latents that are true", _sae(d_sae=True))
run("more active latents than there are", _sae(k=1 << 20))
_STORES: tuple[Any, ...] = (5, [], None, {"path": {"a": 1}}, {"path": ""})
for _store in _STORES:
    run(
        f"fitted from {json.dumps(_store)}",
        lambda f, store=_store: _config(f, store=store),  # type: ignore[misc]
        lambda f: ["inspect", str(f)],
    )
run("an architecture that is a module", _sae(architecture="os:system"))
run("an option that nothing takes", _sae(command="touch canary/ran"))
run(
    "weights whose header is 2^60 bytes long",
    _weights(lambda d: (1 << 60).to_bytes(8, "little") + d[8:]),
    is_huge=True,
)
run(
    "weights of a shape of 2^60",
    _weights(lambda d: _header(d, lambda h: h["W_enc"].update(shape=[1 << 30, 1 << 30]))),
    is_huge=True,
)
run(
    "weights that stand outside the file",
    _weights(lambda d: _header(d, lambda h: h["W_enc"].update(data_offsets=[0, 1 << 50]))),
    is_huge=True,
)
run("weights that are a pickle", _weights(lambda d: pickle.dumps({"W_enc": 1})))
run("weights that are an endless device", link("sae.safetensors", "/dev/zero"))
run("weights of NaN", lambda f: _nan(f))


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "sae.safetensors")
    tensors["W_enc"][0, 0] = torch.nan
    save_file(tensors, folder / "sae.safetensors")


# --- SAEs of other tools ---


def other(name: str, edit: Callable[[Path, Path], object], **options: Any) -> None:
    def make(good: Path, inside: Path) -> list[str]:
        folder = inside / "theirs"
        folder.mkdir()
        edit(folder, inside.parent / CANARY)
        return ["import", str(folder), "--out", str(inside / "out")]

    kind(f"other tool: {name}", base="none", **options)(make)


_THEIRS = {
    "trainer": {"dict_class": "AutoEncoderTopK", "activation_dim": 12, "dict_size": 48, "k": 5,
                "trainer_class": "TopKTrainer"},
    "buffer": {},
}  # fmt: skip


def _ae(folder: Path, data: bytes, **trainer: Any) -> None:
    config = {**_THEIRS, "trainer": _THEIRS["trainer"] | trainer}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "ae.pt").write_bytes(data)


def _archive(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("ae/data.pkl", content)
        archive.writestr("ae/version", "3\n")
    return out.getvalue()


other(
    "a pickle that runs a command",
    lambda f, canary: _ae(f, _archive(pickle.dumps(Evil(canary), protocol=2))),
)
other("a pickle that is no archive", lambda f, canary: _ae(f, pickle.dumps(Evil(canary))))
other(
    "an archive that unpacks to 4 GB",
    lambda f, canary: _ae(f, _archive(bytes(1 << 26), zipfile.ZIP_DEFLATED)),
    is_huge=True,
)
other("2^60 latents", lambda f, canary: _ae(f, _archive(b""), dict_size=1 << 60), is_huge=True)
other(
    "a config that is a list",
    lambda f, canary: ((f / "config.json").write_text("[]"), (f / "ae.pt").write_bytes(b"")),
)

# --- rows to import ---


def rows(name: str, edit: Callable[[Path, Path], Path], *flags: str, **options: Any) -> None:
    def make(good: Path, inside: Path) -> list[str]:
        path = edit(inside, inside.parent / CANARY)
        return ["store", "import", str(path), "--out", str(inside / "acts.zarr"), *flags]

    kind(f"rows: {name}", base="none", **options)(make)


def _npy(header: str, data: bytes = b"") -> Callable[[Path, Path], Path]:
    def edit(inside: Path, canary: Path) -> Path:
        text = header.ljust(117) + "\n"
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
        (inside / "rows.npy").write_bytes(head + data)
        return inside / "rows.npy"

    return edit


def _pickled_npy(inside: Path, canary: Path) -> Path:
    header = "{'descr': '|O', 'fortran_order': False, 'shape': (4, 2), }"
    return _npy(header, pickle.dumps(Evil(canary)))(inside, canary)


def _zarr2(**changes: Any) -> Callable[[Path, Path], Path]:
    def edit(inside: Path, canary: Path) -> Path:
        folder = inside / "rows.zarr"
        folder.mkdir()
        meta = {
            "zarr_format": 2, "shape": [4, 2], "chunks": [4, 2], "dtype": "<f4", "order": "C",
            "fill_value": 0, "compressor": None, "filters": None,
        } | changes  # fmt: skip
        (folder / ".zarray").write_text(json.dumps(meta))
        (folder / "0.0").write_bytes(pickle.dumps(Evil(canary)))
        return folder

    return edit


def _zarr3(shard: list[int], chunk: list[int]) -> Callable[[Path, Path], Path]:
    def edit(inside: Path, canary: Path) -> Path:
        folder = inside / "rows.zarr"
        folder.mkdir()
        plain = {"name": "bytes", "configuration": {"endian": "little"}}
        inner = {
            "chunk_shape": chunk,
            "codecs": [plain],
            "index_codecs": [plain],
            "index_location": "end",
        }
        meta = {
            "zarr_format": 3, "node_type": "array", "shape": [4, 2], "data_type": "float32", "fill_value": 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        }  # fmt: skip
        (folder / "zarr.json").write_text(json.dumps(meta))
        (folder / "c/0").mkdir(parents=True)
        (folder / "c/0/0").write_bytes(bytes(64))
        return folder

    return edit


def _tensors(**entry: Any) -> Callable[[Path, Path], Path]:
    def edit(inside: Path, canary: Path) -> Path:
        header = json.dumps(
            {"acts": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]} | entry}
        )
        data = len(header).to_bytes(8, "little") + header.encode() + bytes(32)
        (inside / "rows.safetensors").write_bytes(data)
        return inside / "rows.safetensors"

    return edit


def _dataset(inside: Path, canary: Path) -> Path:
    folder = inside / "dataset"
    folder.mkdir()
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "../canary/kept"}]})
    )
    return folder


rows("an array of pickles", _pickled_npy)
rows(
    "an array of 10^15 rows",
    _npy(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10**15, 2), }".replace(
            "10**15", str(10**15)
        )
    ),
    is_huge=True,
)
rows("a header that is code", _npy("__import__('os').system('touch canary/ran')"))
rows("a Zarr array with a pickle filter", _zarr2(filters=[{"id": "pickle"}]))
rows("a Zarr array packed with lzma", _zarr2(compressor={"id": "lzma"}))
rows(
    "a Zarr array in chunks of 2^40", _zarr2(shape=[1 << 40, 2], chunks=[1 << 40, 2]), is_huge=True
)
rows(
    "a Zarr array of four rows in a chunk of 2^40",
    _zarr2(chunks=[1 << 40, 2]),
    is_huge=True,
)
rows("a Zarr array in chunks wider than it is", _zarr2(chunks=[4, 1 << 28]), is_huge=True)
rows("a Zarr array in shards of 2^40 chunks", _zarr3([1 << 41, 2], [2, 2]), is_huge=True)
rows("a Zarr array in shards wider than it is", _zarr3([4, 1 << 28], [4, 2]), is_huge=True)
rows("a Zarr array in chunks of fewer sizes", _zarr2(chunks=[4]))
rows("a tensor of 2^60 rows", _tensors(shape=[1 << 60, 2]), is_huge=True)
rows("a tensor that stands outside its file", _tensors(data_offsets=[1 << 50, (1 << 50) + 32]))
rows("a dataset that names a file outside", _dataset)


# --- results, sweeps ---


def touched(file: Path) -> Path:
    file.touch()
    return file


def result(name: str, edit: Callable[[Path], object], **options: Any) -> None:
    def make(good: Path, inside: Path) -> list[str]:
        folder = inside / "results"
        folder.mkdir()
        edit(folder / "a.json")
        return ["compare", str(folder / "a.json")]

    kind(f"result: {name}", base="none", **options)(make)


result("of a gigabyte", lambda f: os.truncate(touched(f), 1 << 30), is_huge=True)
result("nested 500 deep", lambda f: f.write_text("[" * 500 + "]" * 500))
result("with a key twice", lambda f: f.write_text('{"format": 1, "format": 2}'))


@kind("sweep: a file nested 100,000 deep", base="none")
def _sweep(good: Path, inside: Path) -> list[str]:
    (inside / "sweep.toml").write_text("fit = " + "[" * 100_000)
    return ["sweep", str(inside / "sweep.toml")]


@kind("sweep: a file of a gigabyte", base="none", is_huge=True)
def _large_sweep(good: Path, inside: Path) -> list[str]:
    (inside / "sweep.toml").write_text("")
    os.truncate(inside / "sweep.toml", 1 << 30)
    return ["sweep", str(inside / "sweep.toml")]
