"""The token corpus: what is in it, how it is resumed, how it is read back."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import dask.array
import numpy as np
import pytest
import zarr
import zstandard
from numpy.typing import NDArray

from sae_pipe.stages.corpus import CorpusConfig, build_corpus, heldout_probability
from sae_pipe.stages.sources import TextConfig, TextSource, open_text
from sae_pipe.stages.tokens import TextTokenizer, decode_tokens
from sae_pipe.storage.corpus import Corpus
from sae_pipe.storage.errors import InputError, StoreError
from sae_pipe.storage.files import file_digest, write_json

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "runs",
    "into",
    "dark",
    "forest",
    "word",
    "stone",
]
CONFIG = CorpusConfig(context_size=32, train_rows=4000, heldout_rows=400)


def _documents(n: int = 400) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 120))) + f" {i}" for i in range(n)]


def _write(path: Path, lines: Sequence[object]) -> TextSource:
    path.write_text("\n".join(map(json.dumps, lines)))
    return open_text(TextConfig(dataset=str(path)))


@pytest.fixture
def source(tmp_path: Path) -> TextSource:
    return _write(tmp_path / "text.jsonl", [{"text": text} for text in _documents()])


@pytest.fixture
def plain(text_tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    return text_tokenizers["plain"]


def _build(
    folder: Path, source: TextSource, tokenizer: TextTokenizer, config: CorpusConfig = CONFIG
) -> Corpus:
    return build_corpus(folder, config, source, tokenizer, show_progress=False)


def _bytes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


@pytest.mark.parametrize("name", ["plain", "bos"])
@pytest.mark.parametrize("pack", [True, False])
def test_every_context_can_be_traced_to_its_document(
    tmp_path: Path,
    source: TextSource,
    text_tokenizers: dict[str, TextTokenizer],
    name: str,
    pack: bool,
) -> None:
    tokenizer = text_tokenizers[name]
    corpus = _build(tmp_path / "corpus", source, tokenizer, replace(CONFIG, pack=pack))
    texts = _documents()
    for table in (corpus.train, corpus.heldout):
        n = table.n_contexts
        tokens, lengths, documents = (
            table.tokens(0, n),
            table.lengths(0, n),
            table.documents(0, n),
        )
        assert tokens.shape == documents.shape == (n, 32)
        for i in range(n):
            context = table.context(i)
            assert len(context) == lengths[i]
            assert (context[0] == tokenizer.bos_id) == tokenizer.prepends_bos
            body = context[tokenizer.prepends_bos :]
            for document in np.unique(documents[i, : lengths[i]]):
                mine = documents[i, tokenizer.prepends_bos : lengths[i]] == document
                text = "".join(decode_tokens(tokenizer._json, body[mine]))
                assert text.removesuffix("<|endoftext|>") in texts[document]
    if pack:
        assert set(corpus.train.lengths(0, corpus.train.n_contexts).tolist()) == {32}


def test_contexts_are_a_permutation_of_those_of_the_text(
    tmp_path: Path, source: TextSource, plain: TextTokenizer
) -> None:
    table = _build(tmp_path / "corpus", source, plain).train
    origins = table.origins(0, table.n_contexts)
    assert sorted(origins.tolist()) == list(range(table.n_contexts))
    assert origins.tolist() != sorted(origins.tolist())
    in_order = table.tokens(0, table.n_contexts)[np.argsort(origins)].ravel()
    marks = table.documents(0, table.n_contexts)[np.argsort(origins)].ravel()
    assert (np.diff(marks.astype(np.int64)) >= 0).all()
    documents = [i for i in range(400) if i in marks]
    expected = plain.encode([_documents()[i] for i in documents])
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
    tmp_path: Path, plain: TextTokenizer
) -> None:
    texts = _documents(60)
    copies = [text.upper() if i % 2 else f"  {text}" for i, text in enumerate(texts)]
    source = _write(tmp_path / "x.jsonl", [{"text": text} for text in texts + copies])
    config = replace(CONFIG, dedup="none", train_rows=None, heldout_rows=500)
    corpus = _build(tmp_path / "corpus", source, plain, config)
    train, heldout = (
        set((table.documents(0, table.n_contexts) % 60).ravel().tolist())
        for table in (corpus.train, corpus.heldout)
    )
    assert heldout
    assert not train & heldout


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path, plain: TextTokenizer) -> None:
    texts = _documents(50)
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


def test_reading_stops_when_both_splits_are_full(tmp_path: Path, plain: TextTokenizer) -> None:
    """Far more text than is needed: batches begin small, so little of it is read."""
    source = _write(tmp_path / "x.jsonl", [{"text": text} for text in _documents(4000)])
    config = replace(CONFIG, train_rows=500, heldout_rows=50)
    info = _build(tmp_path / "corpus", source, plain, config).info
    assert info["documents"]["records_read"] < 1000


FORKED = """
import os, resource, signal, sys, time
from pathlib import Path
from sae_pipe.stages import token_cache
from sae_pipe.stages.corpus import CorpusConfig, build_corpus
from sae_pipe.stages.sources import TextConfig, open_text
from sae_pipe.stages.tokens import TextTokenizer
from sae_pipe.storage import corpus_writer

