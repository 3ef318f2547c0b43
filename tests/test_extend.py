"""`harvest --extend`: more rows in place, those that are there where they are."""

# R rows, D d_model, C contexts, T positions of a context

import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sae_pipe.stages import harvest_run
from sae_pipe.stages.fit import fit
from sae_pipe.stages.fit_source import open_to_fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.masking import MaskConfig, mask_tokens
from sae_pipe.stages.plan import Rates
from sae_pipe.stages.repair import repair
from sae_pipe.stages.row_map import KeepRule, RowMap
from sae_pipe.storage import ActivationStore, InputError, StoreError, extension, open_store
from sae_pipe.storage import rows as rows_module
from sae_pipe.storage.before import manifests_before
from sae_pipe.storage.card import README, card
from sae_pipe.storage.corpus import Corpus
from sae_pipe.storage.counter import permutation, stream_key
from sae_pipe.storage.files import write_json
from sae_pipe.storage.layout import Layout
from sae_pipe.storage.loader import BatchLoader
from sae_pipe.storage.manifest import COMMITS, read_manifest
from sae_pipe.storage.pull import Part, pull
from sae_pipe.storage.recode import recode
from sae_pipe.storage.shuffle import measure_shuffle
from sae_pipe.storage.unfinished import WaitEnded, follow_store, open_prefix, writer_of
from sae_pipe.storage.values import Rows, round_to_bfloat16
from sae_pipe.storage.verify import stored_files, verify_store

from .harvesting import CONTEXT, config_for, content, quiet

BEFORE, AFTER = 6000, 9000  # rows; shards have 512, blocks 1024, so that shard 11 is filled up


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(tokens_per_s=1e4, bytes_per_value=1.4)
    monkeypatch.setattr(harvest_run, "measure", lambda *_: rates)


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of the store of `config_for`, to be extended."""
    return Path(shutil.copytree(store, tmp_path / "acts.zarr"))


@pytest.fixture(scope="module")
def grown(lm: Path, text: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That store, extended from 6,000 to 9,000 rows."""
    out = tmp_path_factory.mktemp("grown") / "acts.zarr"
    shutil.copytree(store, out)
    quiet(config_for(lm, text, out, tokens=AFTER, extend=True))
    return out


@pytest.fixture(scope="module")
def counted(store: Path) -> RowMap:
    """The rows of that store's corpus, counted once."""
    rule = KeepRule(keep_first=False, bos_id=0, drop_masked=False)
    mask = MaskConfig(p=0.3, mask_id=1, seed=0, special_ids=(0,))
    return RowMap(open_store(store).corpus.train, rule, mask, shuffle_seed=7)


def masks_of(opened: ActivationStore) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """What the model was given, and what of it is masked, by the recipe: (C, T) each."""
    mask, table = opened.recipe["mask"], opened.corpus.train
    config = MaskConfig(
        p=mask["p"],
        mask_id=mask["id"],
        seed=opened.recipe["seed"],
        special_ids=tuple(mask["special_ids"]),
    )
    tokens_CT = table.tokens(0, table.n_contexts)
    return mask_tokens(tokens_CT, first_context=0, context_size=CONTEXT, config=config)


