"""What a harvest refuses: one sentence, and nothing half written."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.storage import DiskError, InputError, NonFiniteError, StoreError
from sae_pipe.storage.corpus import Corpus

from .harvesting import config_for, quiet


def refused(config: HarvestConfig, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        quiet(config)
    assert not config.out.exists(), "something was half written"


def test_a_text_that_is_too_short_says_how_many_rows_it_holds(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", tokens=10_000_000)
    with pytest.raises(InputError, match=r"--tokens [1-9]\d+"):
        quiet(config)
    assert not (config.out / "manifest.json").exists()
    quiet(replace(config, tokens=1000))  # the next command is not refused because of the last


def test_a_context_longer_than_the_models_maximum_is_refused(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    message = (
        f"--context-size 33 is longer than the 32 tokens that model {lm} can take\\. "
        "Pass 32 or less\\."
    )
    refused(config_for(lm, text, tmp_path / "a.zarr", context_size=33), InputError, message)


def test_a_layer_that_is_not_there_is_refused(lm: Path, text: Path, tmp_path: Path) -> None:
    message = (
        f"Model {lm} has 3 layers, counted from 0, but layer 3 was asked for\\. "
        "Pass --layer from 0 to 2\\."
    )
    refused(config_for(lm, text, tmp_path / "a.zarr", layers=(3,)), InputError, message)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_mask_probability_outside_0_to_1_is_refused(lm: Path, text: Path, p: float) -> None:
    message = (
        rf"^Mask probability {p} is outside \[0, 1\]\. "
        r"Pass --mask-p a number from 0 to 1, for example 0\.3\.$"
    )
    with pytest.raises(InputError, match=message):
        config_for(lm, text, Path("a.zarr"), mask_p=(p,))


def test_a_text_without_documents_is_refused_with_the_reasons(lm: Path, tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text('{"text": ""}\n{"text": " "}\nnot json\n')
    message = (
        f"Dataset '{file}' holds no usable text: of 3 records, 2 empty, 1 malformed JSON\\. "
        "Pass another --dataset\\."
    )
    refused(config_for(lm, file, tmp_path / "a.zarr"), InputError, message)


def test_a_folder_that_is_no_store_is_left_alone(lm: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.tex").write_text("42")
    message = (
        f"^{tmp_path}/precious exists and is not an activation store. "
        "Pass another --out, or move it away.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(config_for(lm, text, tmp_path / "precious"))
    assert [file.name for file in (tmp_path / "precious").iterdir()] == ["thesis.tex"]


def test_too_small_a_disk_is_refused_with_the_flags_that_would_fit(
    lm: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_pipe.stages.harvest_plan.free_bytes", lambda path: 200_000)
    message = (
        r"The disk is too small: 1 store of 6,000 rows needs about \d+ kB, and 200 kB are free at "
        rf"{tmp_path}\. Pass --tokens \d+, or --out on a larger disk\."
    )
    refused(config_for(lm, text, tmp_path / "a.zarr"), DiskError, message)


def test_a_dry_run_prints_the_plan_and_writes_nothing(lm: Path, text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = config_for(lm, text, tmp_path / "a.zarr")
    harvest(config, say=said.append, show_progress=False, dry_run=True)
    assert [line.split()[0] for line in said] == ["rows", "disk", "memory", "time"]
    assert "6,000 training and 300 held-out rows of 32 values in 1 store, 12 shards" in said[0]
    assert not config.out.exists()


def test_nan_in_an_activation_stops_with_context_and_position(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "lm"
    shutil.copytree(lm, broken)
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[300] = float("nan")
    model.save_pretrained(broken)
    config = config_for(broken, text, tmp_path / "acts.zarr", mask_p=(0.0,))
    message = (
        r"^The activation of layer 1 at context (\d+), position (\d+) of the (training|held-out) "
        r"rows is NaN or Inf: it overflows in this number format\. Pass --dtype float32 "
        r"\(or bfloat16 if it was float16\) with another --out\.$"
    )
    with pytest.raises(NonFiniteError, match=message) as raised:
        quiet(config)
    found = re.search(message, str(raised.value))
    assert found is not None
    corpus = Corpus(config.out / "corpus")
    table = corpus.train if found[3] == "training" else corpus.heldout
    # Attention multiplies what it masks by 0, and 0 * NaN is NaN: the whole context is bad.
    assert 300 in table.context(int(found[1]))


def test_another_batch_size_for_a_begun_store_is_refused(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    begun = tmp_path / "acts.zarr"
    shutil.copytree(store, begun)
    manifest = (begun / "manifest.json").read_text()
    (begun / "manifest.json").write_text(manifest.replace('"complete"', '"harvesting"'))
    message = (
        f"^Store {begun} was begun with another recipe: batch_contexts is 8 there and 3 here. "
        "Pass the same flags to go on with it, or another --out.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(config_for(lm, text, begun, batch_contexts=3))


def test_a_complete_store_with_a_missing_shard_is_not_called_complete(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "acts.zarr"
    shutil.copytree(store, damaged)
    (damaged / "activations/c/2/0").unlink()
    with pytest.raises(StoreError, match="activations/c/2/0: it is missing"):
        quiet(config_for(lm, text, damaged))


def test_too_much_memory_for_the_blocks_is_refused_with_the_flag_that_fits(
    lm: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_pipe.storage.provenance.memory_bytes", lambda: 100_000)
    message = (
        r"Two blocks for each of 1 layers need 131 kB of memory, and this machine has 100 kB\. "
        r"Pass --block-gb 3\.5e-05 or less, or fewer --layer at once\."
    )
    refused(config_for(lm, text, tmp_path / "a.zarr"), InputError, message)
