"""SAEs to the Hub and back, by the real client and a Hub on this machine.

# B rows, D d_in, S d_sae
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.curve import draw_curve
from sae_pipe.stages.hub_address import HubPlace, parse_hub
from sae_pipe.stages.sae import load_sae
from sae_pipe.stages.sae.weights import write_weights
from sae_pipe.stages.sae_card import MARKER, escaped
from sae_pipe.stages.sae_export import write_folder
from sae_pipe.stages.sae_formats.facts import config_of
from sae_pipe.stages.sae_push import PushConfig, pull_sae, push_sae
from sae_pipe.storage.errors import InputError, NetworkError, StoreError
from sae_pipe.storage.files import write_json

from .local_hub import TOKEN, LocalHub, serving
from .saes import FACTS, make_sae, some_x

# The client's own, about how it calls httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO, PLACE = "someone/sae", "hf://someone/sae"
SUMMARY = {
    "explained_variance": 0.8123456,
    "fvu": 0.1876544,
    "mse": 1.5,
    "l0": 5.25,
    "dead_fraction": 0.125,
    "gamma": None,
    "heldout_rows": 20_000,
}


def quiet(_: str) -> None: ...


@functools.cache
def curve() -> bytes:
    """A training curve; it takes half a second to draw."""
    return draw_curve([{"step": step, "loss": 1 / step} for step in (1, 2, 3)], "run")


def make_run(folder: Path, variant: str = "matryoshka", **changes: Any) -> Path:
    """A finished run folder, as far as publishing looks at it. changes: of its config.json."""
    sae = make_sae(variant)
    folder.mkdir()
    config = config_of(sae, FACTS)
    config["recipe"] |= {"batch_size": 2048, "tokens": None, "arch": variant}
    config["resolved"]["tokens"] = 2_048_000
    config["store"] |= {
        "path": "/home/someone/secret/acts.zarr",
        "name": "acts",
        "digest": "ab" * 32,
        "n_rows": 2_000_000,
    }
    config["store"]["recipe"] |= {"mask": {"p": 0.3, "string": "..."}}
    config["store"]["recipe"]["corpus"]["source"] = {
        "parts": [{"dataset": "owner/text", "revision": "c" * 40}]
    }
    config["provenance"] = {"command": "sae-pipe fit --store /home/someone/secret/acts.zarr"}
    write_json(folder / "config.json", config | changes)
    write_weights(sae, folder)
    lines = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "curve.png").write_bytes(curve())
    write_json(folder / "summary.json", SUMMARY)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[LocalHub]]:
    """The Hub's address and cache moved here, and a token that may write."""
    with serving() as address:
        constants = huggingface_hub.constants
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield LocalHub


def files_of(hub: type[LocalHub], repo: str = REPO) -> dict[str, bytes]:
    return hub.repos[repo][-1][1]


def push(run: Path, address: str = PLACE, **options: Any) -> str:
    return push_sae(PushConfig(run=run, address=address, **options), say=quiet)


def test_what_was_pushed_loads_again_by_its_address_and_by_its_commit(
    hub: type[LocalHub], run: Path
) -> None:
    pinned = push(run)
    assert pinned == f"{PLACE}@{hub.repos[REPO][-1][0]}"
    expected = load_sae(run)
    for address in (PLACE, pinned):
        found = load_sae(address)
        assert torch.equal(found.encode(some_x()), expected.encode(some_x()))
        assert all(
            torch.equal(a, b)
            for a, b in zip(found.parameters(), expected.parameters(), strict=True)
        )


def test_loading_fetches_the_config_and_the_weights_alone(hub: type[LocalHub], run: Path) -> None:
    pinned = push(run)
    hub.asked.clear()
    load_sae(pinned)
    fetched = {line.rpartition("/")[2].split(" ")[0] for line in hub.asked if "/resolve/" in line}
    assert fetched == {"config.json", "sae.safetensors"}


