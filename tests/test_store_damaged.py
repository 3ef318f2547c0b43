"""Manifests that were damaged or made up: one sentence, never a traceback or a wrong number."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage import ActivationStore, StoreError, open_store

Change = Callable[[dict[str, Any]], object]

CHANGES: dict[str, Change] = {
    "no shards": lambda m: m["train"].pop("shards"),
    "too few shards": lambda m: m["train"]["shards"].pop(),
    "shards is a number": lambda m: m["train"].update(shards=4),
    "a shard is a list": lambda m: m["train"]["shards"].__setitem__(0, []),
    "a shard without files": lambda m: m["train"]["shards"][0].pop("files"),
    "a shard without its source": lambda m: m["train"]["shards"][0]["files"].pop("source"),
    "bytes is text": lambda m: m["train"]["shards"][0]["files"]["source"].update(bytes="8"),
    "bytes below zero": lambda m: m["train"]["shards"][0]["files"]["source"].update(bytes=-8),
    "no digest": lambda m: m["train"]["shards"][0]["files"]["source"].pop("sha256"),
    "no layout": lambda m: m["heldout"].pop("layout"),
    "a width that cannot be": lambda m: m["train"]["layout"].update(d_in=10**12),
    "more rows than there can be": lambda m: m["train"]["layout"].update(n_rows=10**18),
    "rows below zero": lambda m: m["train"]["layout"].update(n_rows=-1),
    "rows as a fraction": lambda m: m["train"]["layout"].update(n_rows=0.5),
    "chunks that do not divide shards": lambda m: m["train"]["layout"].update(chunk_rows=3),
    "a size that is unknown": lambda m: m["train"]["layout"].update(depth=3),
    "an unknown codec": lambda m: m.update(codec="zip"),
    "no statistics": lambda m: m.pop("statistics"),
    "a norm that is text": lambda m: m["statistics"].update(mean_squared_norm="large"),
    "no recipe": lambda m: m.pop("recipe"),
    "a format version that is text": lambda m: m.update(format_version="1"),
    "another format": lambda m: m.update(format="zip"),
    "a state that is unknown": lambda m: m.update(state="almost"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_manifest_is_refused_in_one_sentence(
    small_store: ActivationStore, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(small_store.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    CHANGES[name](manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=str(copy)):
        open_store(copy)
    for command in ("info", "verify"):
        result = CliRunner().invoke(app, ["store", command, str(copy)])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.exit_code in (0, 2)


@pytest.mark.parametrize("file", ["manifest.json", "corpus/corpus.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "", "[]", "null", "{"])
def test_json_that_is_none_of_ours_is_refused_in_one_sentence(
    small_store: ActivationStore, tmp_path: Path, file: str, content: str
) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(small_store.path, copy)
    (copy / file).write_text(content)
    with pytest.raises(StoreError, match=str(copy)):
        assert open_store(copy).corpus
