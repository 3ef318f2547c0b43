"""Servers that send what was not asked for: no more is taken than the manifest allows."""

import gzip
import json
import re
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage import ActivationStore, InputError, NetworkError, StoreError, open_store
from sae_pipe.storage.address import Address, place
from sae_pipe.storage.pull import pull
from sae_pipe.storage.remote import Link

from .hostile import change as change_manifest
from .services import ENVIRONMENT

pytest.importorskip("aiohttp")

PIECE = bytes(1 << 20)
ENDLESS = 1 << 31  # what a body without end has sent at most, so that a mistake does not hang


class Sent:
    """How many bytes of bodies a server has sent."""

    def __init__(self) -> None:
        self.n_bytes, self._lock = 0, threading.Lock()

    def add(self, n: int) -> None:
        with self._lock:
            self.n_bytes += n


Answer = Callable[[BaseHTTPRequestHandler, bytes, Sent], bool]


@contextmanager
def serving(
    folder: Path, answer: Answer, *, has_folders: bool = False
) -> Iterator[tuple[str, Sent]]:
    """A web server of a folder; answer: given the request and the file, whether it has answered.

    has_folders: whether it is asked about what is no file, too.
    """
    sent = Sent()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._plain(False)

        def do_GET(self) -> None:
            file = folder / self.path.lstrip("/")
            try:
                if not file.is_file() and not has_folders:
                    self.send_error(404)
                elif answer(self, file.read_bytes() if file.is_file() else b"", sent):
                    return
                elif not file.is_file():
                    self.send_error(404)
                else:
                    self._plain(True)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _plain(self, with_body: bool) -> None:
            file = folder / self.path.lstrip("/")
            data = file.read_bytes() if file.is_file() else b""
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = data[int(found[1]) : int(found[2]) + 1] if found else data
            self.send_response(206 if found else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if with_body:
                self.wfile.write(part)
                sent.add(len(part))

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/acts.zarr", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def endless(
    request: BaseHTTPRequestHandler, sent: Sent, begin: bytes = b"", status: int = 200
) -> None:
    """A body that does not end, after some bytes that may be right."""
    request.send_response(status)
    request.send_header("Connection", "close")
    request.end_headers()
    request.close_connection = True
    request.wfile.write(begin)
    while sent.n_bytes < ENDLESS:
        request.wfile.write(PIECE)
        sent.add(len(PIECE))


def only(name: str, act: Callable[[BaseHTTPRequestHandler, bytes, Sent], object]) -> Answer:
    """An answer that is special for one file."""

    def answer(request: BaseHTTPRequestHandler, data: bytes, sent: Sent) -> bool:
        if not request.path.endswith(name):
            return False
        act(request, data, sent)
        return True

    return answer