def test_a_push_holds_the_run_and_a_folder_for_each_tool(hub: type[LocalHub], run: Path) -> None:
    push(run)
    files = files_of(hub)
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "sae.safetensors",
        "summary.json",
        "metrics.jsonl",
        "curve.png",
        "saelens/cfg.json",
        "saelens/sae_weights.safetensors",
        "dictionary_learning/config.json",
        "dictionary_learning/ae.pt",
    }
    assert files["sae.safetensors"] == (run / "sae.safetensors").read_bytes()
    for name in ("curve.png", "metrics.jsonl", "summary.json"):
        assert files[name] == (run / name).read_bytes()


def test_nothing_of_this_machine_is_published(hub: type[LocalHub], run: Path) -> None:
    push(run)
    assert not [name for name, data in files_of(hub).items() if b"secret" in data]


def test_the_card_says_what_it_is_how_it_was_made_and_how_to_load_it(
    hub: type[LocalHub], run: Path
) -> None:
    push(run, licence="apache-2.0")
    card = files_of(hub)["README.md"].decode()
    header, body = card.split(f"---\n\n{MARKER}\n\n")
    assert header.splitlines() == [
        "---",
        "library_name: sae-pipe",
        'license: "apache-2.0"',
        'base_model: "EleutherAI/pythia-70m"',
        "tags:",
        "- sparse-autoencoder",
        "- sae-pipe",
        "- saelens",
    ]
    assert body.startswith("# matryoshka sparse autoencoder of EleutherAI/pythia\\-70m\n")
    for line in (
        "sae = load_sae('hf://someone/sae')",
        "sae = SAE.from_pretrained('someone/sae', 'saelens')",
        "place = snapshot_download('someone/sae', allow_patterns='dictionary_learning/*')",
        'dictionary, config = load_dictionary(f"{place}/dictionary_learning", "cpu")',
        f"| store digest | {'ab' * 32} |",
        "| input masking | each token replaced by '\\.\\.\\.' with p \\= 0\\.3 |",
        f"| text | owner/text at {'c' * 12} |",
        "| lr | 0\\.0004 |",
        "| explained variance | 0\\.8123 |",
        "| active latents a row \\(L0\\) | 5\\.25 |",
        "| latents that never fire | 12\\.50% |",
        "| gamma\\: shrinkage, 1 is none | not defined |",
        "On 20,000 held-out, unmasked rows of documents that no training row has:",
        "![Training curves](curve.png)",
        "- these weights: apache\\-2\\.0",
    ):
        assert line in body.splitlines(), line


def test_code_in_the_card_runs(hub: type[LocalHub], run: Path) -> None:
    push(run)
    card = files_of(hub)["README.md"].decode()
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]
    found: dict[str, Any] = {"x": some_x()}
    exec(code, found)  # noqa: S102  # of our own card
    assert torch.equal(found["latents"], load_sae(run).encode(some_x()))


def test_a_card_without_a_licence_leaves_the_line_to_the_user(
    hub: type[LocalHub], run: Path
) -> None:
    push(run)
    card = files_of(hub)["README.md"].decode()
    assert "# license: choose one\n" in card
    assert "- these weights: not chosen yet: name one here\n" in card


HOSTILE = "<script>alert(1)</script>[x](http://evil)\n# heading | `code`\u202e"


