"""Text sources: every kind gives the same records, and what is no text is counted by reason."""

import gzip
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_pipe.stages.sources import RECIPES, SOURCES, TextConfig, TextSource, open_text
from sae_pipe.stages.sources.fields import Filter
from sae_pipe.stages.sources.files import file_identity
from sae_pipe.stages.sources.hub import HubReader
from sae_pipe.stages.sources.recipes import apply_recipe
from sae_pipe.storage.errors import InputError

ROWS = [
    {"text": f"Document {i}: ünïcode\nand lines.", "meta": {"set": "ab"[i % 2], "id": i}}
    for i in range(700)
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _write_jsonl(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(JSONL)


def _write_gz(folder: Path) -> None:
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(JSONL))


def _write_zst(folder: Path) -> None:
    half = JSONL.index(b"\n", len(JSONL) // 2) - 5  # two frames, the first ends inside a line
    parts = (JSONL[:half], JSONL[half:])
    data = b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)
    (folder / "train.jsonl.zst").write_bytes(data)


def _write_parquet(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet", row_group_size=300)


def _write_txt(folder: Path) -> None:
    text = "<|endoftext|>".join(str(row["text"]) for row in ROWS)
    (folder / "train.txt").write_text(text, encoding="utf-8")


def _open_local(folder: Path) -> TextSource:
    return open_text(TextConfig(dataset=str(folder)))


def _open_hub(folder: Path) -> TextSource:
    """A local folder through the code that reads the Hub."""
    reader = HubReader(str(folder), "train", None, folder=True)
    return TextSource(str(folder), "hub", [reader], "text", None)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], TextSource]]] = {
    "jsonl": (_write_jsonl, _open_local),
    "jsonl.gz": (_write_gz, _open_local),
    "jsonl.zst": (_write_zst, _open_local),
    "parquet": (_write_parquet, _open_local),
    "txt": (_write_txt, _open_local),
    "hub": (_write_jsonl, _open_hub),
    "hub of parquet": (_write_parquet, _open_hub),
}


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> TextSource:
    write, open_folder = KINDS[request.param]
    write(tmp_path)
    return open_folder(tmp_path)


def test_every_registered_kind_is_tested_here() -> None:
    suffixes = {f".{name}" for name in KINDS}
    for name, kind in SOURCES.items():
        assert name in KINDS
        assert set(kind.suffixes) <= suffixes


def test_every_kind_gives_the_same_records(source: TextSource) -> None:
    records = list(source.records())
    assert [record.index for record in records] == list(range(700))
    assert [record.text for record in records] == [row["text"] for row in ROWS]
    assert {record.problem for record in records} == {None}


@pytest.mark.parametrize("taken", [0, 1, 256, 299, 300, 699, 700])
def test_a_position_goes_on_right_after_the_last_record(source: TextSource, taken: int) -> None:
    stream = source.records()
    before = list(itertools.islice(stream, taken))
    position = json.loads(json.dumps(stream.position()))
    assert before + list(source.records(position)) == list(source.records())