@pytest.fixture
def folder(small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shutil.copytree(small_store.path, tmp_path / "web/acts.zarr")
    return tmp_path / "web"


def peak_bytes(act: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_manifest_without_end_is_given_up_at_its_limit(folder: Path) -> None:
    def refused() -> None:
        with pytest.raises(
            StoreError, match=r"manifest\.json has more than 134,217,728 bytes, which "
        ):
            open_store(address)

    with serving(folder, only("manifest.json", lambda r, data, sent: endless(r, sent))) as (
        address,
        sent,
    ):
        assert peak_bytes(refused) < 3 * (1 << 27)
    assert sent.n_bytes < (1 << 27) + (64 << 20)  # what sockets hold beyond what was read


@pytest.mark.parametrize("status", [200, 206])
def test_a_shard_without_end_is_cut_at_its_recorded_size_and_refused(
    folder: Path, tmp_path: Path, status: int
) -> None:
    """One that ignores ranges, and one that claims to know them."""
    spoil = only("activations/c/1/0", lambda r, data, sent: endless(r, sent, b"", status))

    def refused() -> None:
        with pytest.raises(StoreError, match=message):
            pull(place(address), tmp_path / "back.zarr", say=lambda line: None)

    with serving(folder, spoil) as (address, sent):
        message = (
            rf"^{address}/activations/c/1/0 has other bytes than the manifest records, also when it "
            r"is asked for again\. Push or harvest the store again\.$"
        )
        assert peak_bytes(refused) < 64 << 20
    assert sent.n_bytes < 128 << 20
    assert not list((tmp_path / "back.zarr").rglob("*.tmp"))
    assert not (tmp_path / "back.zarr/manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "n_bytes", "message"),
    [
        ("statistics/mean/c/0", 300_000_000, "it records {} with 300,000,000 bytes, and none has more than 1"),
        ("tokenizer.json", 1 << 60, "it records {} with 1,152,921,504,606,846,976 bytes, and none has "),
        ("corpus/corpus.json", (1 << 26) + 1, "it records {} with 67,108,865 bytes, and none has more than 67,108,864"),
        ("activations/c/1/0", 60_000_000, "^{} of a store is said to have 60 MB, and the cache .* may hold 50 MB"),
    ],
)  # fmt: skip
def test_a_size_that_a_manifest_makes_up_empties_no_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, n_bytes: int, message: str
) -> None:  # fmt: skip
    monkeypatch.setenv("SAE_PIPE_CACHE_SIZE", "50MB")

    def kept() -> set[str]:
        return {str(file) for file in (tmp_path / "cache/stores").rglob("*") if file.is_file()}

    with serving(folder, lambda request, data, sent: False) as (address, _):
        store = open_store(address)
        store.read(slice(None))
        store.close()
        before = kept()

        def claim(m: Any) -> None:
            entry = {"bytes": n_bytes, "sha256": "0" * 64}
            if name.startswith("activations"):
                m["train"]["shards"][1]["files"]["activations"] = entry
            else:
                m["files"][name] = entry

        change_manifest(folder / "acts.zarr", claim)
        with pytest.raises((StoreError, InputError), match=message.format(re.escape(name))):
            open_store(address).read(slice(None))
        refused = CliRunner().invoke(app, ["store", "verify", address])
        assert refused.exit_code == 2
    assert len(before) > 4
    assert before <= kept()


def test_statistics_that_a_server_spoils_are_refused_when_the_store_is_opened(folder: Path) -> None:
    file = folder / "acts.zarr/statistics/variance/c/0"
    for data, what in ((bytes(file.stat().st_size), "has other bytes"), (None, "is missing")):
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        with (
            serving(folder, lambda request, data, sent: False) as (address, _),
            pytest.raises(StoreError, match=rf"statistics/variance/c/0 {what}"),
        ):
            open_store(address)


@pytest.mark.parametrize(
    ("file", "status", "limit"),
    [("activations/c/1/0", 403, 1 << 16), ("activations/c/1/0", 500, 1 << 16), ("", 200, 1 << 24)],
)
def test_what_speaks_like_s3_sends_no_answer_without_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, status: int, limit: int
) -> None:  # fmt: skip
    """Errors and listings, which botocore reads whole."""
    pytest.importorskip("s3fs")
    shutil.move(folder / "acts.zarr", folder / "lab/acts.zarr")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def ask() -> None:
        if file:
            pull(place("s3://lab/acts.zarr"), tmp_path / "back.zarr", say=lambda line: None)
        else:
            Link(Address("s3://lab/acts.zarr")).folder("")

    def refused() -> None:
        with pytest.raises(NetworkError, match=message):
            ask()

    begin = b"<Error>" if file else b"<ListBucketResult>"
    spoil = only(file, lambda r, data, sent: endless(r, sent, begin, status))
    with serving(folder, spoil, has_folders=True) as (address, sent):
        endpoint = address.removesuffix("/acts.zarr")
        message = (
            f"^{endpoint} answered with more than {limit:,} bytes where a short answer was asked "
        )
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert peak_bytes(refused) < (32 << 20) + 3 * limit
    assert sent.n_bytes < 64 << 20


