"""A harvest and the catalogue: a recipe that is there already, and tokens that can be taken."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig, request_of, targets
from sae_pipe.stages.harvest_remote import asked_for, harvest_anywhere, spooled
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import DiskError, NetworkError, StoreError, list_stores, open_store
from sae_pipe.storage.address import Address, Place
from sae_pipe.storage.catalogue import CATALOG
from sae_pipe.storage.corpus import CORPUS_JSON, Corpus, corpus_digest
from sae_pipe.storage.files import file_digest
from sae_pipe.storage.manifest import HARVESTING, MANIFEST, content_digest
from sae_pipe.storage.provenance import OWNER
from sae_pipe.storage.pull import Part, pull
from sae_pipe.storage.remote import Link

from .harvesting import config_for, content
from .services import S3


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(OWNER, "ann")
    monkeypatch.delenv(CATALOG, raising=False)


@pytest.fixture
def lab(store: Path, tmp_path: Path) -> Path:
    """A catalogue with the store of `config_for`, which Ann has made."""
    shutil.copytree(store, tmp_path / "lab/ann/acts.zarr")
    change(tmp_path / "lab/ann/acts.zarr", owner="ann", finished="2026-11-20T10:00:00+00:00")
    return tmp_path / "lab"


def change(store: Path, **made: Any) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((store / MANIFEST).read_text())
    manifest["provenance"] |= made
    (store / MANIFEST).write_text(json.dumps(manifest))
    return manifest


def of_the_hub(store: Path) -> None:
    """As if the text of a store had come from the Hub, at some commit."""
    file = store / "corpus" / CORPUS_JSON
    info = json.loads(file.read_text())
    part = {"dataset": "some/text", "subset": None, "split": "train", "revision": "0" * 40}
    source = {"kind": "hub", "parts": [part], "text_column": "text", "filter": None}
    info["recipe"]["source"] = source
    info["digest"] = corpus_digest(info)
    file.unlink()  # it may be shared
    file.write_text(json.dumps(info))
    manifest = json.loads((store / MANIFEST).read_text())
    manifest["recipe"]["corpus"]["source"] = source
    manifest["corpus"]["digest"] = info["digest"]
    entry = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    manifest["files"][f"corpus/{CORPUS_JSON}"] = entry
    manifest["digest"] = content_digest(manifest)
    (store / MANIFEST).write_text(json.dumps(manifest))


def hub_config(lm: Path, out: Path, catalog: Place) -> HarvestConfig:
    """Another mask ratio of the text that `of_the_hub` speaks of."""
    config = config_for(lm, Path("unused"), out, mask_p=(0.2,), catalog=catalog)
    return replace(config, text=TextConfig(dataset="some/text"))


def ran(config: HarvestConfig, **options: Any) -> tuple[list[Place], list[str]]:
    """Where the stores are, and what was said."""
    said: list[str] = []
    return harvest_anywhere(config, say=said.append, **options), said


def held(lab: Path) -> str:
    return (
        f"{lab}/ann/acts.zarr already holds this recipe, made by ann on 2026-11-20; fit from it, or "
        "pass --again."
    )


# --- the recipe ---


def test_a_recipe_that_the_catalogue_holds_is_not_harvested_again(
    lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "mine/acts.zarr", catalog=lab)
    for options in ({}, {"dry_run": True}):
        assert ran(config, **options) == ([lab / "ann/acts.zarr"], [held(lab)])
    # Where and how fast it would be made is not part of it.
    assert ran(replace(config, block_bytes=10**6, batch_contexts=4))[1] == [held(lab)]
    # Many workers are not started for it.
    assert ran(replace(config, workers=2))[1] == [held(lab)]
    assert not (tmp_path / "mine").exists()


def test_the_command_says_so_with_an_exit_code_of_its_own_and_again_harvests_all_the_same(
    lm: Path, text: Path, lab: Path, tmp_path: Path, store: Path
) -> None:
    command = [
        "harvest", "--model", str(lm), "--layer", "1", "--dataset", str(text), "--tokens", "6000",
        "--heldout-tokens", "300", "--mask-string", " the", "--mask-p", "0.3", "--device", "cpu",
        "--batch-contexts", "8", "--out", str(tmp_path / "acts.zarr"), "--catalog", str(lab),
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stdout, result.stderr) == (3, held(lab) + "\n", "")
    assert not (tmp_path / "acts.zarr").exists()
    result = CliRunner().invoke(app, [*command, "--again"])
    assert result.exit_code == 0, result.stderr
    mine = open_store(tmp_path / "acts.zarr")
    assert mine.recipe == open_store(store).recipe
    assert mine.manifest["provenance"]["owner"] == "ann"
    assert {"catalog", "again"}.isdisjoint(mine.manifest["request"])
    # Once it is there, what the catalogue holds does not matter.
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert result.stdout == (
        f"{tmp_path}/acts.zarr is complete: 6,000 rows of this recipe. Nothing to do.\n"
    )


def test_of_several_stores_only_those_are_harvested_that_the_catalogue_does_not_hold(
    lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    config = config_for(
        lm, text, tmp_path / "acts.zarr", mask_p=(0.3, 0.0), layers=(1,), catalog=lab
    )
    there, said = ran(config)
    assert there == [lab / "ann/acts.zarr", tmp_path / "acts-layer1-p0.zarr"]
    assert asked_for(config)[1] == there[1]
    assert held(lab) in said
    assert not (tmp_path / "acts-layer1-p0.3.zarr").exists()
    assert open_store(there[1]).recipe["mask"]["p"] == 0.0


def test_what_was_begun_here_goes_on_whatever_the_catalogue_holds(
    lm: Path, text: Path, lab: Path, tmp_path: Path, store: Path
) -> None:
    begun = Path(shutil.copytree(store, tmp_path / "acts.zarr"))
    manifest = json.loads((begun / MANIFEST).read_text()) | {"state": HARVESTING}
    (begun / MANIFEST).write_text(json.dumps(manifest))
    there, said = ran(config_for(lm, text, begun, catalog=lab))
    assert there == [begun]
    assert said[0] == f"{begun} goes on: 0 of 12 shards are sealed"
    assert content(begun) == content(store)


def test_a_store_that_a_colleague_is_making_is_told_of(
    lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    theirs = lab / "ann/acts.zarr"
    manifest = change(theirs, runs=[{"started": "2026-11-21T09:00:00+00:00"}])
    (theirs / MANIFEST).write_text(json.dumps(manifest | {"state": HARVESTING}))
    there, said = ran(config_for(lm, text, tmp_path / "acts.zarr", catalog=lab))
    assert there == [tmp_path / "acts.zarr"]
    assert said[0] == (
        f"catalogue {theirs} is being made from this recipe, begun by ann on 2026-11-21 "
        "(0 of 12 shards). This harvest goes on beside it."
    )
    # Its tokens are made already.
    assert f"tokens    those of {theirs}, which has the same text" in said


def test_a_part_of_a_store_does_not_hold_its_recipe(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    pull(store, tmp_path / "lab/part.zarr", Part(fraction=0.1), say=lambda line: None)
    (entry,) = list_stores(tmp_path / "lab")
    assert entry.is_sampled
    there, _ = ran(config_for(lm, text, tmp_path / "acts.zarr", catalog=tmp_path / "lab"))
    assert there == [tmp_path / "acts.zarr"]


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (Path("no-such-folder"), "There is no folder no-such-folder. Pass one that holds stores."),
        pytest.param(
            Address("gs://lab/stores"),
            "gs:// addresses need gcsfs, which is not installed. Run: pip install 'sae-pipe[gcs]'.",
            marks=pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed"),
        ),
    ],
)
def test_a_catalogue_that_cannot_be_searched_stops_no_harvest(
    where: Place, why: str, lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", catalog=where)
    there, said = ran(config, dry_run=True)
    assert there == [tmp_path / "acts.zarr"]
    assert said[0] == (
        f"catalogue {where} could not be searched, so the harvest goes on without: {why}"
    )


def test_an_address_that_is_none_is_refused_before_anything_is_looked_at(lm: Path) -> None:
    command = ["harvest", "--model", str(lm), "--layer", "1", "--catalog", "s3://key:secret@lab/x"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: An address holds no password, signature or other query")
    assert "secret" not in result.stderr


# --- the tokens ---


def test_another_recipe_on_the_same_text_takes_its_tokens_from_the_catalogue(
    lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    config = config_for(
        lm, text, tmp_path / "mine/acts.zarr", mask_p=(0.2,), layers=(0,), catalog=lab
    )
    there, said = ran(config)
    assert there == [tmp_path / "mine/acts.zarr"]
    assert f"tokens    those of {lab}/ann/acts.zarr, which has the same text" in said
    theirs, own = (at / "corpus/train/tokens/c/0/0" for at in (lab / "ann/acts.zarr", config.out))
    assert theirs.stat().st_ino == own.stat().st_ino  # linked, not copied
    alone = harvest(
        replace(config, out=tmp_path / "alone/acts.zarr", catalog=None), say=lambda line: None
    )
    assert content(config.out) == content(alone[0])


@pytest.mark.usefixtures("no_hub")
def test_a_hub_dataset_is_not_opened_when_the_catalogue_has_its_tokens(
    lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    of_the_hub(lab / "ann/acts.zarr")
    config = hub_config(lm, tmp_path / "mine/acts.zarr", lab)
    there, said = ran(config)
    assert f"tokens    those of {lab}/ann/acts.zarr, which has the same text" in said
    theirs = open_store(lab / "ann/acts.zarr").source(slice(None))
    for found, expected in zip(open_store(there[0]).source(slice(None)), theirs, strict=True):
        np.testing.assert_array_equal(found, expected)
    # The recipe itself is found without the text, too.
    other = replace(config, out=tmp_path / "other/acts.zarr")
    assert ran(replace(other, mask_p=(0.3,)))[1] == [held(lab)]
    # Other tokens are not to be had.
    for asked in (replace(other, tokens=5000), replace(other, seed=1)):
        with pytest.raises(NetworkError, match=r"^Dataset some/text could not be reached on the "):
            ran(asked)


@pytest.mark.usefixtures("no_hub")
def test_tokens_of_a_store_in_a_bucket_are_fetched_compared_and_taken(
    s3: S3, lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    of_the_hub(lab / "ann/acts.zarr")
    place = Address(s3.put(lab, "lent-tokens"))
    there = Address(f"{place}/ann/acts.zarr")
    config = hub_config(lm, tmp_path / "mine/acts.zarr", place)
    before = len(s3.requests("GET"))
    _, said = ran(config)
    assert f"tokens    those of {there}, which has the same text" in said
    reads = [path for path in s3.requests("GET")[before:] if "acts.zarr/" in path]
    assert not [path for path in reads if "/activations/" in path or "/source/" in path]
    theirs, own = Corpus(lab / "ann/acts.zarr/corpus"), Corpus(tmp_path / "mine/acts.zarr/corpus")
    own.verify()
    assert own.digest == theirs.digest
    # The recipe that is there is not harvested, and the address is where it can be fitted from.
    again = replace(config, mask_p=(0.3,), out=tmp_path / "other/acts.zarr")
    assert ran(again) == ([there], [held(lab).replace(str(lab), str(place))])
    # Spooled to the bucket it is the same.
    out = Address(f"{place}/bob/acts.zarr")
    to_bucket = replace(again, **spooled(out))
    where, said = ran(to_bucket)
    assert where == [there]
    assert said[-1] == held(lab).replace(str(lab), str(place))
    assert asked_for(to_bucket) == [out]
    assert not [path for path in s3.requests("PUT") if "/bob/" in path]


@pytest.mark.usefixtures("no_hub")
def test_tokens_that_are_damaged_in_the_bucket_are_not_taken(
    s3: S3, lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    of_the_hub(lab / "ann/acts.zarr")
    name = "corpus/heldout/document/c/0/0"
    file = lab / "ann/acts.zarr" / name
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    place = Address(s3.put(lab, "damaged-tokens"))
    config = hub_config(lm, tmp_path / "acts.zarr", place)
    message = (
        rf"^The tokens of {place}/ann/acts\.zarr cannot be taken from there: {place}/ann/acts\.zarr/"
        r"corpus/heldout/document/c/0/0 has other bytes than the manifest records, also when it is "
        r"asked for again\. Push or harvest the store again\. Run the same command again, or with "
        r"--catalog '' to make them anew\.$"
    )
    with pytest.raises(StoreError, match=message):
        ran(config)
    assert not (tmp_path / "acts.zarr/corpus").exists()
    # The same command goes on, and takes them where they are whole by now.
    Link(place).put_bytes(whole, f"ann/acts.zarr/{name}")
    assert f"tokens    those of {place}/ann/acts.zarr, which has the same text" in ran(config)[1]
    Corpus(tmp_path / "acts.zarr/corpus").verify()


def test_tokens_of_the_catalogue_that_are_damaged_are_passed_over(
    lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    (lab / "ann/acts.zarr/corpus/train/tokens/c/0/0").unlink()
    _, said = ran(config_for(lm, text, tmp_path / "a.zarr", mask_p=(0.2,), catalog=lab))
    assert not [line for line in said if line.startswith("tokens ")]
    Corpus(tmp_path / "a.zarr/corpus").verify()


def test_where_is_looked_does_not_decide_about_a_recipe(lm: Path, text: Path, lab: Path) -> None:
    config = config_for(lm, text, Path("acts.zarr"))
    other = replace(config, catalog=lab, again=True)
    (target,) = targets(config)
    assert request_of(other, target) == request_of(config, target)


# --- a sweep ---


def test_a_sweep_fits_from_the_store_that_the_catalogue_holds(
    lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        f"""
