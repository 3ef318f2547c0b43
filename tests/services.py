"""Real services as processes of their own, on this machine: S3 (moto's server), files over HTTP, and
a wire between them and the tests that can be cut, slowed down and measured."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BUCKET = "lab"
_START_S = 60.0  # on a machine that is busy with other things

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "an-id-of-tests",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


def start(command: list[str], port: int, log: Path) -> subprocess.Popen[bytes]:
    """A server process, once it answers."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    until = time.monotonic() + _START_S
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(log.read_text()[-2000:])
        time.sleep(0.05)
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@dataclass
class S3:
    """A bucket called `lab`; port: of the server itself; log: one line a request."""

    port: int
    log: Path

    def requests(self, method: str) -> list[str]:
        """The paths of all requests of a kind, in order."""
        log = re.sub(r"\x1b\[\d*m", "", self.log.read_text(errors="replace"))
        lines = log.splitlines()
        marked = (line.partition(f'"{method} ')[2] for line in lines)
        return [line.split()[0].removeprefix(f"/{BUCKET}/") for line in marked if line]

    def environment(self, cache: Path) -> dict[str, str]:
        """What sets this server and a cache, for this process and others."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "SAE_PIPE_CACHE": str(cache),
        }

    def put(self, store: Path, name: str) -> str:
        """Every file of a store into the bucket, as another tool would; returns the address."""
        client = self.client()
        for file in store.rglob("*"):
            if file.is_file() and file.name != ".lock":
                client.upload_file(str(file), BUCKET, f"{name}/{file.relative_to(store)}")
        client.close()
        return f"s3://{BUCKET}/{name}"

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )


def need(*packages: str) -> None:
    """Skip where a service cannot be had."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[test]'")


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    need("moto", "flask", "flask_cors", "s3fs")
    port, log = free_port(), folder / "s3.log"
    process = start(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, log
    )
    try:
        s3 = S3(port, log)
        client = s3.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield s3
    finally:
        stop(process)


@contextmanager
def web_server(folder: Path, port: int, log: Path, *, ranges: bool = True) -> Iterator[None]:
    """A static server of a folder that knows ranges, or one that does not."""
    need("aiohttp")
    command = [sys.executable, str(HERE / "web_server.py"), str(folder), str(port)]
    if not ranges:
        command = [
            sys.executable, "-m", "http.server", str(port), "-b", "127.0.0.1", "-d", str(folder)
        ]  # fmt: skip
    process = start(command, port, log)
    try:
        yield
    finally:
        stop(process)


class Wire:
    """A TCP connection to a server that can be cut and joined, in a process of its own."""

    def __init__(self, to_port: int, folder: Path) -> None:
        self.port, self._to, self._folder = free_port(), to_port, folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def join(self, *, bytes_per_s: int = 0, dies_after: int = 0) -> None:
        """bytes_per_s: of all connections together, towards the client; dies_after: bytes in all."""
        command = [
            sys.executable, str(HERE / "wire.py"), str(self.port), str(self._to),
            str(self._folder / "wire.json"), str(bytes_per_s), str(dies_after),
        ]  # fmt: skip
        self._process = start(command, self.port, self._folder / "wire.log")

    def cut(self) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None

    def wait_until_it_dies(self) -> None:
        assert self._process is not None
        self._process.wait(timeout=100)
        self._process = None

    def carried(self) -> tuple[int, int]:
        """Bytes that came from the clients, and from the server, since it was joined."""
        assert self._process is not None
        before = (self._folder / "wire.json").stat().st_mtime_ns
        os.kill(self._process.pid, signal.SIGUSR1)
        until = time.monotonic() + 20
        while (self._folder / "wire.json").stat().st_mtime_ns == before:
            assert time.monotonic() < until
            time.sleep(0.01)
        up, down = json.loads((self._folder / "wire.json").read_text())
        return up, down


@contextmanager
def wire_to(port: int, folder: Path) -> Iterator[Wire]:
    wire = Wire(port, folder)
    wire.join()
    try:
        yield wire
    finally:
        wire.cut()
