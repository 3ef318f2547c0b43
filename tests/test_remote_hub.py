"""Stores on the Hugging Face Hub, through its own client, against a Hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sae_pipe.storage import ActivationStore, StoreError, open_store

from .hub_server import TOKEN
from .services import HERE, free_port, need, start, stop
from .test_remote_copies import PROGRAM, files_of

ADDRESS = "hf://datasets/someone/acts/small.zarr"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a process that uses a Hub on this machine.

    The client reads it when it is imported: the tests ask processes of their own.
    """
    need("aiohttp")
    port = free_port()
    server = start([sys.executable, str(HERE / "hub_server.py"), str(port)], port, tmp_path / "log")
    try:
        yield (
            os.environ
            | {
                "HF_ENDPOINT": f"http://127.0.0.1:{port}",
                "HF_TOKEN": TOKEN,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",  # large files by the LFS protocol: Xet's server is not to be had
                "NO_PROXY": "127.0.0.1",
                "SAE_PIPE_CACHE": str(tmp_path / "cache"),
            }
        )
    finally:
        stop(server)


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=200
    )


_READ = """
import sys
import numpy as np
from sae_pipe.storage import open_store
store = open_store(sys.argv[1])
np.save(sys.argv[2], store.read(slice(None)))
"""


def test_a_store_goes_to_the_hub_and_comes_back(
    hub: dict[str, str], small_store: ActivationStore, tmp_path: Path
) -> None:
    pushed = run([PROGRAM, "store", "push", str(small_store.path), ADDRESS], hub)
    assert pushed.returncode == 0, pushed.stderr
    assert f"{ADDRESS} is complete: " in pushed.stdout
    again = run([PROGRAM, "store", "push", str(small_store.path), ADDRESS], hub)
    assert again.stdout.endswith("files, as here. Nothing to do.\n"), again.stderr
    read = run([sys.executable, "-c", _READ, ADDRESS, str(tmp_path / "rows.npy")], hub)
    assert read.returncode == 0, read.stderr
    rows = np.load(tmp_path / "rows.npy")
    np.testing.assert_array_equal(rows, small_store.read(slice(None)))
    offline = hub | {"HF_HUB_OFFLINE": "1"}
    read = run([sys.executable, "-c", _READ, ADDRESS, str(tmp_path / "again.npy")], offline)
    assert read.stderr.startswith(f"{ADDRESS} does not answer. Going on with what the cache ")
    np.testing.assert_array_equal(np.load(tmp_path / "again.npy"), rows)
    pulled = run([PROGRAM, "store", "pull", ADDRESS, str(tmp_path / "back.zarr")], hub)
    assert pulled.returncode == 0, pulled.stderr
    assert files_of(tmp_path / "back.zarr") == files_of(small_store.path)
    listed = run([PROGRAM, "store", "ls", ADDRESS.rpartition("/")[0], "--json"], hub)
    assert listed.returncode == 0, listed.stderr
    (entry,) = json.loads(listed.stdout)
    assert (entry["address"], entry["digest"]) == (ADDRESS, small_store.digest)
    (index,) = (tmp_path / "cache/catalogues").iterdir()  # by its blob, which changes with it
    assert json.loads(index.read_text())["manifests"].keys() == {"small.zarr"}
    for file in (tmp_path / "cache").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()


def test_a_repository_that_cannot_be_made_or_is_not_ours_is_one_sentence(
    hub: dict[str, str], small_store: ActivationStore
) -> None:
    other = "hf://datasets/forbidden/acts/small.zarr"
    done = run([PROGRAM, "store", "push", str(small_store.path), other], hub)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"Error: {other} may not be read or written")
    done = run([PROGRAM, "store", "info", ADDRESS], hub | {"HF_TOKEN": "hf_wrong"})
    assert done.returncode == 2
    assert "hf_wrong" not in done.stderr
    assert "Traceback" not in done.stderr


_FRONT = """
import sys
from huggingface_hub import DatasetCard, HfApi
card = DatasetCard.load(sys.argv[1])
print(HfApi().dataset_info(sys.argv[1]).private, card.data.license, card.data.tags, card.data.size_categories)
print(card.text)
"""


def test_a_push_makes_the_repository_and_its_front_page(
    hub: dict[str, str], small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    licensed = run([PROGRAM, "store", "card", str(copy), "--license", "cc-by-4.0"], hub)
    assert licensed.returncode == 0, licensed.stderr
    address = "hf://datasets/someone/new/small.zarr"
    pushed = run([PROGRAM, "store", "push", str(copy), address, "--private"], hub)
    assert pushed.returncode == 0, pushed.stderr
    assert "hf://datasets/someone/new was not there, and has been made.\n" in pushed.stderr
    found = run([sys.executable, "-c", _FRONT, "someone/new"], hub)
    first, _, page = found.stdout.partition("\n")
    tags = ["sparse-autoencoder", "activations", "sae-pipe"]
    assert first == f"True cc-by-4.0 {tags} ['1K<n<10K']", found.stderr
    assert f'store = open_store("{address}")' in page
    pulled = run([PROGRAM, "store", "pull", address, str(tmp_path / "back.zarr")], hub)
    assert pulled.returncode == 0, pulled.stderr
    assert files_of(tmp_path / "back.zarr") == files_of(copy)


@pytest.mark.usefixtures("no_hub")
def test_a_store_of_the_hub_is_not_taken_for_a_folder() -> None:
    with pytest.raises(StoreError, match=r"^There is no store at hf:"):
        open_store("hf:/datasets/x")
