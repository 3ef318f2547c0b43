"""Harvest end to end on a tiny random model: right rows, each once, whatever interrupts it."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zarr
from numpy.typing import NDArray

from sae_pipe.stages import harvest_plan
from sae_pipe.stages.backoff import BatchRunner
from sae_pipe.stages.batches import TorchBatches
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.masking import MaskConfig, mask_tokens
from sae_pipe.stages.plan import Rates
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import DiskError, InputError, NonFiniteError, StoreError, open_store
from sae_pipe.storage.codecs.base import round_to_bfloat16
from sae_pipe.storage.corpus import Corpus
from sae_pipe.storage.lock import sole_writer

from .conftest import SENTENCES, save_tiny_model, save_tiny_tokenizer

D_MODEL, CONTEXT = 32, 32
MASK_STRING = " the"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-NeoX of 3 layers with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("lm")
    config = transformers.GPTNeoXConfig(
        vocab_size=400,
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    save_tiny_model(config, folder)
    save_tiny_tokenizer(folder, bos=False, eos=True)
    file = folder / "tokenizer_config.json"  # one token is both BOS and EOS, as for Pythia
    settings = json.loads(file.read_text()) | {"bos_token": "<|endoftext|>"}
    file.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of 5 to 80 words."""
    rng = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = [" ".join(rng.choice(words, int(rng.integers(5, 80))).tolist()) for _ in range(400)]
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return file


def config_for(lm: Path, text: Path, out: Path, **changes: Any) -> HarvestConfig:
    config = HarvestConfig(
        model=str(lm),
        layers=(1,),
        out=out,
        text=TextConfig(dataset=str(text)),
        tokens=6000,
        heldout_tokens=300,
        mask_string=MASK_STRING,
        mask_p=(0.3,),
        device="cpu",
        batch_contexts=8,
        shard_rows=512,
        block_bytes=1024 * D_MODEL * 2,  # two shards
    )
    return replace(config, **changes)


def quiet(config: HarvestConfig, **options: Any) -> list[Path]:
    return harvest(config, say=lambda line: None, show_progress=False, **options)


def content(store: Path) -> dict[str, bytes]:
    """Every file that must be the same whoever wrote it and however often it was stopped."""
    files = {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file() and file.name not in (".lock", "manifest.json")
    }
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("provenance")
    manifest["execution"].pop("tokens_per_s")
    files["manifest"] = json.dumps(manifest, sort_keys=True).encode()
    return files


