"""The card of a store: true to the manifest, never over somebody's own, harmless whatever a name is."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.address import Address, place
from sae_pipe.storage.card import README, card, is_generated, size_category, write_card
from sae_pipe.storage.licences import HUB_ID, is_identifier, of_model, of_text
from sae_pipe.storage.manifest import began_by, read_manifest
from sae_pipe.storage.pull import Part, pull
from sae_pipe.storage.push import push
from sae_pipe.storage.recode import recode
from sae_pipe.storage.verify import is_harvested

from .services import BUCKET, S3


def said_by(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["store", "card", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def front_matter(text: str) -> dict[str, Any]:
    """As the Hub's client reads it."""
    data: Any = huggingface_hub.DatasetCard(text).data
    found: dict[str, Any] = data.to_dict()
    return found


def quiet(line: str) -> None:
    """Nothing is printed."""


def test_a_harvested_store_has_a_card_of_what_its_manifest_says(store: Path) -> None:
    manifest, text = read_manifest(store), (store / README).read_text()
    assert text == card(manifest) == said_by(str(store))
    assert is_generated(text)
    recipe = manifest["recipe"]
    for part in (
        f"{manifest['train']['layout']['n_rows']:,} training rows",
        f"{manifest['heldout']['layout']['n_rows']:,} held-out rows of 32 values",
        f"| layer, hook point | {recipe['layer']}, resid\\_post |",
        "| input masking | each token replaced by ' the' with p \\= 0\\.3; held\\-out rows are not",
        "| text | text\\.jsonl |",
        f"| digest | {manifest['digest']} |",
        f"by its digest: `{manifest['digest']}`",
        f"- the model: not recorded; see where {recipe['model']['name']} was published",
        "- the text, whose tokens are stored with the rows: not recorded",
    ):
        assert part in text
    # Neither times nor machines: equal stores have equal cards.
    made = manifest["provenance"]
    assert made["finished"] not in text
    assert made["runs"][0]["hardware"]["processor"] not in text


def test_the_hub_reads_what_stands_on_top(store: Path) -> None:
    manifest = read_manifest(store) | {"licence": "cc-by-4.0"}
    manifest["recipe"]["model"]["name"] = "EleutherAI/pythia-160m"
    data = front_matter(card(manifest))
    assert data == {
        "pretty_name": "Activations of EleutherAI/pythia-160m, layer 1, resid_post",
        "license": "cc-by-4.0",
        "base_model": "EleutherAI/pythia-160m",
        "tags": ["sparse-autoencoder", "activations", "sae-pipe"],
        "size_categories": ["1K<n<10K"],
        "viewer": False,
    }
    assert "license" not in front_matter(card(read_manifest(store)))


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (5e8, "100M<n<1B"), (1e12, "n>1T")],
)
def test_sizes_have_the_names_of_the_hub(rows: float, category: str) -> None:
    assert size_category(rows) == category


def test_copies_and_parts_say_of_what(store: Path, tmp_path: Path) -> None:
    given = open_store(store)
    recode(store, tmp_path / "copy.zarr", "compact", say=quiet)
    recode(tmp_path / "copy.zarr", tmp_path / "again.zarr", "none", say=quiet)
    pull(store, tmp_path / "part.zarr", Part(rows=600), say=quiet)
    copy, part = ((tmp_path / name / README).read_text() for name in ("copy.zarr", "part.zarr"))
    again, digest = (
        (tmp_path / "again.zarr" / README).read_text(),
        open_store(tmp_path / "copy.zarr").digest,
    )
    assert "| rounded before as | compact\\:0\\.25 in bfloat16 |" in again
    assert f"| in the store | copy\\.zarr, digest {digest} |" in again
    assert "rounded before as" not in copy  # as a harvest with that codec would have it
    error = read_manifest(tmp_path / "copy.zarr")["encoding"]["error"]["relative"]
    assert f"; {error:.3g} of the variance is lost |".replace(".", "\\.", 1) in copy
    assert "zarr 3.1.6 or newer and numcodecs" in copy
    assert f"| a part of | acts\\.zarr, digest {given.digest} |" in part
    assert (
        f"{read_manifest(tmp_path / 'part.zarr')['train']['layout']['n_rows']:,} training" in part
    )
    assert is_generated(copy)
    assert is_generated(part)


