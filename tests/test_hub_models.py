"""Models of the Hub, spoken to over real HTTP: a server here answers the way the Hub does."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import pytest
import torch

from sae_pipe.stages.models import inspect_model, load_truncated
from sae_pipe.storage.errors import InputError, NetworkError

COMMIT = "5" * 40
REFUSALS = {
    "someone/gone": (404, "RepoNotFound"),
    "someone/gated": (403, "GatedRepo"),
    "someone/no-revision": (404, "RevisionNotFound"),
    "someone/no-config": (404, "EntryNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    """/owner/name/resolve/REVISION/FILE of one model, and the Hub's codes for what is not there."""

    model_folder: ClassVar[Path]
    asked: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        self.asked.append(f"{self.command} {self.path}")

    def _answer(self) -> None:
        parts = self.path.split("/")
        repository = "/".join(parts[1:3])
        file = self.model_folder / parts[-1]
        if repository in REFUSALS:
            return self._refuse(*REFUSALS[repository])
        if parts[3:4] != ["resolve"] or not file.is_file():
            return self._refuse(404, "EntryNotFound")
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(neox_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The Hub's address and cache moved here; one model, someone/tiny, lies there."""
    Hub.model_folder, Hub.asked = neox_folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_branch_is_pinned_to_its_commit_and_only_the_config_is_fetched(hub: type[Hub]) -> None:
    info = inspect_model("someone/tiny", revision="main")
    assert (info.source, info.commit, info.revision) == ("someone/tiny", COMMIT, COMMIT)
    assert (info.n_layers, info.d_model) == (4, 32)
    fetched = {line for line in hub.asked if "/resolve/" in line}
    config = "/someone/tiny/resolve/main/config.json"
    assert fetched == {f"HEAD {config}", f"GET {config}"}


def test_a_model_of_the_hub_loads_at_its_commit(hub: type[Hub], neox_folder: Path) -> None:
    cpu, token_ids_BT = torch.device("cpu"), torch.arange(16).reshape(2, 8)
    found, expected = (
        load_truncated(inspect_model(name), [1], "resid_post", cpu, torch.float32)
        for name in ("someone/tiny", str(neox_folder))
    )
    assert torch.equal(found.activations(token_ids_BT)[1], expected.activations(token_ids_BT)[1])
    assert f"GET /someone/tiny/resolve/{COMMIT}/model.safetensors" in hub.asked


def test_what_was_fetched_before_needs_no_network(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect_model("someone/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert inspect_model("someone/tiny").revision == COMMIT


def test_without_network_a_local_folder_is_offered(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = (
        "Model EleutherAI/pythia-160m could not be fetched from the Hub: no network, or the Hub "
        "does not answer. Fetch it on a machine that has network with `hf download "
        "EleutherAI/pythia-160m --local-dir DIR`, copy DIR here and pass --model DIR."
    )
    with pytest.raises(NetworkError, match=f"^{re.escape(message)}$"):
        inspect_model("pythia-160m")


NOT_FOUND = (
    "was not found: it is neither a local folder nor on the Hub (or it is private, and "
    "`hf auth login` is needed). Check the spelling."
)
SENTENCES = {
    "someone/gone": f"Model someone/gone {NOT_FOUND}",
    "someone/bad--name": f"Model someone/bad--name {NOT_FOUND}",
    "someone/gated": (
        "Model someone/gated is gated. Accept its terms at https://huggingface.co/someone/gated, "
        "run `hf auth login`, and try again."
    ),
    "someone/no-revision": (
        "Model someone/no-revision has no revision 'step5' on the Hub. Pass a branch, a tag or a "
        "commit listed at https://huggingface.co/someone/no-revision/commits/main."
    ),
    "someone/no-config": (
        "Model someone/no-config at revision step5 has no config.json on the Hub, so it is not a "
        "model in the Transformers format. Pass another one."
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_the_hub_refuses_is_said_in_a_sentence(name: str, hub: type[Hub]) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(SENTENCES[name])}$"):
        inspect_model(name, revision="step5")