def test_texts_of_files_stay_texts_in_the_card(hub: type[LocalHub], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["store"]["recipe"]["model"]["name"] = HOSTILE
    config["store"]["recipe"]["corpus"]["source"] = {"dataset": HOSTILE}
    config["store"] |= {"name": HOSTILE, "digest": "```\n---\nlicense: mit"}
    write_json(run / "config.json", config)
    push(run)
    card = files_of(hub)["README.md"].decode()
    assert "base_model" not in card
    assert "<script>" not in card
    assert "](http" not in card
    assert "\n# heading" not in card
    assert "\nlicense: mit" not in card
    assert "\u202e" not in card
    shown = (
        r"&lt;script&gt;alert\(1\)&lt;/script&gt;\[x\]\(http\://evil\)\\n\# heading \| \`code\`"
        r"\\u202e"
    )
    assert escaped(HOSTILE) == shown
    assert f"| activation store | {shown} |" in card


def test_an_architecture_that_a_format_cannot_hold_is_told_in_the_card(
    hub: type[LocalHub], tmp_path: Path
) -> None:
    push(make_run(tmp_path / "run", "jumprelu of x - b_dec"))
    files = files_of(hub)
    assert "saelens/cfg.json" in files
    assert "dictionary_learning/ae.pt" not in files
    sentence = (
        "dictionary_learning cannot hold this jumprelu SAE: its encoder sees x - b_dec, and there "
        "is no place to say so. Export it with --format saelens or safetensors."
    )
    assert escaped(f"Not for dictionary_learning: {sentence}") in files["README.md"].decode()


def test_formats_can_be_chosen_and_those_of_an_earlier_push_go(
    hub: type[LocalHub], run: Path
) -> None:
    push(run)
    push(run, formats=("safetensors", "saebench"))
    folders = {path.partition("/")[0] for path in files_of(hub) if "/" in path}
    assert folders == {"safetensors", "saebench"}
    push(run, formats=())
    assert not [path for path in files_of(hub) if "/" in path]


def test_a_format_that_was_asked_for_and_cannot_hold_it_is_an_error_before_anything_is_sent(
    hub: type[LocalHub], run: Path
) -> None:
    message = (
        "sparsify cannot hold this matryoshka SAE: it has TopK SAEs only, which keep k latents a "
        "row and have no threshold. Export it with --format saelens or safetensors."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        push(run, formats=("sparsify",))
    assert hub.asked == []


def test_a_readme_of_ones_own_stays_and_a_generated_card_is_renewed(
    hub: type[LocalHub], run: Path
) -> None:
    push(run)
    push(run, licence="mit")
    assert b'license: "mit"' in files_of(hub)["README.md"]
    hub.commit(REPO, files_of(hub) | {"README.md": b"mine"})
    said: list[str] = []
    push_sae(PushConfig(run=run, address=PLACE), say=said.append)
    assert files_of(hub)["README.md"] == b"mine"
    assert said[0] == f"The README.md of {PLACE} is your own, and stays as it is."


def test_private_counts_for_a_repository_that_is_made_now(hub: type[LocalHub], run: Path) -> None:
    push(run, "hf://someone/hidden", private=True)
    push(run, "hf://someone/shown")
    assert hub.private == {"someone/hidden"}


def test_pull_gives_the_run_back(hub: type[LocalHub], run: Path, tmp_path: Path) -> None:
    pinned, said = push(run), list[str]()
    out = pull_sae(PLACE, tmp_path / "pulled", say=said.append)
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "sae.safetensors",
        "summary.json",
        "metrics.jsonl",
        "README.md",
    }
    assert not any(file.is_symlink() for file in out.iterdir())
    assert (out / "sae.safetensors").read_bytes() == (run / "sae.safetensors").read_bytes()
    assert said == [
        f"{out} holds the run of {pinned}: d_in=12, d_sae=48, config.json, sae.safetensors, "
        "summary.json, metrics.jsonl, README.md."
    ]
    again = push(out, "hf://someone/again")
    assert torch.equal(load_sae(again).encode(some_x()), load_sae(run).encode(some_x()))


def test_an_earlier_commit_can_be_asked_for(hub: type[LocalHub], run: Path, tmp_path: Path) -> None:
    first = push(run)
    push(make_run(tmp_path / "other", "topk"))
    assert type(load_sae(first)).__name__ == "Matryoshka"
    assert type(load_sae(PLACE)).__name__ == "TopK"


def test_what_was_fetched_before_needs_no_network(
    hub: type[LocalHub], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run)
    expected = load_sae(PLACE).encode(some_x())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_sae(PLACE).encode(some_x()), expected)


def test_without_network_it_is_said(
    hub: type[LocalHub], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = (
        f"{PLACE} could not be reached: no network, or the Hub does not answer, and it is not in "
        "the cache of earlier downloads. Try again where there is network."
    )
    with pytest.raises(NetworkError, match=f"^{re.escape(message)}$"):
        load_sae(PLACE)
    with pytest.raises(NetworkError, match=f"^{re.escape(message)}$"):
        push(run)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "safetensors"])