def test_an_imported_store_says_from_what(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((600, 8)).astype("f4") + 3
    np.save(tmp_path / "acts.npy", rows)
    command = ["store", "import", str(tmp_path / "acts.npy"), "--out", str(tmp_path / "a.zarr")]
    assert CliRunner().invoke(app, [*command, "--model", "gpt2", "--layer", "3"]).exit_code == 0
    text = (tmp_path / "a.zarr" / README).read_text()
    assert "| imported from | acts\\.npy \\(npy\\) |" in text
    assert "- the model: MIT, as far as is known; see where gpt2 was published" in text
    assert "- the text: not recorded" in text


def test_a_readme_of_ones_own_is_never_written_over(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    file, manifest = copy / README, read_manifest(copy)
    edited = file.read_text().replace("## Cite it", "## Cite us")
    for own in ("mine\n", edited, edited.replace("Cite us", "Cite\x1b"), "\udcff"):
        file.write_text(own, errors="surrogateescape")
        before = file.read_bytes()
        assert not write_card(copy, manifest)
        assert said_by(str(copy), "--write") == f"{file} is your own, and stays as it is.\n"
        assert file.read_bytes() == before
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert not write_card(copy, manifest)
    file.unlink()
    # An old store gets one; one that an earlier version wrote in other words is written anew.
    assert said_by(str(copy), "--write") == f"{file} is written.\n"
    assert file.read_text() == card(manifest)


def test_a_licence_is_noted_in_the_manifest_and_in_the_card(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    assert "- these rows: not chosen yet" in said_by(str(copy))
    said_by(str(copy), "--license", "cc-by-4.0")
    assert open_store(copy).digest == small_store.digest
    assert read_manifest(copy)["licence"] == "cc-by-4.0"
    assert "- these rows: cc-by-4.0\n" in (copy / README).read_text()
    assert CliRunner().invoke(app, ["store", "verify", str(copy)]).exit_code == 0
    recode(copy, tmp_path / "compact.zarr", "compact", say=quiet)
    assert "- these rows: cc-by-4.0\n" in (tmp_path / "compact.zarr" / README).read_text()
    result = CliRunner().invoke(app, ["store", "card", str(copy), "--license", "Mine: all"])
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: --license is 'Mine: all', which is no identifier of a licence on the Hub. Pass one "
        "such as apache-2.0 or cc-by-4.0.\n"
    )
    result = CliRunner().invoke(app, ["store", "card", "s3://lab/a.zarr", "--write"])
    assert result.stderr.startswith(
        "Error: A card is written into a folder, and s3://lab/a.zarr is"
    )


def test_known_licences_are_those_of_the_family_and_others_are_not_guessed() -> None:
    for name, licence in (
        ("EleutherAI/pythia-160m-deduped", "Apache-2.0"),
        ("openai-community/gpt2-xl", "MIT"),
        ("google/gemma-2-2b", "Gemma Terms of Use"),
        ("google/gemma-3-1b-pt", "Gemma Terms of Use"),
        ("meta-llama/Llama-3.2-1B", "Llama 3.2 Community License"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Apache-2.0"),
        ("Qwen/Qwen2.5-3B", None),
        ("someone/pythia-160m", None),
        ("EleutherAI/gpt-j-6b", None),
        ("demo_model", None),
    ):
        assert of_model(name) == licence
    for name, part in (
        ("monology/pile-uncopyrighted", "under the terms of those"),
        ("allenai/c4:en", "ODC-By 1.0"),
        ("Salesforce/wikitext:wikitext-103-raw-v1", "CC BY-SA 3.0"),
    ):
        assert part in (of_text(name) or "")
    assert of_text("someone/else") is None
    assert HUB_ID.fullmatch("EleutherAI/pythia-160m")
    assert not is_identifier("mit\nlicense: other")


HOSTILE = "a\n---\nlicense: mit\n# big\r\x1b[31m`x`|<script>\u202e[y](http://z)"


def test_names_stay_text(store: Path) -> None:
    manifest = read_manifest(store)
    manifest["recipe"]["model"] = {"name": HOSTILE, "revision": HOSTILE}
    manifest["recipe"]["mask"]["string"] = HOSTILE
    manifest["recipe"]["corpus"]["source"]["parts"] = [{"dataset": HOSTILE, "revision": HOSTILE}]
    manifest |= {"licence": HOSTILE, "codec": HOSTILE, "digest": HOSTILE}
    text = card(manifest)
    assert text.isascii() or all(c.isprintable() or c == "\n" for c in text)
    assert "<script>" not in text
    assert "](http" not in text
    assert set(front_matter(text)) == {
        "pretty_name", "tags", "size_categories", "viewer"
    }  # fmt: skip
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in headings if not line.startswith("# ")] == [
        "## What it holds", "## How it was made", "## Read it", "## Licence", "## Cite it"
    ]  # fmt: skip
    assert len(text.splitlines()) == len(card(read_manifest(store)).splitlines())


@pytest.mark.parametrize("licence", ["no", "null", "1.0", "0x10", "cc-by-4.0"])
def test_a_licence_and_an_emoji_are_text_in_yaml(store: Path, licence: str) -> None:
    manifest = read_manifest(store) | {"licence": licence}
    manifest["recipe"]["model"]["name"] = "lab/\N{GRINNING FACE}-160m"
    text = card(manifest)
    text.encode()
    data = front_matter(text)
    assert data["license"] == licence
    assert data["pretty_name"] == "Activations of lab/\N{GRINNING FACE}-160m, layer 1, resid_post"


def test_a_readme_that_is_a_pipe_is_left_alone(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    (copy / README).unlink()
    os.mkfifo(copy / README)
    assert said_by(str(copy), "--write") == f"{copy / README} is your own, and stays as it is.\n"


@pytest.mark.parametrize("provenance", [5, None, [], "sampled", {"sampled": 5}])
def test_a_provenance_of_any_form_is_shown_and_copied(
    small_store: ActivationStore, tmp_path: Path, provenance: object
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    manifest = json.loads((copy / "manifest.json").read_text()) | {"provenance": provenance}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert said_by(str(copy)) == card(manifest)
    assert began_by(manifest) == ("store pull" if isinstance(provenance, dict) else "harvest")
    assert not is_harvested(manifest)
    pull(copy, tmp_path / "pulled.zarr", say=quiet)
    assert open_store(tmp_path / "pulled.zarr").digest == small_store.digest


PATHS = (
    "recipe", "recipe.model", "recipe.model.name", "recipe.hook", "recipe.layer", "recipe.mask",
    "recipe.mask.p", "recipe.mask.string", "recipe.corpus.source.parts", "recipe.imported", "codec",
    "encoding", "encoding.error", "train", "train.layout.n_rows", "train.layout.d_in", "heldout",
    "statistics", "provenance", "provenance.versions", "provenance.recoded", "digest", "licence",
)  # fmt: skip
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=2) | st.just({"name": HOSTILE, "relative": "1"})


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), _VALUES), max_size=4))
def test_whatever_a_manifest_says_there_is_a_card(
    small_store: ActivationStore, changes: list[tuple[str, Any]]
) -> None:
    manifest = json.loads(json.dumps(small_store.manifest))
    for path, value in changes:
        *parents, name = path.split(".")
        at: Any = manifest
        for parent in parents:
            at = at.setdefault(parent, {}) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at[name] = value
    text = card(manifest)
    assert is_generated(text)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "<script>" not in text
    data = front_matter(text)
    assert data["tags"] == ["sparse-autoencoder", "activations", "sae-pipe"]