[[harvest]]
model = "{lm}"
layer = 1
mask_p = [0.3]
dataset = "{text}"
tokens = 6000
heldout_tokens = 300
mask_string = " the"
device = "cpu"
batch_contexts = 8
catalog = "{lab}"
out = "{tmp_path}/acts.zarr"

[fit]
arch = "topk"
l0 = [4]
d_sae = 64
device = "cpu"
out = "{tmp_path}/runs"
"""
    )
    for flags in (["--dry-run"], []):
        result = CliRunner().invoke(app, ["sweep", str(file), *flags])
        assert result.exit_code == 0, result.stderr
        assert held(lab) in result.stdout
    (run,) = (tmp_path / "runs").glob("*/config.json")
    fitted = json.loads(run.read_text())["store"]
    assert fitted["digest"] == open_store(lab / "ann/acts.zarr").digest


def test_tokens_that_become_others_while_they_are_taken_are_not_taken(
    lm: Path, text: Path, lab: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "mine/acts.zarr", mask_p=(0.2,), catalog=lab)
    theirs = config_for(lm, text, lab / "ann/acts.zarr", tokens=9000, extend=True)
    message = (
        f"^The tokens of {lab}/ann/acts.zarr became others while they were taken: it is being extended "
        r"or repaired\. Run the same command again\.$"
    )
    with pytest.raises(StoreError, match=message):
        ran(config, planned=lambda plan: ran(theirs))
    assert not (tmp_path / "mine/acts.zarr/corpus").exists()
    there, _ = ran(config)
    alone, _ = ran(replace(config, out=tmp_path / "alone/acts.zarr", catalog=None))
    assert open_store(there[0]).digest == open_store(alone[0]).digest


def test_a_disk_that_fills_while_tokens_are_copied_is_one_sentence(
    lm: Path, text: Path, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(code: int) -> Callable[..., None]:
        def fail(*arguments: object, **options: object) -> None:
            raise OSError(code, os.strerror(code))

        return fail

    config = config_for(lm, text, tmp_path / "mine/acts.zarr", mask_p=(0.2,), catalog=lab)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", fails(errno.EXDEV))
        patched.setattr(shutil, "copy2", fails(errno.ENOSPC))
        with pytest.raises(DiskError, match=r"^The disk is full: .*/mine/acts\.zarr/corpus"):
            ran(config)
    assert sorted(file.name for file in (tmp_path / "mine/acts.zarr").iterdir()) == [
        ".lock", "manifest.json", "tokenizer.json"
    ]  # fmt: skip
    assert ran(config)[0] == [config.out]
