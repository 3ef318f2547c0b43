"""The token corpus read back, whole and damaged."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import dask.array
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from sae_pipe.stages.corpus import CorpusConfig, build_corpus
from sae_pipe.stages.sources import TextSource
from sae_pipe.stages.tokens import TextTokenizer
from sae_pipe.storage.corpus import Corpus
from sae_pipe.storage.errors import InputError, StoreError
from sae_pipe.storage.files import write_json

CONFIG = CorpusConfig(context_size=32, train_rows=4000, heldout_rows=400)
WriteSource = Callable[[Path, Sequence[object]], TextSource]


def _build(
    folder: Path, source: TextSource, tokenizer: TextTokenizer, config: CorpusConfig = CONFIG
) -> Corpus:
    return build_corpus(folder, config, source, tokenizer, show_progress=False)


@pytest.fixture
def corpus(tmp_path: Path, source: TextSource, plain: TextTokenizer) -> Corpus:
    return _build(tmp_path / "acts.zarr" / "corpus", source, plain)


def test_plain_readers_see_the_same_numbers(corpus: Corpus) -> None:
    zarr.open_group(corpus.path.parent, mode="a", zarr_format=3)  # the store around it
    root = zarr.open_group(corpus.path.parent, mode="r")
    n = corpus.train.n_contexts
    tokens = root["corpus/train/tokens"]
    assert isinstance(tokens, zarr.Array)
    assert tokens.dtype == "uint32"
    assert np.array_equal(np.asarray(tokens[:]), corpus.train.tokens(0, n))
    lazy: NDArray[np.uint32] = dask.array.from_zarr(
        str(corpus.path), component="train/document"
    ).compute()
    assert np.array_equal(lazy, corpus.train.documents(0, n))


def test_zeros_are_written_and_not_left_to_the_fill_value(
    write_source: WriteSource, tmp_path: Path, plain: TextTokenizer
) -> None:
    """All tokens of the first record: the document array is nothing but zeros."""
    source = write_source(tmp_path / "x.jsonl", [{"text": "the fox " * 100}])
    config = replace(CONFIG, train_rows=None, heldout_rows=0)
    corpus = _build(tmp_path / "corpus", source, plain, config)
    assert "train/document/c/0/0" in corpus.info["files"]
    assert not corpus.train.documents(0, corpus.train.n_contexts).any()


@pytest.mark.parametrize("name", ["train/tokens/c/0/0", "heldout/length/zarr.json"])
def test_a_missing_file_is_an_error_at_opening(corpus: Corpus, name: str) -> None:
    (corpus.path / name).unlink()
    message = (
        f"Corpus {corpus.path} is damaged: {name} is missing. Run `sae-pipe store repair` on its "
        "store, which copies it from a store beside it that has the same tokens, or harvest into a "
        "new folder."
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        Corpus(corpus.path)


def test_a_truncated_chunk_is_an_error_at_opening(corpus: Corpus) -> None:
    path = corpus.path / "train/tokens/c/0/0"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100])
    message = (
        f"Corpus {corpus.path} is damaged: train/tokens/c/0/0 has 100 bytes instead of {size}. "
        "Run `sae-pipe store repair` on its store, which copies it from a store beside it that has "
        "the same tokens, or harvest into a new folder."
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        Corpus(corpus.path)


def test_a_flipped_bit_is_an_error_when_it_is_read_and_when_verified(corpus: Corpus) -> None:
    path = corpus.path / "train/tokens/c/0/0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    opened = Corpus(corpus.path)
    with pytest.raises(StoreError, match=r"is damaged: .*train/tokens cannot be read \("):
        opened.train.tokens(0, 1)
    message = "train/tokens/c/0/0 does not have the SHA-256 recorded for it"
    with pytest.raises(StoreError, match=f"is damaged: {message}"):
        opened.verify()


def test_corpus_json_that_was_changed_is_an_error(corpus: Corpus) -> None:
    info = json.loads((corpus.path / "corpus.json").read_text())
    info["splits"]["train"]["rows"] += 1
    write_json(corpus.path / "corpus.json", info)
    with pytest.raises(StoreError, match=r"corpus\.json does not match its own digest"):
        Corpus(corpus.path)
    (corpus.path / "corpus.json").write_text('{"format": 1, ')
    with pytest.raises(StoreError, match=r"corpus\.json is not the JSON that was written"):
        Corpus(corpus.path)


def test_a_newer_format_is_an_error_that_says_so(corpus: Corpus) -> None:
    write_json(corpus.path / "corpus.json", {"format": 2})
    message = (
        f"Corpus {corpus.path} has format version 2, but this sae-pipe reads up to 1. "
        "Upgrade sae-pipe."
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        Corpus(corpus.path)


def test_what_is_no_corpus_is_an_error(tmp_path: Path) -> None:
    message = (
        f"{tmp_path} is not a token corpus: it has no corpus.json. Pass the `corpus` folder of a "
        "store that `sae-pipe harvest` wrote."
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        Corpus(tmp_path)


def test_a_range_beyond_the_end_is_refused(corpus: Corpus) -> None:
    n = corpus.train.n_contexts
    with pytest.raises(InputError, match=rf"^Contexts 0 to {n + 1} of train were asked for, "):
        corpus.train.tokens(0, n + 1)
    assert corpus.train.tokens(n, n).shape == (0, 32)
