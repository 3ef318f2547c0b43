"""What `harvest --extend` refuses: one sentence, and the store is as it was."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_pipe.stages import harvest_plan, harvest_run
from sae_pipe.stages.plan import Rates
from sae_pipe.storage import ActivationStore, DiskError, InputError, StoreError, open_store
from sae_pipe.storage.address import Address, place
from sae_pipe.storage.extending_writer import check_can_be_filled_up
from sae_pipe.storage.pull import Part, pull
from sae_pipe.storage.recode import recode

from .harvesting import config_for, content, quiet

AFTER = 9000


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(tokens_per_s=1e4, bytes_per_value=1.4)
    monkeypatch.setattr(harvest_run, "measure", lambda *_: rates)


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of the store of `config_for`, which has 6,000 rows."""
    return Path(shutil.copytree(store, tmp_path / "acts.zarr"))


def refused(config: Any, message: str, error: type[Exception] = InputError) -> None:
    before = content(config.out) if config.out.is_dir() else None
    with pytest.raises(error, match=f"^{message}$"):
        quiet(config)
    assert before is None or content(config.out) == before


def test_what_cannot_be_extended_is_refused_in_a_sentence(
    lm: Path, text: Path, copy: Path, store: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, copy, tokens=AFTER, extend=True)
    refused(
        replace(config, out=tmp_path / "none.zarr"),
        f"There is no store at {tmp_path}/none.zarr that could be extended. Leave out --extend to "
        "harvest one.",
    )
    refused(
        replace(config, tokens=5000),
        f"Store {copy} has 6,000 training rows, and --tokens is 5,000: a store is never made smaller. "
        "Pass a larger number, or fit from a part of it.",
    )
    refused(
        replace(config, extend=False),
        f"Store {copy} was begun with another recipe: tokens is 6000 there and 9000 here. Pass "
        "--extend to add the rows that are missing, the same flags to go on with it, or another --out.",
    )
    refused(
        replace(config, mask_p=(0.2,), seed=1),
        f"Store {copy} was begun with another recipe: mask_p is 0.3 there and 0.2 here; seed is 0 "
        "there and 1 here. Pass the same flags to go on with it, or another --out.",
    )
    refused(
        replace(config, batch_contexts=4),
        f"Store {copy} was begun with another recipe: batch_contexts is 8 there and 4 here. Pass the "
        "same flags to go on with it, or another --out.",
    )
    shutil.copytree(store, tmp_path / "part" / "whole.zarr")
    part = tmp_path / "part" / "acts.zarr"
    pull(store, part, Part(rows=1000), say=lambda line: None)
    refused(
        replace(config, out=part),
        f"Store {part} is a part of another store, and cannot be extended. Pull more of that one, or "
        "all of it.",
    )
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace('"complete"', '"harvesting"'))
    refused(
        config,
        f"Store {copy} is not finished: its state is 'harvesting'. Run the `sae-pipe harvest` command "
        "that began it once more, and extend it then.",
    )


def test_flags_that_do_not_go_with_it_are_refused(lm: Path, text: Path, tmp_path: Path) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr")
    message = (
        "^--extend needs --tokens: the number of training rows that the store is to have, with those "
        r"that it has\.$"
    )
    with pytest.raises(InputError, match=message):
        replace(config, extend=True, tokens=None)
    message = (
        "^--extend adds rows to a store in a folder, and --out is s3://bucket/acts.zarr. Pull the "
        "store with `sae-pipe store pull`, extend it, and push it to another address.$"
    )
    bucket = place("s3://bucket/acts.zarr")
    assert isinstance(bucket, Address)
    with pytest.raises(InputError, match=message):
        replace(config, extend=True, send_to=bucket)


def test_an_imported_store_and_other_text_are_refused(
    lm: Path, copy: Path, tmp_path: Path, make_store: Callable[..., ActivationStore]
) -> None:
    rows = np.random.default_rng(0).standard_normal((600, 32)).astype(np.float32)
    imported = make_store(tmp_path / "imported.zarr", rows, rows[:10])
    text = tmp_path / "other.jsonl"
    text.write_text(json.dumps({"text": "the quick brown fox " * 500}) + "\n")
    refused(
        config_for(lm, text, imported.path, tokens=700, extend=True),
        f"Store {imported.path} was not harvested by sae-pipe, or was recoded with loss since, so no "
        "rows can be added to it. Harvest a store, and extend that.",
    )
    asked = json.loads((copy / "manifest.json").read_text())["request"]["dataset"]
    refused(
        config_for(lm, text, copy, tokens=AFTER, extend=True),
        f"Store {copy} was begun with another recipe: dataset is {asked} there and {text} here. Pass "
        "the same flags to go on with it, or another --out.",
    )


def test_text_that_was_changed_since_is_refused(lm: Path, text: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(text, tmp_path / "own.jsonl"))
    config = config_for(lm, own, tmp_path / "acts.zarr", tokens=2000)
    quiet(config)
    with own.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    message = (
        r"^Store .*acts\.zarr was begun with another recipe: text parts is .* there and .* here\."
    )
    with pytest.raises(InputError, match=message):
        quiet(replace(config, tokens=3000, extend=True))


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    lm: Path, text: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest_plan, "free_bytes", lambda path: 100_000)
    message = (
        "The disk is too small: 1 store of 9,000 rows needs about 176 kB more, and 100 kB are free at "
        rf"{copy.parent}\. Pass --tokens 7\d\d\d, or --out on a larger disk\."
    )
    refused(config_for(lm, text, copy, tokens=AFTER, extend=True), message, DiskError)


def test_a_lossy_codec_that_would_round_the_last_rows_once_more_is_refused(
    tmp_path: Path, make_store: Callable[..., ActivationStore]
) -> None:
    """Values of millions of steps have codes that float32 does not hold exactly."""
    rng = np.random.default_rng(0)
    rows = (1.11 * rng.standard_normal((4000, 16))).astype(np.float32)
    make_store(tmp_path / "small.zarr", rows, rows[:10])
    rows[-500:, 3] = 10.0 ** rng.uniform(5, 8, 500)
    make_store(tmp_path / "large.zarr", rows, rows[:10])
    for name in ("small", "large"):
        path = tmp_path / f"{name}-compact.zarr"
        recode(tmp_path / f"{name}.zarr", path, "compact", say=lambda line: None)
        found = open_store(path)
        if name == "small":
            check_can_be_filled_up(found.train_reader, found.codec, path)
            continue
        assert found.manifest["encoding"]["parameters"]["code"] == "int32"
        message = (
            rf"^Store {path} cannot be extended: its last [\d,]+ rows share a chunk with new ones, and "
            r"the codec compact:0\.25 would round them once more, to other values\. Harvest a store of "
            r"the larger size\.$"
        )
        with pytest.raises(StoreError, match=message):
            check_can_be_filled_up(found.train_reader, found.codec, path)