tokenizer = TextTokenizer.load(sys.argv[1])
token_cache._FIRST_BATCH_CHARACTERS = token_cache._BATCH_CHARACTERS = 2**14
corpus_writer._CHUNK_VALUES = 2**14


def fork(text, folder, dedup="exact"):
    pid = os.fork()  # a process of its own without importing everything again
    if pid:
        return pid
    config = CorpusConfig(context_size=32, train_rows=None, heldout_rows=400, dedup=dedup)
    source = open_text(TextConfig(dataset=text))
    build_corpus(Path(folder), config, source, tokenizer, show_progress=False)
    os._exit(0)


"""

KILLING = """
text, folder, dedup = sys.argv[2:]
assert os.waitpid(fork(text, folder + "/whole", dedup), 0)[1] == 0
work = Path(folder, "killed.building")


def size(name):
    path = work / name
    return path.stat().st_size if path.exists() else 0


def kill_when(happened):
    pid = fork(text, folder + "/killed", dedup)
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if happened():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return size("cache.tokens")
    raise AssertionError("it ended before it could be killed")


cached = []
for growing in ("cache.documents", "cache.tokens", "cache.tokens", "cache.documents"):
    before = size(growing)
    cached.append(kill_when(lambda: size(growing) > before))
cached.append(kill_when(lambda: size("train.tokens") > 0))
cached.append(kill_when((work / "corpus" / "train" / "tokens").exists))
assert os.waitpid(fork(text, folder + "/killed", dedup), 0)[1] == 0
print(cached)
"""

MEASURING = """
token_cache._BATCH_CHARACTERS = 2**17
for text in sys.argv[2:]:
    _, status, usage = os.wait4(fork(text, text + ".corpus"), 0)
    assert status == 0
    print(usage.ru_maxrss)