def expected_sources(opened: ActivationStore, cuts: list[int]) -> NDArray[np.int64]:
    """Source of every stored row, straight from docs/store-format.md: (R,)."""
    table, n_rows = opened.corpus.train, opened.n_rows
    tokens_CT, lengths_C = table.tokens(0, table.n_contexts), table.lengths(0, table.n_contexts)
    is_row_CT = np.arange(CONTEXT) < lengths_C[:, None]
    if not opened.recipe["keep_first"]:
        is_row_CT[:, 0] = False
        is_row_CT &= tokens_CT != 0
    if opened.recipe["drop_masked"]:
        is_row_CT &= ~masks_of(opened)[1]
    numbered = np.flatnonzero(is_row_CT.reshape(-1))[:n_rows]
    stored = np.full(n_rows, -1)
    block_rows = opened.manifest["train"]["layout"]["block_rows"]
    for block in range(-(-n_rows // block_rows)):
        begin, end = block * block_rows, min((block + 1) * block_rows, n_rows)
        bounds = [begin, *[cut for cut in cuts if begin < cut < end], end]
        for part in range(len(bounds) - 1):
            first, last = bounds[part], bounds[part + 1]
            names: list[int | str] = ["rows", block, *([part] if part else [])]
            places = permutation(stream_key(opened.recipe["seed"], *names), last - first)
            stored[first + places] = numbered[first:last]
    return stored


def sources(opened: ActivationStore) -> NDArray[np.int64]:
    contexts, positions = opened.source(slice(None))
    return contexts * CONTEXT + positions


def model_rows(lm: Path, opened: ActivationStore, layer: int = 1) -> NDArray[np.float32]:
    """Rows of the store, in stored order, by the whole, untruncated model: (R, D)."""
    masked_CT, _ = masks_of(opened)
    model = transformers.AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.from_numpy(masked_CT.astype(np.int64))
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
    bits = round_to_bfloat16(states.numpy()).astype(np.uint32)
    rows_CTD = (bits << 16).view(np.float32)
    return rows_CTD[opened.source(slice(None))]


def same_rows(first: ActivationStore, second: ActivationStore, n_rows: int) -> None:
    """The first rows of two stores are equal, bit for bit, and so is all that is said of them."""
    rows = slice(0, n_rows)
    np.testing.assert_array_equal(first.read(rows), second.read(rows))
    np.testing.assert_array_equal(first.masked(rows), second.masked(rows))
    np.testing.assert_array_equal(first.source(rows), second.source(rows))
    n_heldout = first.heldout.n_rows
    assert n_heldout == second.heldout.n_rows
    np.testing.assert_array_equal(
        first.heldout.read(0, n_heldout), second.heldout.read(0, n_heldout)
    )


def damages(path: Path) -> list[Any]:
    manifest = read_manifest(path)
    return verify_store(path, manifest, stored_files(path, manifest))


def test_rows_that_were_there_stay_and_the_new_ones_are_the_models_on_more_contexts(
    lm: Path, store: Path, grown: Path
) -> None:
    old, opened = open_store(store), open_store(grown)
    assert (old.n_rows, opened.n_rows) == (BEFORE, AFTER)
    same_rows(old, opened, BEFORE)
    np.testing.assert_array_equal(sources(opened), expected_sources(opened, [BEFORE]))
    assert len(np.unique(sources(opened))) == AFTER
    # Another batch size sums in another order: one unit of the last bfloat16 place is allowed.
    rows = opened.read(slice(None))
    np.testing.assert_allclose(rows, model_rows(lm, opened), rtol=2**-7, atol=1e-6)
    _, is_masked_CT = masks_of(opened)
    np.testing.assert_array_equal(
        opened.masked(slice(None)), is_masked_CT[opened.source(slice(None))]
    )
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(opened.mean, exact.mean(0), rtol=1e-9)
    np.testing.assert_allclose(opened.variance, exact.var(0), rtol=1e-4)
    assert opened.mean_squared_norm == pytest.approx((exact**2).sum(1).mean(), rel=1e-6)
    assert damages(grown) == []
    assert not (grown / ".extending").exists()


def test_a_plain_zarr_reader_sees_the_rows_the_tokens_and_the_statistics(grown: Path) -> None:
    opened = open_store(grown)
    group: Any = zarr.open_group(grown, mode="r")
    listed = json.loads((grown / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    there = {str(file.parent.relative_to(grown)): file for file in grown.rglob("*/zarr.json")}
    assert listed == {name: json.loads(file.read_text()) for name, file in there.items()}
    np.testing.assert_array_equal(group["activations"][:], opened.read(slice(None)))
    np.testing.assert_array_equal(group["source"][:], sources(opened))
    np.testing.assert_array_equal(group["masked"][:], opened.masked(slice(None)))
    np.testing.assert_array_equal(group["statistics/mean"][:], opened.mean)
    table = opened.corpus.train
    np.testing.assert_array_equal(
        group["corpus/train/tokens"][:], table.tokens(0, table.n_contexts)
    )


def test_the_corpus_gets_contexts_of_later_records_permuted_among_themselves(
    store: Path, grown: Path
) -> None:
    old, new = Corpus(store / "corpus"), Corpus(grown / "corpus")
    n_old, n_new = old.train.n_contexts, new.train.n_contexts
    for name in ("tokens", "documents", "lengths", "origins"):
        of_old, of_new = getattr(old.train, name), getattr(new.train, name)
        np.testing.assert_array_equal(of_new(0, n_old), of_old(0, n_old))
        heldout = old.heldout.n_contexts
        np.testing.assert_array_equal(
            getattr(new.heldout, name)(0, heldout), getattr(old.heldout, name)(0, heldout)
        )
    drawn = permutation(stream_key(0, "contexts", "train", 1), n_new - n_old)
    np.testing.assert_array_equal(new.train.origins(n_old, n_new), n_old + drawn)
    before = old.train.documents(0, n_old)
    added = new.train.documents(n_old, n_new)
    assert added.min() == before.max() + 1  # no record is lost between them, and none comes twice
    heldout_records = set(new.heldout.documents(0, new.heldout.n_contexts).ravel().tolist())
    assert not heldout_records & {*before.ravel().tolist(), *added.ravel().tolist()}
    assert new.info["recipe"]["extensions"] == [{"contexts": n_old, "train_rows": AFTER}]
    (counts,) = new.info["extensions"]
    assert counts["first_record"] == int(before.max()) + 1
    new.verify()


def test_the_manifest_says_how_the_store_came_to_be(store: Path, grown: Path) -> None:
    old, new = open_store(store).manifest, open_store(grown).manifest
    assert new["recipe"]["extended_at"] == [BEFORE]
    assert new["recipe"]["rows"] == new["request"]["tokens"] == AFTER
    lasting = {"recipe", "corpus", "request", "statistics", "files", "digest", "shuffle"}
    changed = {name for name in new if new[name] != old.get(name)}
    assert changed <= lasting | {"train", "provenance"}
    (extension,) = new["provenance"]["extensions"]
    assert extension["digest"] == old["digest"]
    assert extension["rows"] == BEFORE
    assert extension["recipe"] == old["recipe"]
    assert extension["corpus"] == old["corpus"]["digest"]
    assert len(new["provenance"]["runs"]) == len(old["provenance"]["runs"]) + 1
    assert new["execution"] == old["execution"]
    assert new["shuffle"]["failures"] == []
    assert new["shuffle"]["rows"] == AFTER
    assert new["train"]["shards"][:11] == old["train"]["shards"][:11]
    assert new["heldout"] == old["heldout"]


def test_the_card_is_that_of_the_store_as_it_is_now(grown: Path) -> None:
    text = (grown / README).read_text()
    assert text == card(read_manifest(grown))
    assert f"| extended at row | {BEFORE} |" in text


def test_extended_twice_a_store_can_still_be_verified_repaired_and_traced(
    lm: Path, text: Path, copy: Path, grown: Path
) -> None:
    config = config_for(lm, text, copy, extend=True)
    quiet(replace(config, tokens=6050))  # within the same block and shard
    quiet(replace(config, tokens=AFTER))
    opened = open_store(copy)
    same_rows(open_store(grown), opened, BEFORE)
    assert opened.recipe["extended_at"] == [BEFORE, 6050]
    np.testing.assert_array_equal(sources(opened), expected_sources(opened, [BEFORE, 6050]))
    np.testing.assert_allclose(
        opened.read(slice(None)), model_rows(lm, opened), rtol=2**-7, atol=1e-6
    )
    assert damages(copy) == []
    before = content(copy)
    for name in ("activations/c/11/0", "source/c/11", "masked/c/11", "activations/c/16/0"):
        (copy / name).unlink()
    (copy / "statistics/mean/c/0").unlink()
    (copy / "activations/c/5/0").write_bytes(b"damaged")
    repair(copy, say=lambda line: None, show_progress=False)
    assert content(copy) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "none", "store_dtype": "float32"},
        {"codec": "lossless", "store_dtype": "float16", "tokens": 5120},  # full shards and blocks
        {"codec": "compact", "shard_rows": 1024, "block_bytes": 4096 * 64},
        {"codec": "compact:0.5", "tokens": 5632},  # full shards, half a block
        {"pack": False, "drop_masked": True, "tokens": 4000},
        {"keep_first": True, "mask_p": (0.0,)},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_every_codec_and_kind_of_rows_can_be_extended(
    lm: Path, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", **changes)
    quiet(config)
    old_path = Path(shutil.copytree(config.out, tmp_path / "old" / "acts.zarr"))
    tokens = (config.tokens or 0) + 2500
    quiet(replace(config, tokens=tokens, extend=True))
    old, new = open_store(old_path), open_store(config.out)
    same_rows(old, new, old.n_rows)
    assert new.n_rows == tokens
    np.testing.assert_array_equal(sources(new), expected_sources(new, [old.n_rows]))
    assert damages(config.out) == []
    before = content(config.out)
    (config.out / "statistics/variance/c/0").unlink()
    repair(config.out, say=lambda line: None, show_progress=False)
    assert content(config.out) == before
    rows, true = new.read(slice(None)), model_rows(lm, new)
    if config.store_dtype != "bfloat16":
        np.testing.assert_allclose(rows, true, rtol=2**-7, atol=1e-3)
    elif not config.stored_as.is_lossy:
        np.testing.assert_allclose(rows, true, rtol=2**-7, atol=1e-6)
    else:
        assert new.manifest["encoding"]["parameters"] == old.manifest["encoding"]["parameters"]
        step = new.manifest["encoding"]["parameters"]["step"]
        assert np.abs(rows - true).max() < 0.51 * step + 2**-7 * np.abs(true).max()
        squares_RD = (rows.astype(np.float64) - true) ** 2
        spread_D = ((true - true.mean(0, dtype=np.float64)) ** 2).sum(0)
        found = new.manifest["encoding"]["error"]
        assert found["relative"] == pytest.approx(squares_RD.sum() / spread_D.sum(), rel=1e-2)
        np.testing.assert_allclose(new.relative_error, squares_RD.sum(0) / spread_D, rtol=0.05)
    np.testing.assert_allclose(new.mean, rows.mean(0, dtype=np.float64), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(new.variance, rows.var(0, dtype=np.float64), rtol=1e-4)


def test_stores_of_several_layers_and_ratios_share_the_longer_corpus(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(
        lm, text, tmp_path / "acts.zarr", layers=(0, 1), mask_p=(0.0, 0.3), tokens=3000
    )
    paths = quiet(config)
    twin = Path(shutil.copytree(paths[3], tmp_path / "twin" / "acts.zarr"))
    untouched = quiet(replace(config, layers=(2,), mask_p=(0.0,), out=tmp_path / "other.zarr"))[0]
    before = content(untouched)
    assert (untouched / "corpus/corpus.json").samefile(paths[0] / "corpus/corpus.json")
    quiet(replace(config, tokens=4500, extend=True))
    assert content(untouched) == before  # whose corpus was theirs
    stores = [open_store(path) for path in paths]
    assert len({each.corpus.digest for each in stores}) == 1
    assert (paths[0] / "corpus/corpus.json").samefile(paths[3] / "corpus/corpus.json")
    for each in stores:
        assert damages(each.path) == []
        np.testing.assert_array_equal(sources(each), sources(stores[0]))
    # One by itself takes the tokens of those beside it, and comes to the same bytes.
    shutil.copytree(twin, tmp_path / "acts-layer1-p0.3-alone.zarr")
    alone = replace(
        config, layers=(1,), mask_p=(0.3,), out=tmp_path / "acts-layer1-p0.3-alone.zarr"
    )
    said: list[str] = []
    harvest(replace(alone, tokens=4500, extend=True), say=said.append, show_progress=False)
    assert any(line.startswith("tokens    those of") for line in said)
    assert content(alone.out) == content(paths[3])


def test_duplicates_of_earlier_records_are_found_and_text_that_is_too_short_changes_nothing(
    lm: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    first = [" ".join(rng.choice(["the", "dog", "word", "sea"], 40).tolist()) for _ in range(60)]
    later = [" ".join(rng.choice(["lazy", "fox", "stone"], 40).tolist()) for _ in range(30)]
    text = tmp_path / "text.jsonl"
    documents = [*first, *first, "", *later]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    config = config_for(lm, text, tmp_path / "acts.zarr", tokens=2000, heldout_tokens=100)
    quiet(config)
    before = content(config.out)
    message = (
        f"^Dataset '{text}' has text for ([0-9,]+) training rows, those that are there included, and "
        rf"90,000 were asked for\. Store {config.out} is as it was\. Pass --tokens (\d+) or less "
        r"\(the tokens are kept, so that this will be quick\)\.$"
    )
    with pytest.raises(InputError, match=message) as raised:
        quiet(replace(config, tokens=90_000, extend=True))
    after = content(config.out)
    assert before == {name: data for name, data in after.items() if ".extending/" not in name}
    fitting = int(str(raised.value).split("--tokens ")[1].split()[0])
    quiet(replace(config, tokens=fitting, extend=True))
    corpus = open_store(config.out).corpus
    records = np.unique(corpus.train.documents(0, corpus.train.n_contexts))
    assert not np.isin(records, np.arange(60, 121)).any()
    assert (records > 120).any()
    (counts,) = corpus.info["extensions"]
    assert counts["left_out"] == {"duplicate": 60, "empty": 1}
    whole = (
        rf"^Dataset '{text}' holds no text for more than the {fitting:,} training rows that are "
    )
    with pytest.raises(InputError, match=whole + r"there\. Store .*acts\.zarr is as it was\.$"):
        quiet(replace(config, tokens=90_000, extend=True))


def test_the_rows_that_the_last_context_has_to_spare_need_no_text(
    lm: Path, text: Path, copy: Path
) -> None:
    digest = Corpus(copy / "corpus").digest
    spare = Corpus(copy / "corpus").train.n_rows
    assert spare > BEFORE
    quiet(config_for(lm, text, copy, tokens=spare, extend=True))
    opened = open_store(copy)
    assert opened.corpus.digest == digest
    np.testing.assert_array_equal(sources(opened), expected_sources(opened, [BEFORE]))
    assert damages(copy) == []


def test_the_same_command_again_has_nothing_to_do(lm: Path, text: Path, grown: Path) -> None:
    said: list[str] = []
    for extend in (True, False):
        config = config_for(lm, text, grown, tokens=AFTER, extend=extend)
        harvest(config, say=said.append, show_progress=False)
    assert said == [f"{grown} is complete: 9,000 rows of this recipe. Nothing to do."] * 2


def test_a_dry_run_says_what_more_rows_will_take_and_writes_nothing(
    lm: Path, text: Path, copy: Path
) -> None:
    before = content(copy)
    said: list[str] = []
    config = config_for(lm, text, copy, tokens=AFTER, extend=True)
    harvest(config, say=said.append, show_progress=False, dry_run=True)
    assert said[0] == (
        "rows      3,000 training rows behind the 6,000 that are there, of 32 values in 1 store, "
        "18 shards of 512 rows each"
    )
    assert len(said) == 4
    assert content(copy) == before


def test_the_plan_says_when_a_store_that_was_small_keeps_small_shards(
    lm: Path, text: Path, tmp_path: Path
) -> None:
    config = config_for(lm, text, tmp_path / "acts.zarr", tokens=2100, shard_rows=None)
    quiet(config)
    said: list[str] = []
    large = replace(config, tokens=20_000, extend=True)
    harvest(large, say=said.append, show_progress=False, dry_run=True)
    assert said[4:] == [
        "shards    keep their 256 rows; those of a new store of this size would have 2,048, and be 8 "
        "times fewer files"
    ]


def test_a_store_that_was_opened_before_goes_on_with_its_rows(
    lm: Path, text: Path, store: Path, copy: Path
) -> None:
    old, whole = open_store(copy), open_store(store)
    quiet(config_for(lm, text, copy, tokens=6100, extend=True))
    same_rows(old, whole, BEFORE)
    quiet(config_for(lm, text, copy, tokens=AFTER, extend=True))
    same_rows(old, whole, BEFORE)
    assert len(old.read(slice(5000, None))) == 1000
    np.testing.assert_array_equal(old.corpus.train.tokens(0, 5), whole.corpus.train.tokens(0, 5))
    message = (
        f"^{copy}/statistics/mean/c/0 is not the one that was there when {copy} was opened: the store "
        r"was extended or repaired since\. Open it again\.$"
    )
    with pytest.raises(StoreError, match=message):
        _ = old.mean


def interrupt_while_switching(config: HarvestConfig) -> None:
    """Extend a store up to where its files are at their places, and its manifest is not."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(extension, "write_card", interrupt)
        with pytest.raises(Interrupted):
            quiet(config)


@pytest.mark.parametrize("how", ["closed", "evicted"])
def test_an_index_that_was_read_before_is_not_used_on_the_larger_file(
    lm: Path, text: Path, store: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    old, whole = open_store(copy), open_store(store)
    if how == "closed":
        old.read([5999])
        old.close()
    else:  # as the descriptor of one of more than 256 shards
        with monkeypatch.context() as patched:
            patched.setattr(rows_module, "_OPEN_FILES", 1)
            old.read([5999])
            old.read([0])
    for n_rows in (6100, AFTER):
        quiet(config_for(lm, text, copy, tokens=n_rows, extend=True))
        with ThreadPoolExecutor(4) as pool:  # several of which find the larger file at once
            read = list(pool.map(old.read, [slice(5600, 6000)] * 8))
        for each in read:
            np.testing.assert_array_equal(each, whole.read(slice(5600, 6000)))
        old.close()
    same_rows(old, whole, BEFORE)


def test_a_descriptor_of_the_file_before_stays_open_for_who_reads_it_and_is_closed_in_the_end(
    lm: Path, text: Path, store: Path, copy: Path
) -> None:
    old, whole = open_store(copy), open_store(store)
    reader = old.train_reader
    quiet(config_for(lm, text, copy, tokens=AFTER, extend=True))
    before = os.open(store / "activations/c/11/0", os.O_RDONLY)
    reader._files[11] = before  # of a thread that has opened it an instant before
    old.read([5999])
    assert reader._files[11] == before  # its rows are all in it
    reader._indices.clear()
    with (copy / "activations/c/11/0").open("rb") as larger:
        os.dup2(larger.fileno(), before)  # as if it had been opened an instant later
    np.testing.assert_array_equal(old.read([5999]), whole.read([5999]))
    assert reader._files[11] != before
    os.fstat(before)
    old.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(before)


def test_a_reader_goes_on_while_the_files_are_put_to_their_places(
    lm: Path, text: Path, store: Path, copy: Path
) -> None:
    fresh, touched, late = open_store(copy), open_store(copy), open_store(copy)
    touched.read([5999])
    touched.close()
    config = config_for(lm, text, copy, tokens=AFTER, extend=True)
    interrupt_while_switching(config)
    assert json.loads((copy / "manifest.json").read_text())["state"] == "extending"
    for old in (fresh, touched):
        same_rows(old, open_store(store), BEFORE)
    aside = copy.with_name("aside")
    shutil.move(copy / ".extending", aside)
    message = (
        f"^Store {copy} was extended or repaired since it was opened, and shard 11 is another file "
        r"now\. Open it again\.$"
    )
    with pytest.raises(StoreError, match=message):
        late.read([5999])
    (copy / ".extending").symlink_to(aside)  # nothing is taken from where a link leads to
    with pytest.raises(StoreError, match=r"^Shard 11 of .* is damaged: "):
        late.read([5999])
    (copy / ".extending").unlink()
    shutil.move(aside, copy / ".extending")
    quiet(config)
    same_rows(late, open_store(store), BEFORE)
    assert open_store(copy).n_rows == AFTER


def test_a_store_in_whose_place_another_is_meanwhile_asks_to_be_opened_again(
    store: Path, copy: Path, small_store: ActivationStore
) -> None:
    old = open_store(copy)
    shutil.rmtree(copy)
    shutil.copytree(small_store.path, copy)
    message = (
        f"^Store {copy} was extended or repaired since it was opened, and shard 11 is another file "
        r"now\. Open it again\.$"
    )
    with pytest.raises(StoreError, match=message):
        old.read([5999])


class Interrupted(Exception): ...


def fit_for_12_batches(opened: ActivationStore, config: FitConfig, run: Path) -> None:
    """Begin a run, and leave it as an interruption does."""
    served = 0

    def until_12(loader: BatchLoader) -> Rows:
        nonlocal served
        served += 1
        if served > 12:
            raise Interrupted
        return following(loader)

    following = BatchLoader.__next__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BatchLoader, "__next__", until_12)
        with pytest.raises(Interrupted):
            fit(opened, config, out=run, show_progress=False)


def test_a_fit_goes_on_with_the_rows_that_it_was_begun_with(
    lm: Path, text: Path, copy: Path, store: Path, tmp_path: Path
) -> None:
    """Interrupted after 12 batches, before the store grows, it comes to the weights of one that was not."""
    config = FitConfig(arch="topk", k=4, d_sae=64, batch_size=256, device="cpu", tokens=8192)
    fit(open_store(store), config, out=tmp_path / "whole", show_progress=False)
    run = tmp_path / "run"

    fit_for_12_batches(open_store(copy), config, run)
    quiet(config_for(lm, text, copy, tokens=AFTER, extend=True))
    said: list[str] = []
    before = open_to_fit(copy, run, follow=False, say=said.append)
    assert said == [
        f"{copy} was extended to 9,000 rows since: going on with the 6,000 that it was begun with."
    ]
    same_rows(before, open_store(store), BEFORE)
    fit(before, config, out=run, show_progress=False)
    weights = [folder / "sae.safetensors" for folder in (run, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    message = (
        r"that of the 6,000 rows before it was extended is not kept\. Open the store itself\.$"
    )
    with pytest.raises(StoreError, match=message):
        _ = before.mean
    # A new run gets all rows.
    new = open_to_fit(copy, tmp_path / "new", follow=False, say=said.append)
    loader = new.batches(AFTER)
    rows = loader.to_floats(next(iter(loader)))
    loader.close()
    np.testing.assert_allclose(rows.mean(0, dtype=np.float64), new.mean, rtol=1e-6, atol=1e-7)
    # A fit that was begun while the store was being harvested has its rows pinned by their number.
    assert open_prefix(copy, 5632, 0).n_rows == 5632
    message = (
        f"^Store {copy} had 6,000 train rows before it was extended, and its shard 11 holds more by "
        r"now\. Pass another --out to fit from the store as it is\.$"
    )
    with pytest.raises(StoreError, match=message):
        open_prefix(copy, 6000, 0)


class Harvested:
    """A copy of a complete store as it looked when so many of its shards were sealed."""

    def __init__(self, path: Path, shards: int) -> None:
        self.path, self.manifest = path, read_manifest(path)
        unfinished = json.loads(json.dumps(self.manifest)) | {"state": "harvesting"}
        for split, n_sealed in (("train", shards), ("heldout", None)):
            unfinished[split]["shards"] = []
            for shard, record in enumerate(self.manifest[split]["shards"][:n_sealed]):
                write_json(path / COMMITS / split / f"{shard:08d}.json", record)
        for name in ("statistics", "files", "digest", "shuffle"):
            unfinished.pop(name)
        write_json(path / "manifest.json", unfinished)

    def finish(self) -> None:
        write_json(self.path / "manifest.json", self.manifest)
        shutil.rmtree(self.path / COMMITS)


@pytest.mark.parametrize("follow", [True, False], ids=["followed", "prefix"])
def test_a_fit_that_was_begun_during_the_harvest_goes_on_after_extensions_to_the_same_weights(
    lm: Path, text: Path, copy: Path, store: Path, tmp_path: Path, follow: bool
) -> None:
    config = FitConfig(arch="topk", k=4, d_sae=64, batch_size=256, device="cpu", tokens=8192)
    run, said = tmp_path / "run", list[str]()
    harvested = Harvested(copy, shards=12 if follow else 6)
    begun = open_to_fit(copy, run, follow=follow, say=said.append)
    fit_for_12_batches(begun, config, run)
    harvested.finish()
    for n_rows in (6100, AFTER):
        quiet(config_for(lm, text, copy, tokens=n_rows, extend=True))
    said.clear()
    again = open_to_fit(copy, run, follow=follow, say=said.append)
    assert (again.digest, again.n_rows) == (begun.digest, 6000 if follow else 3072)
    assert said == [
        f"{copy} was extended to 9,000 rows since: going on with the 6,000 that it was begun with."
        if follow
        else f"{copy} is complete by now: going on with its first 3,072 rows, 6 of 18 shards that it "
        "was begun with."
    ]
    fit(again, config, out=run, show_progress=False)
    at_once = follow_store(store) if follow else open_prefix(store, 3072, begun.heldout.n_rows)
    fit(at_once, config, out=tmp_path / "whole", show_progress=False)
    weights = [folder / "sae.safetensors" for folder in (run, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    if follow:
        message = (
            r"that of the 6,000 rows before it was extended is not kept\. Open the store itself\.$"
        )
        with pytest.raises(StoreError, match=message):
            _ = again.mean
        assert follow_store(copy).n_rows == AFTER


def test_who_follows_a_store_that_is_extended_before_all_is_read_gets_the_rows_it_was_to_have(
    lm: Path, text: Path, copy: Path, store: Path
) -> None:
    harvested, whole = Harvested(copy, shards=2), open_store(store)
    unaware, aware, done = follow_store(copy), follow_store(copy), follow_store(copy)
    for each in (unaware, aware, done):
        each.read([0])
    harvested.finish()
    aware.read([600 * 5])  # knows the records of that time from now on
    done.read([5999])
    done.train_reader.close()
    config = config_for(lm, text, copy, tokens=AFTER, extend=True)
    interrupt_while_switching(config)
    said: list[str] = []
    for each in (unaware, aware):
        each.while_waiting(lambda: True, said.append)
        with pytest.raises(WaitEnded):  # it waits for the files to be at their places
            each.read([5999])
        each.while_waiting(lambda: False, said.append)
    assert writer_of(copy) == (
        "An extension of it was interrupted: run the `sae-pipe harvest --extend` command once more."
    )
    np.testing.assert_array_equal(done.read(slice(5000, 6000)), whole.read(slice(5000, 6000)))
    quiet(config)
    for each in (unaware, aware, done):
        assert each.n_rows == BEFORE
        same_rows(each, whole, BEFORE)


@pytest.mark.parametrize(
    "changes",
    [{"recipe": None}, {"corpus": "no digest"}, {"rows": 0}, {"rows": 10**9}, {"statistics": 1.0}],
    ids=str,
)
def test_what_is_noted_of_an_extension_counts_only_if_it_is_of_our_form(
    grown: Path, changes: dict[str, Any]
) -> None:
    manifest = read_manifest(grown)
    assert len(manifests_before(manifest)) == 1
    manifest["provenance"]["extensions"][0] |= changes
    assert manifests_before(manifest) == []


def test_parts_recodings_and_the_order_of_an_extended_store_are_those_of_any(
    grown: Path, tmp_path: Path
) -> None:
    opened = open_store(grown)
    pull(grown, tmp_path / "part.zarr", Part(rows=7000), say=lambda line: None)
    part = open_store(tmp_path / "part.zarr")
    np.testing.assert_array_equal(part.read(slice(None)), opened.read(slice(0, part.n_rows)))
    assert damages(part.path) == []
    recode(grown, tmp_path / "plain.zarr", "none", say=lambda line: None)
    recoded = open_store(tmp_path / "plain.zarr")
    np.testing.assert_array_equal(recoded.read(slice(None)), opened.read(slice(None)))
    assert measure_shuffle(recoded)["failures"] == []
    assert measure_shuffle(part)["failures"] == []


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_made_extension_by_extension_are_those_of_the_whole_store_with_cuts(
    counted: RowMap, data: st.DataObject
) -> None:
    n_rows = data.draw(st.integers(300, 2000), "rows")
    sizes = {"chunk_rows": 16, "shard_rows": 64, "block_rows": 64 * data.draw(st.integers(1, 8))}
    cuts = sorted(data.draw(st.sets(st.integers(1, n_rows - 1), max_size=4), "cuts"))
    bounds = [0, *cuts, n_rows]

    def rows_of(layout: Layout, number: int, first: int) -> list[NDArray[np.int64]]:
        made = RowMap(
            counted.table,
            counted.rule,
            counted.mask,
            shuffle_seed=7,
            counted_by=counted,
            cuts=tuple(cuts[:number]),
            first_row=first,
        )
        blocks = range(first // layout.block_rows, layout.n_blocks)
        rows = [made.block(layout, block) for block in blocks]
        assert all(each.part_ends[-1] == each.n_contexts for each in rows)
        return [each.stored(each.source_R) for each in rows]

    in_turn = [
        part
        for number, (first, last) in enumerate(itertools.pairwise(bounds))
        for part in rows_of(Layout(n_rows=last, d_in=8, **sizes), number, first)
    ]
    at_once = rows_of(Layout(n_rows=n_rows, d_in=8, **sizes), len(cuts), 0)
    np.testing.assert_array_equal(np.concatenate(in_turn), np.concatenate(at_once))
    assert len(np.unique(np.concatenate(at_once))) == n_rows
