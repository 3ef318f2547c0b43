"""Harvest end to end on a tiny random model: right rows, each once, whatever interrupts it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zarr
from numpy.typing import NDArray

from sae_pipe.stages.batches import TorchBatches
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.masking import MaskConfig, mask_tokens
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import NetworkError, open_store
from sae_pipe.storage.corpus import corpus_digest
from sae_pipe.storage.values import round_to_bfloat16

from .harvesting import CONTEXT, config_for, quiet


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


def test_what_became_of_the_records_is_said_by_reason(lm: Path, text: Path, tmp_path: Path) -> None:
    lines = text.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        "\n".join(["not json", '{"text": ""}', '{"text": 3}', lines[0], *lines]) + "\n"
    )
    said: list[str] = []
    config = config_for(lm, broken, tmp_path / "a.zarr", tokens=1000)
    harvest(config, say=said.append, show_progress=False)
    (line,) = (line for line in said if line.startswith("text "))
    assert re.fullmatch(
        r"text      \d+ documents used of \d+ records read; "
        r"left out: 1 duplicate, 1 empty, 1 malformed JSON, \d+ more than needed, 1 not text",
        line,
    )


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


@pytest.mark.usefixtures("no_hub")
def test_another_ratio_of_a_hub_dataset_needs_no_network_beside_its_tokens(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    first = quiet(config_for(lm, text, tmp_path / "a.zarr"))[0]
    file = first / "corpus/corpus.json"
    info = json.loads(file.read_text())
    # As if the text had come from the Hub, at some commit.
    part = {"dataset": "some/text", "subset": None, "split": "train", "revision": "0" * 40}
    info["recipe"]["source"] = {
        "kind": "hub",
        "parts": [part],
        "text_column": "text",
        "filter": None,
    }
    file.write_text(json.dumps(info | {"digest": corpus_digest(info)}))
    other = config_for(lm, text, tmp_path / "b.zarr", mask_p=(0.2,))
    other = replace(other, text=TextConfig(dataset="some/text"))
    stores = [open_store(path) for path in (first, quiet(other)[0])]
    for found, expected in zip(*(store.source(slice(None)) for store in stores), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert stores[1].recipe["corpus"]["source"]["parts"] == [part]
    with pytest.raises(NetworkError, match=r"^Dataset some/text could not be reached on the Hub: "):
        quiet(replace(other, out=tmp_path / "c.zarr", tokens=5000))


def test_what_is_masked_at_a_smaller_ratio_is_masked_at_a_larger_one(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "m.zarr", mask_p=(0.2, 0.3), tokens=2000)
    small, large = (open_store(path).masked(slice(None)) for path in quiet(config))
    assert small.any()
    assert (large | ~small).all()
    assert large.sum() > small.sum()


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


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_can_be_stored_in_another_number_format(
    lm: Path, text: Path, store: Path, tmp_path: Path, dtype: str
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", store_dtype=dtype)
    quiet(config)
    exact, rounded = open_store(config.out), open_store(store)
    assert exact.manifest["encoding"]["dtype"] == dtype
    values, bits = exact.read(slice(None)), rounded.read(slice(None))
    # One text, one mask, one shuffle; another rounding. A block holds fewer rows of 4 bytes.
    if dtype == "float16":
        np.testing.assert_allclose(values, bits, rtol=2**-8, atol=1e-3)
        np.testing.assert_array_equal(values, values.astype(np.float16))
    else:
        np.testing.assert_array_equal(np.sort(round_floats(values), axis=0), np.sort(bits, axis=0))
        assert not np.array_equal(values, round_floats(values))
    batch = next(iter(TorchBatches(exact, batch_size=64, scale=2.0)))
    assert batch.dtype == torch.float32
    exact.close()


def round_floats(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return (round_to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


def test_a_compact_store_says_how_large_its_error_is(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", codec="compact")
    quiet(config)
    compact, exact = open_store(config.out), open_store(store)
    there, rows = compact.read(slice(None)), exact.read(slice(None)).astype(np.float64)
    spread = (rows - rows.mean(0)) ** 2
    errors = (rows - there) ** 2
    recorded = compact.manifest["encoding"]
    assert recorded["error"]["relative"] == pytest.approx(errors.sum() / spread.sum(), rel=1e-5)
    assert recorded["error"]["relative"] == pytest.approx(0.0052, rel=0.05)
    typical_variance = (recorded["parameters"]["step"] / 0.25) ** 2
    of_typical = errors.mean() / typical_variance
    assert recorded["error"]["of_typical_variance"] == pytest.approx(of_typical, rel=1e-5)
    assert recorded["error"]["of_typical_variance"] == pytest.approx(1 / 16 / 12, rel=0.02)
    assert recorded["error"]["clipped_values"] == 0
    per_dimension = errors.sum(0) / spread.sum(0)
    np.testing.assert_allclose(compact.relative_error, per_dimension, rtol=1e-5)
    assert recorded["error"]["per_dimension_max"] == pytest.approx(per_dimension.max(), rel=1e-5)
    np.testing.assert_allclose(compact.mean, there.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
    with TorchBatches(compact, batch_size=64) as batches:
        batch = next(iter(batches)).numpy()
    with compact.batches(64) as loader:
        np.testing.assert_allclose(batch, loader.to_floats(next(loader)), rtol=1e-6)
    multiples = batch / recorded["parameters"]["step"]
    np.testing.assert_allclose(multiples, np.rint(multiples), atol=1e-4)
