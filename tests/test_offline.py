"""A store at an address that does not answer any more: read from the cache, and it is said."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from sae_pipe.storage import ActivationStore, NetworkError, open_store
from sae_pipe.storage.address import Address, place
from sae_pipe.storage.seen import Seen
from sae_pipe.storage.shard_cache import Cache

from .conftest import write_store
from .services import free_port, web_server


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a web server to be; the test has a cache of its own and little patience."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sae_pipe.storage.remote.FIRST_PATIENCE_S", 0.3)
    return free_port()


def test_what_is_in_the_cache_is_read_without_the_network(
    small_store: ActivationStore, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{port}/{small_store.path.name}"
    with web_server(small_store.path.parent, port, tmp_path / "web.log"):
        store = open_store(url)
        expected, mean = store.read(slice(100)), store.mean  # of the first shard
        store.close()
    assert capsys.readouterr().err == ""
    store = open_store(url)
    said = [line for line in capsys.readouterr().err.splitlines() if "Going on" in line]
    assert re.fullmatch(
        rf"{url} does not answer\. Going on with what the cache {tmp_path}/cache holds of it: the store "
        rf"with the digest {small_store.digest}, as it was seen there at \d{{4}}-\d\d-\d\d "
        r"\d\d:\d\d\+00:00\. What is not in the cache cannot be read\.",
        said[0],
    )
    np.testing.assert_array_equal(store.read(slice(100)), expected)
    np.testing.assert_array_equal(store.mean, mean)
    with pytest.raises(NetworkError, match=rf"^{url} could not be reached for \d+ s \("):
        store.read(slice(3000, 3001))  # of a shard that was not fetched
    store.close()
    with web_server(small_store.path.parent, port, tmp_path / "web.log"):
        again = open_store(url)
        np.testing.assert_array_equal(again.read([3000]), small_store.read([3000]))
        again.close()


def test_batches_are_the_same_without_the_network(
    small_store: ActivationStore, tmp_path: Path, port: int
) -> None:
    url = f"http://127.0.0.1:{port}/{small_store.path.name}"
    found = []
    for is_there in (True, False):
        with (
            web_server(small_store.path.parent, port, tmp_path / "log")
            if is_there
            else nullcontext()
        ):
            store = open_store(url)
            with store.batches(512, seed=3) as batches:
                found.append([batches.to_floats(next(batches)) for _ in range(10)])
            store.close()
    np.testing.assert_array_equal(found[0], found[1])


def test_an_address_that_never_answered_is_refused_as_before(port: int) -> None:
    with pytest.raises(NetworkError, match="could not be reached for"):
        open_store(f"http://127.0.0.1:{port}/acts.zarr")


def test_what_was_seen_there_last_counts_and_damage_of_the_cache_does_not(
    small_store: ActivationStore, tmp_path: Path, port: int
) -> None:
    shutil.copytree(small_store.path, tmp_path / "web/acts.zarr")
    url = f"http://127.0.0.1:{port}/acts.zarr"
    with web_server(tmp_path / "web", port, tmp_path / "web.log"):
        open_store(url).close()
        shutil.rmtree(tmp_path / "web/acts.zarr")
        rng = np.random.default_rng(0)
        rows = (rng.standard_normal((300, 8)) + 3).astype("f4")
        newer = write_store(tmp_path / "web/acts.zarr", rows[:256], rows[256:])
        open_store(url).close()
    store = open_store(url)
    assert store.digest == newer.digest
    store.close()
    where = place(url)
    assert isinstance(where, Address)
    seen = Seen(Cache.from_environment(), where)
    [note] = (tmp_path / "cache/addresses").iterdir()
    entry = json.loads(note.read_text())
    manifest = tmp_path / "cache" / entry["manifest"]
    assert seen.manifest() is not None
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b"bfloat16", b"float32 "))
    assert seen.manifest() is None
    manifest.write_bytes(whole)
    for spoilt in ("{", "[]", "[" * 5000, json.dumps(entry | {"address": "s3://lab/acts.zarr"})):
        note.write_text(spoilt)
        assert seen.manifest() is None
    with pytest.raises(NetworkError, match="could not be reached for"):
        open_store(url)