def in_bucket(s3: S3, name: str) -> str:
    client = s3.client()
    found = client.get_object(Bucket=BUCKET, Key=name)["Body"].read().decode()
    client.close()
    return str(found)


def test_a_push_sends_the_card_before_the_manifest_and_the_last_push_wins(
    s3: S3, small_store: ActivationStore, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    (copy / README).unlink()  # a store from before there were cards
    where = place("s3://lab/carded.zarr")
    assert isinstance(where, Address)
    before = len(s3.requests("PUT"))
    push(copy, where, say=quiet)
    assert s3.requests("PUT")[before:][-2:] == [
        "carded.zarr/README.md", "carded.zarr/manifest.json"
    ]  # fmt: skip
    assert in_bucket(s3, "carded.zarr/README.md") == card(small_store.manifest)
    assert said_by("s3://lab/carded.zarr") == card(small_store.manifest)
    (copy / README).write_text("ours")
    push(copy, where, say=quiet)
    assert in_bucket(s3, "carded.zarr/README.md") == "ours"
    said: list[str] = []
    push(small_store.path, where, say=said.append)  # a card, which does not replace what is own
    assert said[0] == "s3://lab/carded.zarr/README.md is somebody's own, and stays as it is."
    assert in_bucket(s3, "carded.zarr/README.md") == "ours"
    pull(where, tmp_path / "back.zarr", say=quiet)
    assert (tmp_path / "back.zarr" / README).read_text() == card(small_store.manifest)


def test_an_unfinished_store_has_no_card(small_store: ActivationStore, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_store.path, tmp_path / "copy.zarr"))
    manifest = copy / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"state": "complete"', '"state": "harvesting"')
    )
    for flags in ([], ["--write"]):
        result = CliRunner().invoke(app, ["store", "card", str(copy), *flags])
        assert re.match(r"Error: Store .* is not finished: its state is 'harv", result.stderr)
    assert not (copy / ".lock").exists() or (small_store.path / ".lock").exists()