@pytest.fixture(scope="module")
def store(lm: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `config_for`, never interrupted."""
    out = tmp_path_factory.mktemp("harvest") / "acts.zarr"
    quiet(config_for(lm, text, out))
    return out


def full_model_rows(lm: Path, tokens_CT: NDArray[np.uint32], layer: int) -> NDArray[np.float32]:
    """Output of a block by the whole, untruncated model: (C, T, D), as bfloat16 values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.from_numpy(tokens_CT.astype(np.int64))
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
    bits = round_to_bfloat16(states.numpy())
    return (bits.astype(np.uint32) << 16).view(np.float32)


def masked_tokens(store_path: Path) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    opened = open_store(store_path)
    mask, table = opened.recipe["mask"], opened.corpus.train
    config = MaskConfig(
        p=mask["p"],
        mask_id=mask["id"],
        seed=opened.recipe["seed"],
        special_ids=tuple(mask["special_ids"]),
    )
    return mask_tokens(
        table.tokens(0, table.n_contexts),
        first_context=0,
        context_size=table.context_size,
        config=config,
    )


def test_stored_rows_are_the_activations_of_the_whole_model_on_the_masked_tokens(
    lm: Path, store: Path
) -> None:
    opened = open_store(store)
    tokens_CT, is_masked_CT = masked_tokens(store)
    expected_CTD = full_model_rows(lm, tokens_CT, 1)
    contexts, positions = opened.source(slice(None))
    rows = opened.read(slice(None))
    # Another batch size sums in another order: one unit of the last bfloat16 place is allowed.
    np.testing.assert_allclose(rows, expected_CTD[contexts, positions], rtol=2**-7, atol=1e-6)
    np.testing.assert_array_equal(opened.masked(slice(None)), is_masked_CT[contexts, positions])
    assert 0.25 < opened.masked(slice(None)).mean() < 0.35
    assert opened.n_rows == 6000
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(opened.mean, exact.mean(0), rtol=1e-9)
    np.testing.assert_allclose(opened.variance, exact.var(0), rtol=1e-4)
    assert opened.mean_squared_norm == pytest.approx((exact**2).sum(1).mean(), rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pack": False},
        {"drop_masked": True},
        {"keep_first": True},
        {"tokens": None},
        {"pack": False, "drop_masked": True, "tokens": None},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_each_position_that_should_be_there_is_there_exactly_once(
    lm: Path, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(lm, text, tmp_path / "a.zarr", **changes)
    opened = open_store(quiet(config)[0])
    table = opened.corpus.train
    _, is_masked_CT = masked_tokens(opened.path)
    original_CT, lengths_C = table.tokens(0, table.n_contexts), table.lengths(0, table.n_contexts)
    wanted_CT = np.arange(CONTEXT) < lengths_C[:, None]
    if not config.keep_first:
        wanted_CT &= original_CT != 0  # BOS is the end-of-text token here
        wanted_CT[:, 0] = False
    if config.drop_masked:
        wanted_CT &= ~is_masked_CT
    every = np.argwhere(wanted_CT)[: config.tokens]
    found = np.stack(opened.source(slice(None)), axis=1)
    np.testing.assert_array_equal(found[np.lexsort(found.T[::-1])], every)
    assert opened.masked(slice(None)).any() != config.drop_masked


def test_heldout_rows_are_unmasked_and_of_documents_that_no_training_row_has(
    lm: Path, store: Path
) -> None:
    opened = open_store(store)
    corpus, heldout = opened.corpus, opened.heldout
    assert 200 <= heldout.n_rows <= 300
    contexts, positions = np.divmod(heldout.source(0, heldout.n_rows), CONTEXT)
    assert (np.diff(contexts * CONTEXT + positions) > 0).all()  # in text order
    expected = full_model_rows(lm, corpus.heldout.tokens(0, corpus.heldout.n_contexts), 1)
    np.testing.assert_allclose(
        heldout.read(0, heldout.n_rows), expected[contexts, positions], rtol=2**-7, atol=1e-6
    )
    train_documents = set(corpus.train.documents(0, corpus.train.n_contexts).ravel().tolist())
    heldout_documents = set(corpus.heldout.documents(0, corpus.heldout.n_contexts).ravel().tolist())
    assert not train_documents & heldout_documents


def test_several_layers_and_ratios_give_the_stores_of_single_harvests(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "all.zarr", layers=(0, 1), mask_p=(0.0, 0.3))
    paths = quiet(config)
    assert [path.name for path in paths] == [
        "all-layer0-p0.zarr",
        "all-layer1-p0.zarr",
        "all-layer0-p0.3.zarr",
        "all-layer1-p0.3.zarr",
    ]
    alone, together = open_store(store), open_store(paths[3])
    # Two hooked layers in one pass change nothing in the numbers of one of them.
    np.testing.assert_array_equal(together.read(slice(None)), alone.read(slice(None)))
    np.testing.assert_array_equal(together.heldout.read(0, 200), alone.heldout.read(0, 200))
    unmasked = open_store(paths[1])
    assert not unmasked.masked(slice(None)).any()
    for found, expected in zip(
        unmasked.source(slice(None)), alone.source(slice(None)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)  # the same rows in the same places


def test_a_store_of_the_same_text_beside_it_lends_its_tokens(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    quiet(config_for(lm, text, tmp_path / "a.zarr"))
    said: list[str] = []
    other = config_for(lm, text, tmp_path / "b.zarr", mask_p=(0.2,), layers=(0,))
    harvest(other, say=said.append, show_progress=False)
    assert f"tokens    those of {tmp_path / 'a.zarr'}, which has the same text" in said
    lent, own = (tmp_path / name / "corpus/train/tokens/c/0/0" for name in ("a.zarr", "b.zarr"))
    assert lent.stat().st_ino == own.stat().st_ino  # linked, not copied


def test_what_is_masked_at_a_smaller_ratio_is_masked_at_a_larger_one(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "m.zarr", mask_p=(0.2, 0.3), tokens=2000)
    small, large = (open_store(path).masked(slice(None)) for path in quiet(config))
    assert small.any()
    assert (large | ~small).all()
    assert large.sum() > small.sum()


# --- interrupted ---


def _harvest_in_child(config: HarvestConfig, die_at: int | None, events: Any) -> None:
    """Harvest, and die by SIGKILL just before the given event: a write, sync, rename or batch."""

    lock = threading.Lock()  # the child's own: one shared with the parent would die locked

    def counted(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            with lock:
                events.value += 1
                if events.value == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    torch.set_num_threads(1)
    for name in ("replace", "fsync", "posix_fallocate"):
        setattr(os, name, counted(getattr(os, name)))
    BatchRunner._try = counted(BatchRunner._try)  # type: ignore[method-assign]
    vars(harvest_plan)["measure"] = lambda *_: Rates(tokens_per_s=1e3, bytes_per_value=1.4)
    quiet(config)


def run_in_child(config: HarvestConfig, die_at: int | None = None) -> tuple[int | None, int]:
    """Exit code of a harvest in a process of its own, and how many events it came to."""
    context = multiprocessing.get_context("fork")
    events = context.Value("q", 0, lock=False)
    process = context.Process(target=_harvest_in_child, args=(config, die_at, events))
    process.start()
    process.join()
    return process.exitcode, events.value


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("note_every_s", [60.0, 0.0], ids=["in-memory", "on-disk"])
def test_killed_at_random_instants_a_harvest_gives_the_bytes_of_one_never_interrupted(
    lm: Path, text: Path, store: Path, tmp_path: Path, note_every_s: float
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", note_every_s=note_every_s)
    code, events = run_in_child(replace(config, out=tmp_path / "elsewhere" / "whole.zarr"))
    assert code == 0
    rng, kills = np.random.default_rng(3), 0
    for number in range(5):
        config = replace(config, out=tmp_path / f"killed{number}" / "acts.zarr")
        # Half of the way at most each time, so that every phase down to the last rename is hit.
        while (code := run_in_child(config, int(rng.integers(1, events // 2)))[0]) != 0:
            assert code == -signal.SIGKILL
            kills += 1
            assert kills < 60
        expected, found = content(store), content(config.out)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
    assert kills >= 10


def test_a_block_kept_on_disk_goes_on_at_the_context_it_had_reached(
    lm: Path, text: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", note_every_s=0.0)
    monkeypatch.setattr(
        harvest_plan, "measure", lambda *_: Rates(tokens_per_s=1000.0, bytes_per_value=1.4)
    )
    seen: list[int] = []
    interrupt_at = 12
    run = BatchRunner.run

    def counting(self: Any, token_ids: torch.Tensor) -> Any:
        seen.append(len(token_ids))
        if len(seen) == interrupt_at:
            raise KeyboardInterrupt
        return run(self, token_ids)

    monkeypatch.setattr(BatchRunner, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        quiet(config)
    before = sum(seen[:-1])
    left = list((config.out / ".block").glob("*.json"))
    assert left
    del seen[:]
    interrupt_at = 10**9
    quiet(config)
    contexts = open_store(config.out).corpus.train.n_contexts
    blocks = 6
    heldout = open_store(config.out).corpus.heldout.n_contexts
    # A context on the border of two blocks runs for both; one batch may have been under way.
    assert before + sum(seen) <= contexts + heldout + blocks + 8
    assert content(config.out)["manifest"] == content(store)["manifest"]


def test_the_same_command_on_a_complete_store_says_so_and_changes_nothing(
    lm: Path, text: Path, store: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.name != ".lock"}
    said: list[str] = []
    harvest(config_for(lm, text, store), say=said.append, show_progress=False)
    assert said == [f"{store} is complete: 6,000 rows of this recipe. Nothing to do."]
    after = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.name != ".lock"}
    assert before == after


def test_another_recipe_on_an_existing_store_shows_the_difference(
    lm: Path, text: Path, store: Path
) -> None:
    message = (
        f"^Store {store} was begun with another recipe: mask_p is 0.3 there and 0.2 here; "
        "seed is 0 there and 1 here. Pass the same flags to go on with it, or another --out.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(config_for(lm, text, store, mask_p=(0.2,), seed=1))


def test_a_second_writer_is_refused_and_a_dead_one_holds_nothing(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr")
    quiet(config)
    (config.out / "manifest.json").write_text(
        (config.out / "manifest.json").read_text().replace('"complete"', '"harvesting"')
    )
    with sole_writer(config.out, "Store"):
        message = r"^Store .*acts.zarr is being written by another process \(pid \d+\)\. Wait"
        with pytest.raises(InputError, match=message):
            quiet(config)


def test_an_unfinished_store_is_not_opened_as_if_it_were_whole(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "acts.zarr"
    shutil.copytree(store, copy)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"complete"', '"harvesting"'))
    message = (
        f"^Store {copy} is not finished: its state is 'harvesting'. Run the `sae-pipe harvest` "
        "command that began it once more; it goes on where it stopped.$"
    )
    with pytest.raises(StoreError, match=message):
        open_store(copy)


# --- plain readers, and ours ---


def test_plain_zarr_and_dask_read_the_numbers_of_our_reader(store: Path) -> None:
    import dask.array

    opened = open_store(store)
    group: Any = zarr.open_group(store, mode="r")
    np.testing.assert_array_equal(group["activations"][:], opened.read(slice(None)))
    lazy = dask.array.from_zarr(str(store), component="activations")
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), opened.read(slice(None)))
    np.testing.assert_allclose(group["statistics/mean"][:], opened.mean)
    names = {name for name, _ in group.members(max_depth=None)}  # warns if anything is astray
    assert {
        "activations",
        "source",
        "masked",
        "heldout/activations",
        "corpus/train/tokens",
    } <= names


def test_torch_batches_are_the_stored_rows_scaled(store: Path) -> None:
    opened = open_store(store)
    scale = opened.mean_squared_norm**-0.5
    batches = TorchBatches(opened, batch_size=600, seed=1, scale=scale)
    served = torch.cat([next(batches) for _ in range(10)])
    batches.close()
    assert served.dtype == torch.float32
    assert float((served**2).sum(1).mean()) == pytest.approx(1, rel=1e-4)
    expected = torch.from_numpy(opened.read(slice(None))) * scale
    torch.testing.assert_close(served.sort(0).values, expected.sort(0).values)


# --- bad input ---


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
        r"The disk is too small: 1 store of 6,000 rows need about \d+ kB, and 200 kB are free at "
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
        r"^The activation of layer 1 at context (\d+), position (\d+) is NaN or Inf\. The model "
        r"overflows in this number format: pass --dtype float32 \(or bfloat16 if it was "
        r"float16\)\. The rows before are kept\.$"
    )
    with pytest.raises(NonFiniteError, match=message) as raised:
        quiet(config)
    found = re.search(r"context (\d+), position (\d+)", str(raised.value))
    assert found is not None
    context, corpus = int(found[1]), Corpus(config.out / "corpus")
    tables = [table for table in (corpus.train, corpus.heldout) if context < table.n_contexts]
    # Attention multiplies what it masks by 0, and 0 * NaN is NaN: the whole context is bad.
    assert any(300 in table.context(context) for table in tables)