def test_an_sae_of_another_tool_is_imported_from_the_hub(
    format: str, hub: type[LocalHub], tmp_path: Path
) -> None:
    sae = make_sae("batch_topk")
    folder = write_folder(sae, FACTS, format, tmp_path / format)
    files = {f"deep/inside/{file.name}": file.read_bytes() for file in folder.iterdir()}
    oid = hub.commit("other/saes", files | {"deep/inside/evil.py": b"raise SystemExit"})
    done = CliRunner().invoke(
        app, ["import", "hf://other/saes/deep/inside", "--out", str(tmp_path / "run")]
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == (
        f"{tmp_path / 'run'} holds the batch_topk SAE of hf://other/saes@{oid}/deep/inside, read "
        f"as {format}: d_in=12, d_sae=48, k=5 (EleutherAI/pythia-70m, layer 3, resid_post).\n"
    )
    assert torch.equal(load_sae(tmp_path / "run").encode(some_x()), sae.encode(some_x()))
    assert not [line for line in hub.asked if "evil.py" in line]


def test_weights_longer_than_the_config_allows_are_not_fetched(
    hub: type[LocalHub], run: Path, tmp_path: Path
) -> None:
    push(run)
    large = save({"W_enc": torch.zeros(400_000)})
    hub.commit(REPO, files_of(hub) | {"sae.safetensors": large})
    hub.asked.clear()
    message = (
        rf"^sae\.safetensors of {PLACE} has 1,600,0\d\d bytes, more than the 1,058,\d\d\d that it "
        r"can have\. It was not fetched\.$"
    )
    with pytest.raises(InputError, match=message):
        load_sae(PLACE)
    assert not [line for line in hub.asked if "sae.safetensors" in line]
    folder = write_folder(make_sae("topk"), FACTS, "saelens", tmp_path / "saelens")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.commit("other/saes", files | {"sae_weights.safetensors": large})
    with pytest.raises(InputError, match=r"It was not fetched\.$"):
        import_from("hf://other/saes", tmp_path)


def import_from(address: str, tmp_path: Path) -> None:
    from sae_pipe.stages.sae_import import import_sae

    import_sae(address, tmp_path / "out", say=quiet)


def test_a_config_of_gigabytes_is_not_fetched(hub: type[LocalHub], run: Path) -> None:
    push(run)
    hub.commit(REPO, files_of(hub) | {"config.json": bytes((1 << 24) + 1)})
    message = (
        f"config.json of {PLACE} has 16,777,217 bytes, more than the 16,777,216 that it can have. "
        "It was not fetched."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_sae(PLACE)


def test_damage_is_found_before_a_pull_is_there(
    hub: type[LocalHub], run: Path, tmp_path: Path
) -> None:
    push(run)
    weights = files_of(hub)["sae.safetensors"]
    hub.commit(REPO, files_of(hub) | {"sae.safetensors": weights[:-100]})
    message = rf"^{PLACE}/sae\.safetensors is damaged: it is not a safetensors file \("
    with pytest.raises(StoreError, match=message):
        pull_sae(PLACE, tmp_path / "pulled", say=quiet)
    assert not (tmp_path / "pulled").exists()
    assert not list(tmp_path.glob(".pulled*"))


SENTENCES = {
    "hf://someone/gone": (
        "hf://someone/gone was not found on the Hub (or it is private, and `hf auth login` is "
        "needed). Check the spelling."
    ),
    "hf://someone/sae@v2": (
        "someone/sae has no revision 'v2' on the Hub. Pass a branch, a tag or a commit listed at "
        "https://huggingface.co/someone/sae/commits/main."
    ),
    "hf://someone/sae/nowhere": (
        "hf://someone/sae/nowhere holds no SAE of sae-pipe: it has no config.json. If it holds one "
        "of another tool, `sae-pipe import hf://someone/sae/nowhere --out RUN` makes a run of it."
    ),
    "hf://someone/sae/dictionary_learning": (
        "hf://someone/sae/dictionary_learning holds no SAE of sae-pipe: its config.json is that of "
        "something else. If it is one of another tool, `sae-pipe import "
        "hf://someone/sae/dictionary_learning --out RUN` makes a run of it."
    ),
    "hf://datasets/someone/acts": (
        "hf://datasets/someone/acts is not a model repository, and SAEs are kept in those. "
        "Pass hf://USER/REPO."
    ),
    "hf://someone": (
        "'hf://someone' is not an address of the Hub. Pass hf://USER/REPO, "
        "hf://USER/REPO@REVISION or hf://USER/REPO@REVISION/FOLDER."
    ),
    "hf://someone/sae/../../etc": (
        "'hf://someone/sae/../../etc' is not an address of the Hub. Pass hf://USER/REPO, "
        "hf://USER/REPO@REVISION or hf://USER/REPO@REVISION/FOLDER."
    ),
}


@pytest.mark.parametrize("address", SENTENCES)
def test_an_address_that_leads_nowhere_is_said_in_a_sentence(
    address: str, hub: type[LocalHub], run: Path
) -> None:
    push(run)
    with pytest.raises(InputError, match=f"^{re.escape(SENTENCES[address])}$"):
        load_sae(address)


def test_a_run_of_ours_is_not_imported(hub: type[LocalHub], run: Path, tmp_path: Path) -> None:
    push(run)
    message = (
        f"{PLACE} holds a run of sae-pipe, which needs no import. Fetch it with "
        f"`sae-pipe sae pull {PLACE} DIR`."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        import_from(PLACE, tmp_path)


def test_a_repository_without_an_sae_is_said(hub: type[LocalHub], tmp_path: Path) -> None:
    hub.commit("other/saes", {"a/cfg.json": b"{}", "a/sae_weights.safetensors": b""})
    message = (
        "hf://other/saes holds no SAE that is known by its files (cfg.json and "
        "sae_weights.safetensors; config.json and ae.pt; cfg.json and sae.safetensors; "
        "sae.safetensors; config.json and ae.pt). Pass the folder of one: hf://other/saes/FOLDER."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        import_from("hf://other/saes", tmp_path)


def test_who_may_not_write_is_told_so(
    hub: type[LocalHub], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = (
        "The Hub does not allow this for forbidden/sae (status 403). Run `hf auth login` with a "
        "token that has the right to."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        push(run, "hf://forbidden/sae")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(InputError, match=r"^hf://someone/sae was not found|status 401"):
        push(run)


def test_an_upload_that_breaks_off_is_told_and_nothing_is_published(
    hub: type[LocalHub], run: Path
) -> None:
    first = push(run)
    write_weights(make_sae("matryoshka, uneven weights"), run)
    hub.refuse_uploads = True
    with pytest.raises(
        NetworkError,
        match=r"^The upload to hf://someone/sae broke off \(Error while uploading '.*' to the Hub\.\)\. "
        r"Nothing of it is published; run the same command again\.$",
    ):
        push(run)
    assert first == f"{PLACE}@{hub.repos[REPO][-1][0]}"


def test_a_link_in_a_run_folder_is_not_followed(
    hub: type[LocalHub], run: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("of this machine")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "secret")
    message = (
        f"{run}/metrics.jsonl is a link, and what a run folder holds is published. Put the file "
        "itself there, or remove the link."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        push(run)
    assert hub.asked == []


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 5000, '{"l0": NaN}'])
def test_a_damaged_summary_is_told(text: str, hub: type[LocalHub], run: Path) -> None:
    (run / "summary.json").write_text(text)
    with pytest.raises(
        StoreError, match=rf"^{re.escape(str(run))}/summary\.json is damaged: it is "
    ):
        push(run)


def test_a_card_that_the_hub_refuses_is_told(hub: type[LocalHub], run: Path) -> None:
    hub.refuse_card = '"license" must be one of [...]'
    message = (
        'The Hub refuses the card (Invalid metadata in README.md. - "license" must be one of '
        "[...]). Pass another --license."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        push(run, licence="mine-1.0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"address": "hf://someone/sae@main"},
            "hf://someone/sae@main names a revision or a folder, and a push goes to the root of "
            "the main branch. Pass hf://someone/sae.",
        ),
        (
            {"formats": ("gguf",)},
            "Unknown format 'gguf' in --formats: choose from saelens, dictionary_learning, "
            "sparsify, safetensors, saebench.",
        ),
        (
            {"licence": "MIT\ntags: evil"},
            "--license is 'MIT\\ntags: evil', which is no identifier of a licence on the Hub. Pass "
            "one such as apache-2.0 or cc-by-4.0.",
        ),
    ],
)
def test_a_push_that_cannot_be_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        PushConfig(**{"run": Path("run"), "address": PLACE, **changes})


def test_an_address_has_a_revision_and_a_folder() -> None:
    found = parse_hub("hf://someone/sae@refs%2Fpr%2F1/a/b/")
    assert found == HubPlace(repo="someone/sae", revision="refs/pr/1", folder="a/b")
    assert found.inside("x.json") == "a/b/x.json"


def test_the_command_line_talks_to_the_hub_that_the_environment_names(
    run: Path, tmp_path: Path
) -> None:
    with serving() as address:
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        command = [str(Path(sys.executable).with_name("sae-pipe")), "sae"]
        for arguments in (["push", str(run), PLACE], ["pull", PLACE, str(tmp_path / "pulled")]):
            done = subprocess.run(
                command + arguments, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
    weights = "sae.safetensors"
    assert (tmp_path / "pulled" / weights).read_bytes() == (run / weights).read_bytes()
    shutil.rmtree(tmp_path / "home")


def test_a_published_sae_is_judged_inspected_and_reported_on(
    hub: type[LocalHub], store: Path, tmp_path: Path
) -> None:
    run, results = str(tmp_path / "run"), {}
    small = ["--l0", "4", "--d-sae", "48", "--batch-size", "512", "--device", "cpu"]
    judged = ["--metrics", "explained_variance,l0", "--no-baselines", "--store", str(store)]
    assert (
        CliRunner().invoke(app, ["fit", "--store", str(store), *small, "--out", run]).exit_code == 0
    )
    push(Path(run))
    for name, given in (("here", run), ("there", PLACE)):
        out = tmp_path / name
        result = CliRunner().invoke(app, ["eval", given, *judged, "--out", str(out)])
        assert result.exit_code == 0, result.stderr
        results[name] = json.loads(next(out.glob("*.json")).read_text())
        shown = CliRunner().invoke(app, ["inspect", given, "--store", str(store), "--count", "2"])
        assert shown.exit_code == 0, shown.stderr
        results[f"latents {name}"] = shown.stdout
    values = [[m["values"] for m in results[name]["metrics"]] for name in ("here", "there")]
    assert values[0] == values[1]
    assert results["latents here"] == results["latents there"]
    facts = results["there"]["run"]
    assert (facts["name"], facts["store"]) == ("sae", None)
    assert facts["path"] == f"{PLACE}@{hub.repos[REPO][-1][0]}"
    pages = ["report", str(tmp_path / "there"), "--store", str(store), "--latents", "2"]
    result = CliRunner().invoke(app, [*pages, "--out", str(tmp_path / "pages")])
    assert result.exit_code == 0, result.stderr
    assert list((tmp_path / "pages").rglob("*sae*.html"))
    shutil.rmtree(tmp_path / "there")
    result = CliRunner().invoke(app, ["inspect", PLACE])
    assert result.stderr == (
        f"Error: {PLACE} does not say which store it was fitted from. Pass --store.\n"
    )


def test_a_store_on_the_hub_is_named_by_the_published_sae(hub: type[LocalHub], run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["store"]["path"] = "hf://datasets/someone/acts/acts.zarr"
    (run / "config.json").write_text(json.dumps(config))
    push(run)
    files = files_of(hub)
    assert json.loads(files["config.json"])["store"]["path"] == config["store"]["path"]
    assert (
        "| activation store | hf\\://datasets/someone/acts/acts\\.zarr |"
        in files["README.md"].decode()
    )
