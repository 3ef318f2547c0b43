"""The token corpus: what is in it, and text that does not suffice for one."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sae_pipe.stages.corpus import CorpusConfig, build_corpus, heldout_probability
from sae_pipe.stages.sources import TextConfig, TextSource, open_text
from sae_pipe.stages.tokens import TextTokenizer, decode_tokens
from sae_pipe.storage.corpus import Corpus
from sae_pipe.storage.errors import InputError

CONFIG = CorpusConfig(context_size=32, train_rows=4000, heldout_rows=400)
WriteSource = Callable[[Path, Sequence[object]], TextSource]


def _build(
    folder: Path, source: TextSource, tokenizer: TextTokenizer, config: CorpusConfig = CONFIG
) -> Corpus:
    return build_corpus(folder, config, source, tokenizer, show_progress=False)


@pytest.mark.parametrize("name", ["plain", "bos"])
@pytest.mark.parametrize("pack", [True, False])
def test_every_context_can_be_traced_to_its_document(
    documents: list[str],
    tmp_path: Path,
    source: TextSource,
    text_tokenizers: dict[str, TextTokenizer],
    name: str,
    pack: bool,
) -> None:
    tokenizer = text_tokenizers[name]
    corpus = _build(tmp_path / "corpus", source, tokenizer, replace(CONFIG, pack=pack))
    for table in (corpus.train, corpus.heldout):
        n = table.n_contexts
        tokens, lengths, records = (
            table.tokens(0, n),
            table.lengths(0, n),
            table.documents(0, n),
        )
        assert tokens.shape == records.shape == (n, 32)
        for i in range(n):
            context = table.context(i)
            assert len(context) == lengths[i]
            assert (context[0] == tokenizer.bos_id) == tokenizer.prepends_bos
            body = context[tokenizer.prepends_bos :]
            for record in np.unique(records[i, : lengths[i]]):
                mine = records[i, tokenizer.prepends_bos : lengths[i]] == record
                text = "".join(decode_tokens(tokenizer.json, body[mine]))
                assert text.removesuffix("<|endoftext|>") in documents[record]
    if pack:
        assert set(corpus.train.lengths(0, corpus.train.n_contexts).tolist()) == {32}


def test_contexts_are_a_permutation_of_those_of_the_text(
    documents: list[str], tmp_path: Path, source: TextSource, plain: TextTokenizer
) -> None:
    table = _build(tmp_path / "corpus", source, plain).train
    origins = table.origins(0, table.n_contexts)
    assert sorted(origins.tolist()) == list(range(table.n_contexts))
    assert origins.tolist() != sorted(origins.tolist())
    in_order = table.tokens(0, table.n_contexts)[np.argsort(origins)].ravel()
    marks = table.documents(0, table.n_contexts)[np.argsort(origins)].ravel()
    assert (np.diff(marks.astype(np.int64)) >= 0).all()
    used = [i for i in range(400) if i in marks]
    expected = plain.encode([documents[i] for i in used])
    stream = np.concatenate([np.append(tokens, np.uint32(0)) for tokens in expected])
    assert np.array_equal(in_order, stream[: len(in_order)])


def test_both_splits_have_their_rows_and_share_no_document(
    tmp_path: Path, source: TextSource, plain: TextTokenizer
) -> None:
    corpus = _build(tmp_path / "corpus", source, plain)
    splits = corpus.info["splits"]
    for table, wanted in ((corpus.train, 4000), (corpus.heldout, 400)):
        rows = table.rows(0, table.n_contexts)
        assert wanted <= table.n_rows == rows.sum() < wanted + 32
        assert not rows[:, 0].any()
    used = [
        set(np.unique(table.documents(0, table.n_contexts)).tolist())
        for table in (corpus.train, corpus.heldout)
    ]
    assert not used[0] & used[1]
    assert len(used[0]) <= splits["train"]["documents"] <= len(used[0]) + 1


def test_equal_texts_are_on_one_side_even_without_deduplication(
    write_source: WriteSource, documents: list[str], tmp_path: Path, plain: TextTokenizer
) -> None:
    texts = documents[:60]
    copies = [text.upper() if i % 2 else f"  {text}" for i, text in enumerate(texts)]
    source = write_source(tmp_path / "x.jsonl", [{"text": text} for text in texts + copies])
    config = replace(CONFIG, dedup="none", train_rows=None, heldout_rows=500)
    corpus = _build(tmp_path / "corpus", source, plain, config)
    train, heldout = (
        set((table.documents(0, table.n_contexts) % 60).ravel().tolist())
        for table in (corpus.train, corpus.heldout)
    )
    assert heldout
    assert not train & heldout


def test_what_is_left_out_is_counted_by_reason(
    documents: list[str], tmp_path: Path, plain: TextTokenizer
) -> None:
    texts = documents[:50]
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[:7]]]
    bad = ['{"text": ""}', '{"text": 1}', "{", '{"body": "a"}', "{}", '{"text": " "}']
    path.write_text("\n".join(lines[:20] + bad + lines[20:]))
    source = open_text(TextConfig(dataset=str(path)))
    config = replace(CONFIG, train_rows=None, heldout_rows=0)
    info = _build(tmp_path / "corpus", source, plain, config).info
    assert info["documents"]["records_read"] == 63
    assert info["documents"]["left_out"] == {
        "duplicate": 7,
        "empty": 2,
        "malformed JSON": 1,
        "no text column": 2,
        "not text": 1,
    }
    assert info["splits"]["train"]["documents"] == 50
    assert info["splits"]["heldout"]["contexts"] == 0


def test_reading_stops_when_both_splits_are_full(
    write_source: WriteSource, documents: list[str], tmp_path: Path, plain: TextTokenizer
) -> None:
    """Far more text than is needed: batches begin small, so little of it is read."""
    source = write_source(tmp_path / "x.jsonl", [{"text": text} for text in documents])
    config = replace(CONFIG, train_rows=500, heldout_rows=50)
    info = _build(tmp_path / "corpus", source, plain, config).info
    assert info["documents"]["records_read"] < 1000


def test_a_short_text_still_holds_out_a_context(
    write_source: WriteSource, documents: list[str], tmp_path: Path, plain: TextTokenizer
) -> None:
    source = write_source(tmp_path / "x.jsonl", [{"text": text} for text in documents[:30]])
    config = replace(CONFIG, train_rows=None, heldout_rows=10, seed=1)
    assert heldout_probability(None, 10) == 0.01  # which alone would hold out nothing here
    info = _build(tmp_path / "corpus", source, plain, config).info
    assert info["splits"]["heldout"]["rows"] >= 10
    assert info["splits"]["train"]["rows"] > 500
    assert info["heldout_probability"] > 0.01


@pytest.mark.parametrize(
    ("lines", "config", "message"),
    [
        (
            [{"text": ""}, {"text": 3}, {"text": " "}],
            CONFIG,
            (
                r"Dataset '.*' holds no text: 3 records, of which left out: 2 empty, 1 not text\. Pass "
                r"another --dataset, --text-column or --filter\."
            ),
        ),
        (
            [],
            CONFIG,
            (
                r"Dataset '.*' holds no text: 0 records\. Pass another --dataset, --text-column or "
                r"--filter\."
            ),
        ),
        (
            [{"text": "the fox"}],
            replace(CONFIG, train_rows=None, heldout_rows=0),
            (
                r"Dataset '.*' is too short: its 1 documents with \d+ tokens give no training row in "
                r"contexts of 32 tokens\. Pass more text, a smaller --context-size or "
                r"--heldout-tokens 0\."
            ),
        ),
        (
            [{"text": "the fox " * 100}],
            replace(CONFIG, train_rows=None, heldout_rows=10, seed=5),
            (
                r"Dataset '.*' is too short to hold out a part: its 1 documents with \d+ tokens give "
                r"no held-out row in contexts of 32 tokens\. Pass more text, a smaller --context-size "
                r"or --heldout-tokens 0\."
            ),
        ),
    ],
    ids=["only problems", "empty file", "no context", "nothing to hold out"],
)
def test_text_that_is_too_short_is_one_sentence_and_leaves_nothing(
    write_source: WriteSource,
    tmp_path: Path,
    plain: TextTokenizer,
    lines: list[object],
    config: CorpusConfig,
    message: str,
) -> None:
    source = write_source(tmp_path / "x.jsonl", lines)
    with pytest.raises(InputError, match=f"^{message}$"):
        _build(tmp_path / "corpus", source, plain, config)
    assert not (tmp_path / "corpus").exists()
    left = (tmp_path / "corpus.building").exists()
    assert left == ("holds no text" not in message)  # tokens that exist are kept


def test_packing_needs_an_end_of_text_token(
    tmp_path: Path, source: TextSource, text_tokenizers: dict[str, TextTokenizer]
) -> None:
    bare = text_tokenizers["bare"]
    message = (
        f"The tokenizer of {bare.name} has no end-of-text token to join documents by. "
        "Pass --no-pack for one document a context."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        _build(tmp_path / "corpus", source, bare)
    corpus = _build(tmp_path / "corpus", source, bare, replace(CONFIG, pack=False))
    assert corpus.train.n_rows >= 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_rows": 0}, "0 training rows were asked for. Pass --tokens with 1 or more."),
        (
            {"heldout_rows": -1},
            "-1 held-out rows were asked for. Pass --heldout-tokens with 0 or more.",
        ),
        (
            {"context_size": 0},
            "Context size 0 leaves no place for text. Pass --context-size 2 or more.",
        ),
        (
            {"dedup": "fuzzy"},
            "Dedup 'fuzzy' is not known. Known are none, exact, minhash; pass one as --dedup.",
        ),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    tmp_path: Path,
    source: TextSource,
    plain: TextTokenizer,
    change: dict[str, object],
    message: str,
) -> None:
    config = CorpusConfig(**{**CONFIG.__dict__, **change})
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        _build(tmp_path / "corpus", source, plain, config)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]