def test_identity_is_json_and_changes_with_the_text(source: TextSource, tmp_path: Path) -> None:
    assert json.loads(json.dumps(source.identity)) == source.identity
    (path,) = tmp_path.iterdir()
    before = file_identity(path, "a")
    for changed in (0, path.stat().st_size // 2, path.stat().st_size - 1):
        data = bytearray(path.read_bytes())
        data[changed] ^= 1
        (tmp_path / "changed").write_bytes(data)
        assert file_identity(tmp_path / "changed", "a") != before
    assert file_identity(path, "b") != before


def test_identity_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    identities = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        _write_jsonl(tmp_path / name)
        identities.append(open_text(TextConfig(dataset=str(tmp_path / name))).identity)
        identities.append(open_text(TextConfig(dataset=str(tmp_path / name / "*.jsonl"))).identity)
        identities.append(open_text(TextConfig(dataset=f"{tmp_path}/{name}/train.jsonl")).identity)
    assert all(identity == identities[0] for identity in identities)
    assert identities[0]["parts"][0]["name"] == "train.jsonl"


def test_a_folder_is_read_in_depth_in_order_and_mixed(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b" / "1.jsonl").write_text('{"text": "second"}\n{"text": "third"}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fourth"}\n'))
    (tmp_path / "README.md").write_text("no text file")
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    records = list(open_text(TextConfig(dataset=str(tmp_path))).records())
    assert [record.text for record in records] == ["first", "second", "third", "fourth"]
    assert [record.index for record in records] == [0, 1, 2, 3]


BAD_LINES = [
    (b'{"text": "good"}', None),
    (b'{"text": "cut', "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b'{"text": ' + b"9" * 5000 + b"}", "malformed JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t "}', "empty"),
    (b"", "empty"),
    (b'{"text": 3}', "not text"),
    (b'{"text": null}', "not text"),
    (b'{"text": ["a"]}', "not text"),
    (b'{"body": "a"}', "no text column"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "not Unicode"),
    ('{"text": "last, no newline: é"}'.encode(), None),
]


@pytest.mark.parametrize("suffix", SOURCES["jsonl"].suffixes)
def test_bad_lines_are_counted_by_reason_and_lose_no_good_one(tmp_path: Path, suffix: str) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".jsonl": bytes,
        ".jsonl.gz": gzip.compress,
        ".jsonl.zst": zstandard.ZstdCompressor().compress,
    }
    data = b"\n".join(line for line, _ in BAD_LINES)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(pack[suffix](data))
    records = list(open_text(TextConfig(dataset=str(path))).records())
    assert [record.problem for record in records] == [problem for _, problem in BAD_LINES]
    assert [r.text for r in records if r.text] == ["good", "last, no newline: é"]


