"""Building a token corpus again: after a kill, with other settings, with more text."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from sae_pipe.stages.corpus import CorpusConfig, build_corpus
from sae_pipe.stages.sources import TextSource
from sae_pipe.stages.tokens import TextTokenizer
from sae_pipe.storage.corpus import Corpus
from sae_pipe.storage.errors import InputError
from sae_pipe.storage.files import file_digest

CONFIG = CorpusConfig(context_size=32, train_rows=4000, heldout_rows=400)
WriteSource = Callable[[Path, Sequence[object]], TextSource]


def _build(
    folder: Path, source: TextSource, tokenizer: TextTokenizer, config: CorpusConfig = CONFIG
) -> Corpus:
    return build_corpus(folder, config, source, tokenizer, show_progress=False)


def _bytes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


FORKED = """
import os, resource, signal, sys, time
from pathlib import Path
from sae_pipe.stages import token_cache
from sae_pipe.stages.corpus import CorpusConfig, build_corpus
from sae_pipe.stages.sources import TextConfig, open_text
from sae_pipe.stages.tokens import TextTokenizer
from sae_pipe.storage import corpus as corpus_of_tokens

tokenizer = TextTokenizer.load(sys.argv[1])
token_cache._FIRST_BATCH_CHARACTERS = token_cache._BATCH_CHARACTERS = 2**14
corpus_of_tokens._CHUNK_VALUES = 2**14


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
    documents: list[str],
    tmp_path: Path,
    tokenizer_folders: dict[str, Path],
    suffix: str,
    dedup: str,
) -> None:
    lines = [{"text": text} for text in documents[:700]]
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
    documents: list[str], tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    texts = []
    for repeats in (2, 30):
        lines = [{"text": f"{text} {r}"} for r in range(repeats) for text in documents[:1000]]
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
    write_source: WriteSource,
    documents: list[str],
    tmp_path: Path,
    source: TextSource,
    plain: TextTokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(InputError):
        _build(tmp_path / "corpus", source, plain, replace(CONFIG, train_rows=10**6))
    other = write_source(
        tmp_path / "other.jsonl", [{"text": text[::-1]} for text in documents[:400]]
    )
    corpus = _build(tmp_path / "corpus", other, plain)
    assert "holds tokens of other text" in capsys.readouterr().err
    assert corpus.digest == _build(tmp_path / "fresh", other, plain).digest