"""


def _run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", FORKED + code, *map(str, arguments)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "dedup"), [("jsonl", "exact"), ("jsonl.zst", "minhash")])
def test_killed_at_any_instant_the_next_run_gives_the_same_bytes(
    tmp_path: Path, tokenizer_folders: dict[str, Path], suffix: str, dedup: str
) -> None:
    lines = [{"text": text} for text in _documents(700)]
    data = "\n".join(json.dumps(line) for line in lines + lines[:50]).encode()
    text = tmp_path / f"text.{suffix}"
    text.write_bytes(zstandard.ZstdCompressor().compress(data) if suffix.endswith("zst") else data)
    cached = json.loads(_run(KILLING, tokenizer_folders["plain"], text, tmp_path, dedup))
    assert 0 < cached[1] < cached[4]  # it was killed with work done, and went on from there
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
    assert not (tmp_path / "killed.building").exists()
    corpus = Corpus(tmp_path / "killed")
    corpus.verify()
    reason = "duplicate" if dedup == "exact" else "near-duplicate"
    assert corpus.info["documents"]["left_out"][reason] >= 50


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    texts = []
    for repeats in (2, 30):
        lines = [{"text": f"{text} {r}"} for r in range(repeats) for text in _documents(1000)]
        texts.append(tmp_path / f"{repeats}.jsonl")
        texts[-1].write_text("\n".join(map(json.dumps, lines)))
    small, large = (
        int(kib) / 1024 for kib in _run(MEASURING, tokenizer_folders["plain"], *texts).split()
    )
    text_mib = texts[1].stat().st_size / 2**20
    assert text_mib > 8
    assert large - small < 0.5 * text_mib


def test_what_a_crash_left_uncommitted_is_cut_off(
    tmp_path: Path, source: TextSource, plain: TextTokenizer
) -> None:
    whole = _build(tmp_path / "whole", source, plain)
    too_much = replace(CONFIG, train_rows=10**6)
    with pytest.raises(InputError):
        _build(tmp_path / "corpus", source, plain, too_much)
    for path in (tmp_path / "corpus.building").glob("cache.[dt]*"):
        with path.open("ab") as file:
            file.write(b"half a record")
    assert _build(tmp_path / "corpus", source, plain).digest == whole.digest
    assert _bytes(tmp_path / "corpus") == _bytes(tmp_path / "whole")


def test_too_few_rows_says_how_many_and_what_is_offered_is_quick_and_works(
    tmp_path: Path, source: TextSource, plain: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, train_rows=10**6)
    with pytest.raises(InputError) as caught:
        _build(tmp_path / "corpus", source, plain, config)
    match = re.fullmatch(
        r"Dataset '.*text\.jsonl' holds (\d+) training rows, but 1000000 were asked for\. Pass "
        r"--tokens (\d+) or less \(the tokens are kept, so that this will be quick\), or more "
        r"text\.",
        str(caught.value),
    )
    assert match
    there, offered = map(int, match.groups())
    assert 0.5 * there < offered < there
    assert not (tmp_path / "corpus").exists()
    fresh = _build(tmp_path / "fresh", source, plain, replace(CONFIG, train_rows=offered))
    # From here on nothing can be tokenised.
    monkeypatch.delattr(TextTokenizer, "encode")
    corpus = _build(tmp_path / "corpus", source, plain, replace(CONFIG, train_rows=offered))
    assert corpus.train.n_rows >= offered
    assert corpus.digest == fresh.digest


def test_a_corpus_that_is_complete_is_returned_at_once(
    tmp_path: Path, source: TextSource, plain: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _build(tmp_path / "corpus", source, plain)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    monkeypatch.delattr(TextTokenizer, "encode")
    assert _build(tmp_path / "corpus", source, plain).digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")} == before


def test_another_recipe_in_the_same_folder_shows_the_difference(
    tmp_path: Path, source: TextSource, text_tokenizers: dict[str, TextTokenizer]
) -> None:
    _build(tmp_path / "corpus", source, text_tokenizers["plain"])
    message = (
        f"Corpus {tmp_path}/corpus was built from another recipe: config.context_size is 32 there "
        "and 64 here; config.seed is 0 there and 1 here. Pass another folder, or what it was built "
        "with."
    )
    config = replace(CONFIG, context_size=64, seed=1)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        _build(tmp_path / "corpus", source, text_tokenizers["plain"], config)
    with pytest.raises(InputError, match=r"tokenizer\.prepends_bos is False there and True here"):
        _build(tmp_path / "corpus", source, text_tokenizers["bos"])


def test_work_on_other_text_is_discarded_and_said_so(
    tmp_path: Path, source: TextSource, plain: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError):
        _build(tmp_path / "corpus", source, plain, replace(CONFIG, train_rows=10**6))
    other = _write(tmp_path / "other.jsonl", [{"text": text[::-1]} for text in _documents()])
    corpus = _build(tmp_path / "corpus", other, plain)
    assert "holds tokens of other text" in capsys.readouterr().err
    assert corpus.digest == _build(tmp_path / "fresh", other, plain).digest


def test_a_short_text_still_holds_out_a_context(tmp_path: Path, plain: TextTokenizer) -> None:
    source = _write(tmp_path / "x.jsonl", [{"text": text} for text in _documents(30)])
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
    tmp_path: Path, plain: TextTokenizer, lines: list[object], config: CorpusConfig, message: str
) -> None:
    source = _write(tmp_path / "x.jsonl", lines)
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
    tmp_path: Path, plain: TextTokenizer
) -> None:
    """All tokens of the first record: the document array is nothing but zeros."""
    source = _write(tmp_path / "x.jsonl", [{"text": "the fox " * 100}])
    config = replace(CONFIG, train_rows=None, heldout_rows=0)
    corpus = _build(tmp_path / "corpus", source, plain, config)
    assert "train/document/c/0/0" in corpus.info["files"]
    assert not corpus.train.documents(0, corpus.train.n_contexts).any()


@pytest.mark.parametrize("name", ["train/tokens/c/0/0", "heldout/length/zarr.json"])
def test_a_missing_file_is_an_error_at_opening(corpus: Corpus, name: str) -> None:
    (corpus.path / name).unlink()
    message = (
        f"Corpus {corpus.path} is damaged: {name} is missing. Restore it from a copy, or harvest "
        "into a new folder."
    )
    with pytest.raises(StoreError, match=f"^{re.escape(message)}$"):
        Corpus(corpus.path)


def test_a_truncated_chunk_is_an_error_at_opening(corpus: Corpus) -> None:
    path = corpus.path / "train/tokens/c/0/0"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100])
    message = (
        f"Corpus {corpus.path} is damaged: train/tokens/c/0/0 has 100 bytes instead of {size}. "
        "Restore it from a copy, or harvest into a new folder."
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