def test_what_speaks_like_s3_sends_no_more_than_was_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    shutil.move(folder / "acts.zarr", folder / "lab/acts.zarr")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    spoil = only("activations/c/1/0", lambda r, data, sent: endless(r, sent, b"", 206))
    message = (
        r"^s3://lab/acts\.zarr/activations/c/1/0 has other bytes than the manifest records, also "
    )

    def refused() -> None:
        with pytest.raises(StoreError, match=message):
            pull(place("s3://lab/acts.zarr"), tmp_path / "back.zarr", say=lambda line: None)

    with serving(folder, spoil) as (address, sent):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address.removesuffix("/acts.zarr"))
        assert peak_bytes(refused) < 64 << 20
    assert sent.n_bytes < 128 << 20


def test_right_bytes_with_more_behind_them_are_the_file(
    folder: Path, small_store: ActivationStore
) -> None:
    longer = only("activations/c/1/0", lambda r, data, sent: endless(r, sent, data))
    with serving(folder, longer) as (address, _):
        store = open_store(address)
        np.testing.assert_array_equal(store.read(slice(None)), small_store.read(slice(None)))
        store.close()


def test_a_body_that_unpacks_itself_is_not_unpacked(folder: Path) -> None:
    bomb = gzip.compress(bytes(1 << 30), 1)

    def packed(request: BaseHTTPRequestHandler, data: bytes, sent: Sent) -> None:
        request.send_response(200)
        request.send_header("Content-Encoding", "gzip")
        request.send_header("Content-Length", str(len(bomb)))
        request.end_headers()
        request.wfile.write(bomb)

    def refused() -> None:
        with pytest.raises(StoreError, match=r"manifest\.json is damaged: it is not JSON"):
            open_store(address)

    with serving(folder, only("manifest.json", packed)) as (address, _):
        assert peak_bytes(refused) < 8 * len(bomb)


def test_a_size_that_a_server_makes_up_is_not_read_to_its_end(folder: Path) -> None:
    """`store verify` asks for the size of each file first."""
    name = "activations/c/1/0"

    class Liar:
        def __call__(self, request: BaseHTTPRequestHandler, data: bytes, sent: Sent) -> bool:
            if not request.path.endswith(name):
                return False
            request.send_response(206)
            request.send_header("Content-Range", f"bytes 0-{1 << 50}/{(1 << 50) + 1}")
            request.send_header("Content-Length", str(1 << 50))
            request.end_headers()
            request.close_connection = True
            while sent.n_bytes < ENDLESS:
                request.wfile.write(PIECE)
                sent.add(len(PIECE))
            return True

    with serving(folder, Liar()) as (address, sent):
        result = CliRunner().invoke(app, ["store", "verify", address])
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        assert f"Error: Store {address} is damaged: " in result.stderr
    assert sent.n_bytes < 256 << 20


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_service_with_an_error_for_what_is_not_there_is_pulled_from(
    folder: Path, tmp_path: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As S3 has for who may not list: nobody asked for a signature, so it is asked for once."""
    asked = []

    def refused(request: BaseHTTPRequestHandler, data: bytes, sent: Sent) -> None:
        asked.append(request.path)
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()

    (folder / "acts.zarr/manifest.json.minisig").write_text("not for you")
    with serving(folder, only("manifest.json.minisig", refused)) as (address, _):
        pull(place(address), tmp_path / "back.zarr", say=lambda line: None)
    assert not (tmp_path / "back.zarr/manifest.json.minisig").exists()
    assert len(asked) == 1
    assert capsys.readouterr().err == ""


def test_a_manifest_of_a_server_names_no_place_of_this_machine(
    folder: Path, tmp_path: Path
) -> None:
    """Its digest becomes a folder of the cache, its names files below that."""
    file = folder / "acts.zarr/manifest.json"
    manifest = json.loads(file.read_text())
    for change, message in (
        ({"digest": "../../../outside"}, "its recipe, sizes and shards do not have the digest"),
        (
            {"files": {"../../outside": {"bytes": 1, "sha256": "0" * 64}}},
            r"a file named '\.\./\.\./outside', which is not inside the store",
        ),
    ):
        file.write_text(json.dumps(manifest | change))
        with (
            serving(folder, lambda request, data, sent: False) as (address, _),
            pytest.raises(StoreError, match=message),
        ):
            open_store(address)
    assert not list(tmp_path.rglob("outside*"))
