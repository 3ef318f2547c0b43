"""The command line as a user meets it: help, reference, one sentence for each mistake."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from sae_pipe.pipeline import cli_demo, reference
from sae_pipe.pipeline.cli import app
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.codecs import CODECS

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMANDS = dict(reference.commands(typer.main.get_command(app), "sae-pipe"))


def run(*args: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback is a bug of ours
    return result.exit_code, result.stdout, result.stderr


def refused(*args: object) -> str:
    """The one sentence of a refused command; a progress bar may stand before it."""
    code, _, stderr = run(*args)
    assert code == 2
    *bars, sentence = stderr.replace("\r", "\n").strip().split("\n")
    assert all("%|" in bar for bar in bars if bar)
    assert sentence.startswith("Error: ")
    return sentence.removeprefix("Error: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_every_option_says_what_it_does(name: str) -> None:
    code, stdout, _ = run(*name.split()[1:], "--help")
    assert code == 0
    assert "Usage: " in stdout
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_the_reference_in_the_docs_is_the_generated_one() -> None:
    assert (DOCS / "cli.md").read_text() == reference.markdown(), (
        "run: python -m sae_pipe.pipeline.reference > docs/cli.md"
    )


def test_help_lists_every_entry_of_the_registries() -> None:
    fit = run("fit", "--help")[1]
    harvest = run("harvest", "--help")[1]
    assert all(name in fit for name in ARCHITECTURES)
    assert all(name in harvest for name in CODECS)


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert run("--version") == (0, f"sae-pipe {version('sae-pipe')}\n", "")


# --- harvest ---


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "some words", "id": 3}\n')
    return file


def harvest_args(tmp_path: Path, **changes: Any) -> list[object]:
    options: dict[str, Any] = {
        "model": cli_demo.MODEL,
        "layer": 3,
        "dataset": cli_demo.TEXT,
        "out": tmp_path / "acts.zarr",
        "tokens": 1000,
        "device": "cpu",
    } | changes
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
    return ["harvest", *(part for pair in pairs for part in pair)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer": 6},
            f"Model {cli_demo.MODEL} has 6 layers, counted from 0, but layer 6 was asked for. "
            "Pass --layer from 0 to 5.",
        ),
        (
            {"mask_p": 1.2},
            "Mask probability 1.2 is outside [0, 1]. "
            "Pass --mask-p a number from 0 to 1, for example 0.3.",
        ),
        (
            {"context_size": 129},
            f"--context-size 129 is longer than the 128 tokens that model {cli_demo.MODEL} can "
            "take. Pass 128 or less.",
        ),
        ({"codec": "zip"}, "Unknown codec 'zip': choose one of compact, lossless, none."),
        (
            {"hook": "ln_f"},
            "Hook 'ln_f' is not known. Pass one of resid_post, resid_pre, mlp_out, attn_out.",
        ),
        (
            {"text_column": "body"},
            f"Text column 'body' is not in {cli_demo.TEXT}, whose columns are meta, meta.id, meta.source, text. "
            "Pass one of them as --text-column.",
        ),
        (
            {"mask_string": "of the"},
            f"Mask string 'of the' becomes the 2 tokens [1092, 260] with the tokenizer of "
            f"{cli_demo.MODEL}, but it has to be exactly one. Pass one of '...' (id 4095), "
            "'<|endoftext|>' (id 0) as --mask-string.",
        ),
        ({"tokens": 0}, "--tokens is 0, and has to be at least 1."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_harvest_refuses_in_one_sentence_and_writes_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert refused(*harvest_args(tmp_path, **changes)) == message
    assert not (tmp_path / "acts.zarr").exists()


def test_harvest_refuses_an_empty_dataset(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    message = refused(*harvest_args(tmp_path, dataset=tmp_path / "empty.jsonl"))
    assert message == (
        f"Dataset '{tmp_path}/empty.jsonl' holds no usable text: of 0 records, none was read. "
        "Pass another --dataset."
    )


def test_harvest_refuses_an_unknown_model(tmp_path: Path) -> None:
    assert refused(*harvest_args(tmp_path, model="pythonia-160m")) == (
        "Model name 'pythonia-160m' is not known. Known are names like pythia-160m, gpt2, "
        "gemma-2-2b, gemma-3-1b-pt, llama-3.2-1b, qwen2.5-0.5b, qwen3-0.6b, tinyllama_v1.1; pass "
        "one of them, a Hub id of the form owner/name, or a local folder."
    )


def test_harvest_says_what_became_of_the_records(tmp_path: Path) -> None:
    words = "In the beginning was the word, and the word was written on a small stone. "
    lines = [json.dumps({"text": words * (i + 1)}) for i in range(60)]
    unusable = ["not json", '{"text": ""}', '{"text": 3}', lines[0]]
    (tmp_path / "text.jsonl").write_text("\n".join([*unusable, *lines]) + "\n")
    options = {"dataset": tmp_path / "text.jsonl", "heldout_tokens": 200}
    code, stdout, _ = run(*harvest_args(tmp_path, **options))
    assert code == 0
    assert [line for line in stdout.splitlines() if line.startswith("text ")] == [
        "text      12 documents used of 64 records read; "
        "left out: 1 duplicate, 1 empty, 1 malformed JSON, 48 more than needed, 1 not text"
    ]


@pytest.mark.usefixtures("no_hub")
def test_harvest_without_network_says_how_to_use_a_local_folder(tmp_path: Path) -> None:
    assert refused(*harvest_args(tmp_path, model="pythia-160m")) == (
        "Model EleutherAI/pythia-160m could not be fetched from the Hub: no network, or the Hub "
        "does not answer. Fetch it on a machine that has network with `hf download "
        "EleutherAI/pythia-160m --local-dir DIR`, copy DIR here and pass --model DIR."
    )
    assert refused(*harvest_args(tmp_path, dataset="pile-cc")) == (
        "Dataset monology/pile-uncopyrighted could not be reached on the Hub: no network, or the "
        "Hub does not answer. Pass local text instead: --dataset FILE, a folder or a glob of "
        ".jsonl, .jsonl.zst, .jsonl.gz, .parquet or .txt files."
    )


# --- fit ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--arch", "dense"],
            "Unknown architecture 'dense': choose one of batch_topk, gated, jumprelu, matryoshka, p_anneal, relu, topk.",
        ),
        (
            ["--d-sae", "20"],
            "--l0 20 must be smaller than --d-sae 20: an SAE that keeps every latent is not "
            "sparse. Pass a smaller --l0.",
        ),
        (
            ["--tokens", "100"],
            "A run of 100 tokens is less than one batch of 2048. "
            "Pass more --tokens or a smaller --batch-size.",
        ),
    ],
)
def test_fit_refuses_in_one_sentence(
    small_store: ActivationStore, tmp_path: Path, options: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert (
        refused("fit", "--store", small_store.path, "--l0", 20, "--out", out, *options) == message
    )
    assert not out.exists()


def damaged_copy(store: ActivationStore, folder: Path, **changes: Any) -> Path:
    copy = folder / "copy.zarr"
    shutil.copytree(store.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text()) | changes
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def fit_refusal(store: Path) -> str:
    return refused("fit", "--store", store, "--l0", 4, "--d-sae", 32)


def test_fit_refuses_a_store_that_is_not_there(tmp_path: Path) -> None:
    assert fit_refusal(tmp_path / "acts.zarr") == (
        f"There is no store at {tmp_path}/acts.zarr. "
        "Pass the folder that `sae-pipe harvest --out` wrote, such as acts.zarr."
    )


def test_fit_refuses_a_folder_that_is_no_store(tmp_path: Path) -> None:
    assert fit_refusal(tmp_path) == (
        f"{tmp_path} is not an activation store: it has no manifest.json. "
        "Pass the folder that `sae-pipe harvest --out` wrote."
    )


def test_fit_refuses_a_store_from_the_future(small_store: ActivationStore, tmp_path: Path) -> None:
    store = damaged_copy(small_store, tmp_path, format_version=2)
    assert fit_refusal(store) == (
        f"Store {store} has format version 2, and this sae-pipe reads up to 1. "
        "Upgrade it: pip install --upgrade sae-pipe."
    )


def test_fit_refuses_a_truncated_store(small_store: ActivationStore, tmp_path: Path) -> None:
    store = damaged_copy(small_store, tmp_path)
    shard = store / "activations/c/1/0"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:1000])
    assert fit_refusal(store) == (
        f"Shard 1 of {store} is damaged: activations/c/1/0: it has 1,000 bytes instead of "
        f"{size:,}. Run `sae-pipe store repair {store}`: it makes damaged files again and touches "
        "nothing else."
    )


def test_fit_refuses_a_manifest_that_is_cut_off(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    store = damaged_copy(small_store, tmp_path)
    (store / "manifest.json").write_text('{"format": "sae')
    assert fit_refusal(store) == (
        f"{store}/manifest.json is damaged: it is not JSON (Unterminated string starting at: "
        "line 1 column 12 (char 11)). Fetch or harvest the store again."
    )


def test_fit_refuses_to_write_into_a_store(small_store: ActivationStore, tmp_path: Path) -> None:
    store = damaged_copy(small_store, tmp_path)
    before = sorted(store.rglob("*"))
    fit = ["fit", "--store", store, "--l0", 4, "--d-sae", 32]
    assert refused(*fit, "--out", store) == (
        f"{store} exists and is not a run of sae-pipe. Pass another --out, or move it away."
    )
    assert sorted(store.rglob("*")) == before


def test_inspect_refuses_a_store_of_another_width(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    from .conftest import write_store

    run_folder = tmp_path / "run"
    fit = ["fit", "--store", small_store.path, "--l0", 4, "--d-sae", 32, "--batch-size", 512]
    code, stdout, _ = run(*fit, "--arch", "topk", "--out", run_folder)
    assert code == 0
    assert f"Weights, curve and metrics are in {run_folder}." in stdout
    import numpy as np

    other = write_store(
        tmp_path / "wide.zarr", np.ones((64, 24), np.float32), np.ones((8, 24), np.float32)
    )
    assert refused("inspect", run_folder, "--store", other.path) == (
        f"Store {other.path} has d_in=24, but the SAE expects 16. "
        "Pass the store that it was fitted from."
    )
    assert refused("inspect", run_folder, "--latent", 32) == (
        "Latent 32 does not exist: the SAE has latents 0 to 31."
    )
    for option in ("--rows", "--count", "--examples"):
        for value in (0, -1):
            message = refused("inspect", run_folder, option, value)
            assert message == f"{option} must be at least 1, not {value}."


# --- the main job, smaller ---


def test_the_demo_harvests_fits_compares_and_shows_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_demo, "TOKENS", 12_000)
    monkeypatch.setattr(cli_demo, "HELDOUT_TOKENS", 1000)
    monkeypatch.setattr(cli_demo, "D_SAE", 128)
    code, stdout, _ = run("demo", "--out", tmp_path / "demo")
    assert code == 0
    assert "sae-pipe harvest --model pythia-160m --layer 8 --mask-p 0.3" in stdout
    assert "acts-layer3-p0-matryoshka-l0_20" in stdout
    assert stdout.count("fires on ") == 2 * cli_demo.LATENTS
    summaries = [
        json.loads(
            (tmp_path / f"demo/runs/acts-layer3-{p}-matryoshka-l0_20/summary.json").read_text()
        )
        for p in ("p0", "p0.3")
    ]
    note = cli_demo.about_l0(*(summary["l0"] for summary in summaries))
    assert ("Both were fitted for L0 20" in stdout) == bool(note)
    assert note in stdout
    store = open_store(tmp_path / "demo/acts-layer3-p0.3.zarr")
    assert store.n_rows == 12_000
    code, stdout, _ = run("store", "info", store.path)
    assert code == 0
    assert "resid_post of layer 3" in stdout
    assert "p = 0.3 with '...' (id 4095)" in stdout
    assert run("store", "verify", store.path)[0] == 0
    assert json.loads(run("store", "info", store.path, "--json")[1])["digest"] == store.digest
    runs = tmp_path / "demo/runs/acts-layer3-p0.3-matryoshka-l0_20"
    assert {"config.json", "sae.safetensors", "metrics.jsonl", "summary.json", "curve.png"} <= {
        file.name for file in runs.iterdir()
    }


L0_NOTE = (
    "\nBoth were fitted for L0 20, the second on masked rows but judged here on unmasked ones, "
    "where its threshold lets {} latents through than the first's; explained variance at different "
    "L0 is not a like-for-like comparison.\n"
)


@pytest.mark.parametrize(
    ("unmasked", "masked", "note"),
    [
        (20.6, 34.4, L0_NOTE.format("more")),
        (20.0, 24.1, L0_NOTE.format("more")),
        (20.0, 24.0, ""),
        (20.0, 17.0, ""),
        (20.0, 16.0, L0_NOTE.format("fewer")),
        (0.0, 0.0, ""),
        (None, None, ""),
    ],
)
def test_the_demo_says_when_two_l0_cannot_be_compared(
    unmasked: float | None, masked: float | None, note: str
) -> None:
    assert cli_demo.about_l0(unmasked, masked) == note


def test_verify_names_every_file_that_is_damaged_and_says_what_to_do(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    store = damaged_copy(small_store, tmp_path)
    flipped, cut = store / "activations/c/2/0", store / "source/c/1"
    data = bytearray(flipped.read_bytes())
    data[100] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:10])
    size = small_store.manifest["train"]["shards"][1]["files"]["source"]["bytes"]
    (store / "heldout/activations/c/0/0").unlink()
    (store / "zarr.json").write_text("{}")
    code, stdout, stderr = run("store", "verify", store)
    assert code == 2
    assert [
        line.split("  ")[0] + line[line.rindex("  ") :] for line in stdout.splitlines()[2:]
    ] == [
        f"source/c/1  it was cut off: it has 10 bytes instead of {size:,}",
        "activations/c/2/0  its SHA-256 is not the recorded one",
        "heldout/activations/c/0/0  it is missing",
        "zarr.json  it was cut off: it has 2 bytes instead of "
        f"{small_store.manifest['files']['zarr.json']['bytes']:,}",
    ]
    assert stderr.splitlines()[-1] == (
        f"Error: Store {store} is damaged: 4 of 30 files. Fetch those files again, or import or "
        "recode the store again."
    )