def test_a_line_too_long_for_a_document_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_pipe.stages.sources.jsonl._MAX_LINE_BYTES", 50)
    lines = ['{"text": "a"}', json.dumps({"text": "b" * 500_000}), '{"text": "c"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    source = open_text(TextConfig(dataset=str(tmp_path)))
    assert [r.text or r.problem for r in source.records()] == ["a", "line too long", "c"]
    stream = source.records()
    assert next(stream).text == "a"
    assert next(stream).problem == "line too long"
    assert next(source.records(stream.position())).text == "c"


@pytest.mark.parametrize("cut", ["half", "checksum"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_compressed_file_is_one_sentence(tmp_path: Path, suffix: str, cut: str) -> None:
    (_write_gz if suffix == ".jsonl.gz" else _write_zst)(tmp_path)
    path = tmp_path / f"train{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if cut == "half" else -3])
    with pytest.raises(
        InputError,
        match=rf"^Text file {re.escape(str(path))} is truncated or damaged after \d+ decompressed "
        r"bytes \(.+\)\. Download it again, or leave it out\.$",
    ):
        list(open_text(TextConfig(dataset=str(path))).records())


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_of_another_format_under_a_known_suffix_is_one_sentence(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"this is no such file" * 10)
    with pytest.raises(InputError, match=rf"^Text file {re.escape(str(path))} is "):
        open_text(TextConfig(dataset=str(path)))


def test_a_truncated_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    _write_parquet(tmp_path)
    path = tmp_path / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        InputError,
        match=rf"^Text file {re.escape(str(path))} is no Parquet file, or it is truncated or "
        r"damaged \((.|\n)*\)\. Download it again, or leave it out\.$",
    ):
        open_text(TextConfig(dataset=str(path)))


def test_malformed_json_through_the_hub_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(JSONL + b'{"text": \n')
    with pytest.raises(InputError, match=r"^Dataset '.*' cannot be read after \d+ records \("):
        list(_open_hub(tmp_path).records())


def test_an_unknown_split_lists_those_that_are_there(tmp_path: Path) -> None:
    _write_jsonl(tmp_path)
    message = (
        f"Dataset {str(tmp_path)!r} could not be opened: Bad split: dev. Available splits: "
        "['train']. Pass another --split, or name a subset as owner/name:subset."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        HubReader(str(tmp_path), "dev", None, folder=True)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_missing_text_column_lists_the_columns(tmp_path: Path, kind: str) -> None:
    write, _ = KINDS[kind]
    write(tmp_path)
    message = (
        f"Text column 'body' is not in {tmp_path}, whose columns are meta, meta.id, meta.set, "
        "text. Pass one of them as --text-column."
    )
    readers = _open_hub(tmp_path).readers if kind == "hub" else _open_local(tmp_path).readers
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        TextSource(str(tmp_path), kind, readers, "body", None)


def test_a_nested_text_column_is_found_by_its_dotted_name(tmp_path: Path) -> None:
    _write_jsonl(tmp_path)
    source = open_text(TextConfig(dataset=str(tmp_path), text_column="meta.set"))
    assert [record.text for record in itertools.islice(source.records(), 3)] == ["a", "b", "a"]


@pytest.mark.parametrize(
    "write_meta",
    [lambda meta: meta, json.dumps, repr],
    ids=["mapping", "JSON string", "Python literal"],
)
def test_filter_works_on_nested_and_on_spelt_out_meta(
    tmp_path: Path, write_meta: Callable[[Any], Any]
) -> None:
    rows = [{**row, "meta": write_meta(row["meta"])} for row in ROWS]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_text(TextConfig(dataset=str(tmp_path), filter="meta.set=b"))
    records = list(source.records())
    assert Counter(record.problem for record in records) == {None: 350, "filtered out": 350}
    assert [record.index for record in records if record.text] == list(range(1, 700, 2))


def test_filter_never_evaluates_code(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    code = f"{{'set': open({str(touched)!r}, 'w')}}"
    assert not Filter.parse("meta.set=b").accepts({"meta": code})
    assert not touched.exists()


@pytest.mark.parametrize(
    ("value", "wanted"), [("a b", "a b"), (3, "3"), (True, "true"), (None, "null"), (0.5, "0.5")]
)
def test_filter_compares_values_as_json_spells_them(value: Any, wanted: str) -> None:
    assert Filter.parse(f"x.y={wanted}").accepts({"x": {"y": value}})
    assert Filter.parse(f"x.y={wanted}").accepts({"x.y": value})
    assert not Filter.parse(f"x.y={wanted}!").accepts({"x": {"y": value}})


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_filter_accepts_any_value_that_it_was_made_from(value: str) -> None:
    assert Filter.parse(f"field={value}").accepts({"field": value.strip()})


def test_filter_that_no_record_has_lists_the_fields(tmp_path: Path) -> None:
    _write_jsonl(tmp_path)
    message = (
        f"Filter field 'meta.pile_set_name' is not in {tmp_path}, whose fields are meta, meta.id, "
        "meta.set, text. Pass --filter FIELD=VALUE with one of them."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_text(TextConfig(dataset=str(tmp_path), filter="meta.pile_set_name=Pile-CC"))


def test_filter_of_another_form_is_refused(tmp_path: Path) -> None:
    _write_jsonl(tmp_path)
    message = (
        "Filter 'meta.set' is not of the form FIELD=VALUE. Pass for example "
        "--filter meta.pile_set_name=Pile-CC."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_text(TextConfig(dataset=str(tmp_path), filter="meta.set"))


def test_plain_text_is_a_document_a_file_and_large_files_are_cut(tmp_path: Path) -> None:
    paragraph = "Ein Absatz mit Ümläuten. " * 40
    text = "\n\n".join([paragraph] * 3000)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt").write_text("ä" * 2_000_000, encoding="utf-8")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe broken")
    (tmp_path / "d.txt").write_text("")
    records = list(open_text(TextConfig(dataset=str(tmp_path))).records())
    texts = [record.text for record in records if record.text]
    assert "".join(texts) == text + "ä" * 2_000_000
    assert max(len(piece.encode()) for piece in texts) <= 2**20
    assert [record.problem for record in records if record.problem] == ["not UTF-8"]


def test_every_field_of_a_recipe_can_be_overridden() -> None:
    assert apply_recipe(TextConfig()) == RECIPES["pile-cc"]
    ours = TextConfig(text_column="a", split="b", filter="", revision="c")
    applied = apply_recipe(ours)
    assert applied.dataset == "monology/pile-uncopyrighted"
    assert (applied.text_column, applied.split, applied.filter, applied.revision) == (
        "a",
        "b",
        "",
        "c",
    )
    assert apply_recipe(TextConfig(dataset="x/y")) == TextConfig(dataset="x/y")
