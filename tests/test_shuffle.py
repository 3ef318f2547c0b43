"""The shuffle of stores: those that pass, planted failures, every row once for any recipe."""

# C contexts, T positions of a context, R rows of a store

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.batches import TorchBatches
from sae_pipe.stages.masking import MaskConfig
from sae_pipe.stages.row_map import KeepRule, RowMap
from sae_pipe.storage import ActivationStore, InputError, StoreError, open_store
from sae_pipe.storage.builder import StoreBuilder
from sae_pipe.storage.corpus import Corpus
from sae_pipe.storage.corpus_writer import complete, create_groups, write_split
from sae_pipe.storage.counter import is_drawn, permutation, stream_key
from sae_pipe.storage.layout import Layout
from sae_pipe.storage.order import Order
from sae_pipe.storage.shuffle import failures, measure_shuffle, positions_to_read
from sae_pipe.storage.shuffle_order import served_rows
from sae_pipe.storage.values import round_to_bfloat16

Ints = NDArray[np.int64]
T, C, EOS = 32, 600, 0
LAYOUT = {"d_in": 2, "chunk_rows": 64, "shard_rows": 1024, "block_rows": 4096}


# --- stores ---


def contexts(*, packed: bool) -> dict[str, NDArray[np.uint32]]:
    """C contexts of documents of 20 to 199 tokens, permuted; unpacked ones have any length."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(20, 200, C)
    document = np.repeat(np.arange(C, dtype=np.uint32), lengths)[: C * T]
    tokens = rng.integers(1, 64, C * T).astype(np.uint32)
    tokens[np.cumsum(lengths)[np.cumsum(lengths) <= C * T] - 1] = EOS
    origin = permutation(stream_key(0, "contexts", "train"), C)
    return {
        "tokens": tokens.reshape(C, T)[origin],
        "document": document.reshape(C, T)[origin],
        "length": np.full(C, T, np.uint32) if packed else rng.integers(1, T, C).astype(np.uint32),
        "origin": origin.astype(np.uint32),
    }


CORPUS_CONFIG = {"context_size": T, "keep_first": False}


def write_corpus(folder: Path, *, packed: bool = True) -> Corpus:
    tables = contexts(packed=packed)
    create_groups(folder)
    write_split(
        folder, "train", C, T, lambda a, b: {name: whole[a:b] for name, whole in tables.items()}
    )
    recipe = {"config": CORPUS_CONFIG, "tokenizer": {"bos_id": EOS}}
    complete(folder, {"recipe": recipe, "splits": {"train": {"contexts": C, "rows": 0}}})
    return Corpus(folder)


def row_map(
    corpus: Corpus,
    *,
    p: float = 0.0,
    keep_first: bool = False,
    drop_masked: bool = False,
    seed: int = 0,
) -> RowMap:
    return RowMap(
        corpus.train,
        KeepRule(keep_first=keep_first, bos_id=EOS, drop_masked=drop_masked),
        MaskConfig(p=p, mask_id=5, seed=seed, special_ids=(EOS,)),
        shuffle_seed=seed,
    )


def shuffled_sources(rows: RowMap, layout: Layout) -> Ints:
    """The sources of a store as a harvest writes them."""
    blocks = [rows.block(layout, number) for number in range(layout.n_blocks)]
    return np.concatenate([block.stored(block.source_R) for block in blocks])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def write_rows(
    path: Path, source_R: Ints, layout: dict[str, int], **recipe: Any
) -> ActivationStore:
    """A store of rows of these sources; row number r is the values (r // 128, r % 128)."""
    if not (path / "corpus").exists():
        write_corpus(path / "corpus")
    tokens = {"config": CORPUS_CONFIG, "source": {"kind": "test"}}
    builder = StoreBuilder.begin(path, {}, {"corpus": tokens} | recipe, "lossless")
    builder.lay_out(Layout(n_rows=len(source_R), **layout), Layout(n_rows=0, **layout), {})
    numbers = np.arange(len(source_R))
    bits = round_to_bfloat16(np.stack([numbers // 128, numbers % 128], 1).astype(np.float32))
    with ThreadPoolExecutor(1) as pool:
        train, heldout = builder.writers(pool)
        for shard in range(train.layout.n_shards):
            rows = slice(*train.layout.rows_of_shard(shard))
            train.write(shard, bits[rows], source_R[rows], np.zeros(len(bits[rows]), np.bool_))
        builder.finish(train, heldout)
    return open_store(path)


def sources(corpus: Corpus, **layout: int) -> Ints:
    rows = row_map(corpus)
    return shuffled_sources(rows, Layout(n_rows=rows.available_rows, **(LAYOUT | layout)))


def in_text_order(corpus: Corpus) -> Ints:
    source, origin = np.sort(sources(corpus)), corpus.train.origins(0, C).astype(np.int64)
    return source[np.argsort(origin[source // T], kind="stable")]


def test_a_store_of_permuted_blocks_passes_with_what_is_predicted_of_it(
    corpus: Corpus, tmp_path: Path
) -> None:
    small = {"shard_rows": 128, "block_rows": 1024}  # groups of a few of many blocks
    store = write_rows(tmp_path / "acts.zarr", sources(corpus, **small), LAYOUT | small)
    measured = measure_shuffle(store)
    assert measured["failures"] == []
    assert measured["exactly_once"] == {"repeated": 0, "missing": 0, "foreign": 0}
    assert measured["spearman"]["corpus"] > 0.9  # the blocks follow the corpus, which is permuted
    contexts = measured["batches"]["contexts"]
    assert contexts["met"] > 1.2 * contexts["expected"]
    np.testing.assert_allclose(contexts["met"], contexts["predicted"], rtol=0.05)
    np.testing.assert_allclose(measured["runs"]["met"], measured["runs"]["expected"], rtol=0.05)


def test_the_expected_numbers_are_those_of_the_stores_rows(corpus: Corpus, tmp_path: Path) -> None:
    source = sources(corpus)
    measured = measure_shuffle(write_rows(tmp_path / "acts.zarr", source, LAYOUT), batch_size=500)
    documents = corpus.train.documents(0, C).reshape(-1)[source]
    for name, groups in (("contexts", source // T), ("documents", documents)):
        n = np.unique(groups, return_counts=True)[1]
        expected = 499 * (n * (n - 1)).sum() / (len(source) * (len(source) - 1))
        np.testing.assert_allclose(measured["batches"][name]["expected"], expected, rtol=1e-5)
        np.testing.assert_allclose(measured["batches"][name]["met"], expected, rtol=0.05)


def test_the_measured_batches_are_those_of_the_reader(corpus: Corpus, tmp_path: Path) -> None:
    store = write_rows(tmp_path / "acts.zarr", sources(corpus), LAYOUT)
    batches = TorchBatches(store, batch_size=700)
    order = Order(layout=store._train.layout, seed=0)
    for number in range(60):  # two epochs
        rows = next(batches).numpy().astype(np.int64) @ [128, 1]
        served = served_rows(order, number * 700, (number + 1) * 700)
        assert served.tolist() == rows.tolist()
    batches.close()


def buffered(source_R: Ints, buffer_rows: int) -> Ints:
    """Rows in text order through a shuffle buffer: a random one leaves, the next one comes in."""
    rng, held, out = np.random.default_rng(5), source_R[:buffer_rows].tolist(), []
    for source in source_R[buffer_rows:].tolist():
        place = int(rng.integers(buffer_rows))
        out.append(held[place])
        held[place] = source
    return np.array(out + rng.permutation(held).tolist())


def one_twice(source_R: Ints) -> Ints:
    changed = source_R.copy()
    changed[77] = changed[5000]
    return changed


def not_of_the_corpus(source_R: Ints) -> Ints:
    changed = source_R.copy()
    changed[77] = C * T  # beyond the corpus
    changed[78] = T * 3  # the first position of a context
    return changed


FEW_SHARDS, MANY_SHARDS = LAYOUT, LAYOUT | {"shard_rows": 128, "block_rows": 128}
FAILURES: dict[str, tuple[dict[str, int], Callable[[Corpus], Ints], str]] = {
    "text order": (
        FEW_SHARDS,
        in_text_order,
        "the stored order follows the text (Spearman 1.000, at most 0.204 is chance); its stored "
        "ranges hold different parts of the text (chi-square 306 a degree of freedom, at most 58.1 "
        "is chance); its shards hold different parts of the text (chi-square 267 a degree of "
        "freedom, at most 55.4 is chance); rows are not permuted inside blocks (576 stored rows "
        "meet 29.2 of their own context each, at most 7.2 is allowed)",
    ),
    "a buffer": (
        FEW_SHARDS,
        lambda corpus: buffered(in_text_order(corpus), 1024),
        "the stored order follows the text (Spearman 0.983, at most 0.201 is chance); its stored "
        "ranges hold different parts of the text (chi-square 39.1 a degree of freedom, at most 9.13 "
        "is chance); its shards hold different parts of the text (chi-square 104 a degree of "
        "freedom, at most 21.1 is chance)",
    ),
    "contexts permuted, rows not": (
        FEW_SHARDS,
        lambda corpus: np.sort(sources(corpus)),
        "rows are not permuted inside blocks (576 stored rows meet 29.2 of their own context each, "
        "at most 7.2 is allowed)",
    ),
    "blocks of one small shard": (
        MANY_SHARDS,
        lambda corpus: np.sort(sources(corpus)),
        "rows of a batch of 576 meet 4.17 of their own context each (at most 1.85 is allowed)",
    ),
    "a row twice": (
        FEW_SHARDS,
        lambda corpus: one_twice(sources(corpus)),
        "rows that stand in it more than once: 1; rows that are missing: 1",
    ),
    "a row missing": (
        FEW_SHARDS,
        lambda corpus: sources(corpus)[1:],  # so that the last row of the text is one too many
        "rows that are missing: 1; rows that should not be there: 1",
    ),
    "rows of no position": (
        FEW_SHARDS,
        lambda corpus: not_of_the_corpus(sources(corpus)),
        "rows that are missing: 2; rows that should not be there: 2",
    ),
}


def verify(path: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["store", "verify", str(path), *options])


@pytest.mark.parametrize("name", FAILURES)
def test_a_store_that_is_not_shuffled_fails_with_what_is_wrong(
    corpus: Corpus, tmp_path: Path, name: str
) -> None:
    layout, plant, message = FAILURES[name]
    store = write_rows(tmp_path / "acts.zarr", plant(corpus), layout)
    result = verify(store.path, "--shuffle")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: Store {store.path} is not shuffled: {message}. "
        "Harvest it again; larger blocks (--block-gb) mix better."
    )
    assert f"verdict      not shuffled: {message}" in result.stdout


def test_a_reader_that_follows_the_text_would_fail(corpus: Corpus, tmp_path: Path) -> None:
    measured = measure_shuffle(write_rows(tmp_path / "acts.zarr", sources(corpus), LAYOUT))
    assert failures(measured) == []
    measured["spearman"]["reader"] = -0.4
    assert failures(measured) == [
        "the reader's order follows the text (Spearman -0.400, at most 0.036 is chance)"
    ]


def test_rows_of_masked_positions_that_were_dropped_are_not_missing(
    corpus: Corpus, tmp_path: Path
) -> None:
    rows = row_map(corpus, p=0.3, drop_masked=True)
    source = shuffled_sources(rows, Layout(n_rows=rows.available_rows, **LAYOUT))
    store = write_rows(tmp_path / "acts.zarr", source, LAYOUT, drop_masked=True)
    measured = measure_shuffle(store)
    assert measured["failures"] == []
    assert measured["exactly_once"] == {"repeated": 0, "missing": None, "foreign": 0}
    kept = write_rows(tmp_path / "kept.zarr", source, LAYOUT)  # the same, but says it dropped none
    assert measure_shuffle(kept)["exactly_once"]["missing"] > 3000


def test_a_sample_of_shards_tells_the_same_but_for_missing_rows(
    corpus: Corpus, tmp_path: Path
) -> None:
    store = write_rows(tmp_path / "acts.zarr", sources(corpus), LAYOUT)
    whole, sample = measure_shuffle(store), measure_shuffle(store, max_rows=6000)
    assert sample["rows_read"] == 4 * 1024 + 2
    assert sample["exactly_once"] == {"repeated": 0, "missing": None, "foreign": 0}
    assert sample["batches"] == whole["batches"]
    assert sample["failures"] == []
    planted = write_rows(tmp_path / "planted.zarr", in_text_order(corpus), LAYOUT)
    assert (
        "the stored order follows the text"
        in measure_shuffle(planted, max_rows=6000)["failures"][0]
    )


def test_without_tokens_documents_are_unknown_and_contexts_are_not(
    corpus: Corpus, tmp_path: Path
) -> None:
    tokens = {"config": CORPUS_CONFIG}
    store = write_rows(tmp_path / "acts.zarr", sources(corpus), LAYOUT, corpus=tokens)
    result = verify(store.path, "--shuffle")
    assert result.exit_code == 2  # its blocks follow the corpus, whose order in the text is unknown
    assert "  documents  no tokens: documents are unknown" in result.stdout
    rng = np.random.default_rng(6)
    one_block = LAYOUT | {"block_rows": 19 * 1024}
    uniform = rng.permutation(sources(corpus))
    store = write_rows(tmp_path / "uniform.zarr", uniform, one_block, corpus=tokens)
    measured = measure_shuffle(store)
    assert measured["failures"] == []
    assert measured["batches"]["documents"] is None
    assert measured["exactly_once"]["missing"] is None


def test_sources_that_no_context_can_have_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    tokens = {"config": CORPUS_CONFIG}
    source = sources(corpus) * 2**30
    store = write_rows(tmp_path / "acts.zarr", source, LAYOUT, corpus=tokens)
    largest = int(source.max()) // T * T + T
    message = (
        f"^The source indices of {store.path} reach {largest:,}, and it has 18,434 rows: they are "
        r"no positions of contexts of 32\. Fetch or import the store again\.$"
    )
    with pytest.raises(StoreError, match=message):
        measure_shuffle(store)


def test_a_store_without_context_size_cannot_be_measured(small_store: ActivationStore) -> None:
    result = verify(small_store.path, "--shuffle")
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: Store {small_store.path} does not record its context size, so its rows' contexts "
        "are unknown and its shuffle cannot be measured.\n"
    )


@pytest.mark.parametrize("n_rows", [0, 1, 2, 100])
def test_a_store_of_a_few_rows_is_measured_as_far_as_that_goes(
    corpus: Corpus, tmp_path: Path, n_rows: int
) -> None:
    rows = row_map(corpus)
    source = shuffled_sources(rows, Layout(n_rows=n_rows, **LAYOUT)) if n_rows else np.arange(0)
    store = write_rows(tmp_path / "acts.zarr", source, LAYOUT)
    assert verify(store.path, "--shuffle").exit_code == 0


def test_batches_larger_than_the_store_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    store = write_rows(tmp_path / "acts.zarr", sources(corpus), LAYOUT)
    message = r"^A batch of 20000 rows cannot be had of 18434\. Pass --batch-size from 1 to that\.$"
    with pytest.raises(InputError, match=message):
        measure_shuffle(store, batch_size=20_000)
    result = verify(store.path, "--json")
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: --batch-size and --json belong to --shuffle. Add it, or leave them out.\n"
    )


def test_a_harvest_writes_the_numbers_that_verify_measures(store: Path) -> None:
    opened = open_store(store)
    result = verify(store, "--shuffle", "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)
    assert opened.manifest["shuffle"] == measured
    assert measured["failures"] == []
    assert measured["exactly_once"] == {"repeated": 0, "missing": 0, "foreign": 0}
    looked_at: list[int] = []
    measure_shuffle(opened, advance=looked_at.append)
    assert sum(looked_at) == positions_to_read(opened)
    assert "verdict      shuffled: rows of a batch of " in verify(store, "--shuffle").stdout


# --- every row exactly once, for any recipe ---


@pytest.fixture(scope="module")
def corpora(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Corpus]:
    folder = tmp_path_factory.mktemp("unpacked") / "corpus"
    return {True: corpus, False: write_corpus(folder, packed=False)}


def rows_by_definition(
    corpus: Corpus, *, p: float, keep_first: bool, drop_masked: bool, seed: int
) -> list[int]:
    table, key = corpus.train, stream_key(seed, "mask")
    tokens, lengths = table.tokens(0, C).tolist(), table.lengths(0, C).tolist()
    masked = is_drawn(key, np.arange(C * T), p).tolist()
    return [
        context * T + position
        for context in range(C)
        for position in range(lengths[context])
        if keep_first or (position > 0 and tokens[context][position] != EOS)
        if not (drop_masked and masked[context * T + position] and tokens[context][position] != EOS)
    ]


@settings(max_examples=25, deadline=None)
@given(
    packed=st.booleans(),
    p=st.sampled_from([0.0, 0.3, 0.9]),
    keep_first=st.booleans(),
    drop_masked=st.booleans(),
    seed=st.integers(0, 3),
    share=st.floats(0.01, 1.0),
    shard_chunks=st.integers(1, 20),
    block_shards=st.integers(1, 5),
)
def test_every_position_that_should_be_there_is_there_exactly_once(
    corpora: dict[bool, Corpus],
    packed: bool,
    p: float,
    keep_first: bool,
    drop_masked: bool,
    seed: int,
    share: float,
    shard_chunks: int,
    block_shards: int,
) -> None:
    recipe: dict[str, Any] = {"p": p, "keep_first": keep_first, "drop_masked": drop_masked}
    corpus = corpora[packed]
    expected = rows_by_definition(corpus, seed=seed, **recipe)
    rows = row_map(corpus, seed=seed, **recipe)
    assert rows.available_rows == len(expected)
    n_rows = max(int(share * len(expected)), 1)
    shard_rows = 64 * shard_chunks
    layout = Layout(
        n_rows=n_rows,
        d_in=2,
        chunk_rows=64,
        shard_rows=shard_rows,
        block_rows=shard_rows * block_shards,
    )
    source_R = shuffled_sources(rows, layout)
    for block in range(layout.n_blocks):
        part = slice(*layout.rows_of_block(block))
        assert sorted(source_R[part].tolist()) == expected[part]
    assert len(source_R) == n_rows
