"""What evaluation sets are made of: which texts, which tokens, which rows, and what is left out."""

# T positions, D d_model

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.evalsets import SUITES, wheel
from sae_pipe.stages.evalsets.base import Making
from sae_pipe.stages.evalsets.config import EvalSetConfig
from sae_pipe.stages.evalsets.letters import vocabulary_words
from sae_pipe.stages.evalsets.published import balanced_draw
from sae_pipe.stages.models import inspect_model
from sae_pipe.stages.tokens import TextTokenizer, decode_tokens
from sae_pipe.storage import InputError, NetworkError, open_store
from sae_pipe.storage.evalset import EvalSet
from sae_pipe.storage.files import file_digest

from .evaluating import DEMO, quiet, said, save_wheel, sentences, write_csv
from .harvesting import config_for
from .harvesting import quiet as harvested


def hidden_states(model: str, ids: list[int], layer: int) -> Any:
    """What transformers itself says of the output of a block, (T, D)."""
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        found = whole(torch.tensor([ids]), output_hidden_states=True)
    return found.hidden_states[layer + 1][0].numpy()


# --- letters ---


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """80 words of the demo model."""
    out = tmp_path_factory.mktemp("letters") / "letters.zarr"
    return quiet(model=DEMO, layer=3, suite="letters", out=out, limit=80)


def test_words_are_labelled_by_their_first_letter_and_have_one_row_each(letters: EvalSet) -> None:
    (task,) = letters.tasks
    assert task.classes == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    words = [letters.text(i) for i in range(letters.n_items)]
    assert len(set(words)) == letters.n_rows == letters.n_items == 80
    assert [task.classes[label] for label in letters.item_label] == [w[0].upper() for w in words]
    tokens = decode_tokens(letters.tokenizer_json, letters.row_token.tolist())
    assert tokens == [f" {word}" for word in words]
    assert 0.7 < (letters.item_split == 0).mean() < 0.9
    assert letters.pooling == "marked"


def test_the_row_of_a_word_is_that_of_its_last_prompt_line(letters: EvalSet) -> None:
    tokenizer = TextTokenizer.load(DEMO)
    config = EvalSetConfig(model=DEMO, layer=3, suite="letters", out=Path("x"), limit=2)
    draft = SUITES["letters"].draft(
        Making(config=config, info=inspect_model(DEMO), tokenizer=tokenizer)
    )
    for item in range(2):
        word, ids = letters.text(item), draft.contexts[item].tolist()
        lines = tokenizer.decode(draft.contexts[item]).split("\n")
        assert len(lines) == 11
        assert lines[-1] == f" {word} has the first letter:"
        for line in lines[:-1]:
            match = re.fullmatch(r" ([A-Za-z]+) has the first letter: ([A-Z])", line)
            assert match
            assert match[1][0].upper() == match[2]
            assert match[1] != word
        position = int(letters.row_position[item])
        assert position == len(ids) - len(tokenizer.encode([" has the first letter:"])[0]) - 1
        expected_D = hidden_states(DEMO, ids, 3)[position]
        np.testing.assert_allclose(
            letters.read(item, item + 1)[0], expected_D, rtol=2e-4, atol=2e-4
        )


def test_a_word_has_the_same_prompt_and_split_whatever_the_limit(
    letters: EvalSet, tmp_path: Path
) -> None:
    fewer = quiet(model=DEMO, layer=3, suite="letters", out=tmp_path / "a.zarr", limit=20)
    assert [fewer.text(i) for i in range(20)] == [letters.text(i) for i in range(20)]
    np.testing.assert_array_equal(fewer.item_split, letters.item_split[:20])
    np.testing.assert_allclose(fewer.read(0, 20), letters.read(0, 20), rtol=2e-4, atol=2e-4)


def test_words_in_prompts_are_of_the_training_words_and_their_letters_are_named(
    tmp_path: Path,
) -> None:
    config = EvalSetConfig(model=DEMO, layer=3, suite="letters", out=tmp_path / "a")
    making = Making(config=config, info=inspect_model(DEMO), tokenizer=TextTokenizer.load(DEMO))
    draft = SUITES["letters"].draft(making)
    words = vocabulary_words(making)
    assert draft.n_items == len(words) == 2469
    found = draft.contents()
    is_train = {word: split == 0 for word, split in zip(found.texts, found.item_split, strict=True)}
    assert sum(is_train.values()) == int(0.8 * len(words))
    by_id = {token: word for word, token in words.items()}
    newline = int(making.tokenizer.encode(["\n"])[0][0])
    for tokens_T in draft.contexts[::40]:
        starts = [0, *(np.flatnonzero(tokens_T == newline) + 1)]
        assert len(starts) == 11
        assert all(is_train[by_id[int(tokens_T[start])]] for start in starts[:-1])
    counts = Counter(word[0].upper() for word, train in is_train.items() if train)
    rare = [f"{c} ({counts[c]})" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if counts[c] < 20]
    assert draft.tasks[0].note == f"fewer than 20 training words: {', '.join(rare)}"
    assert "K (19)" in draft.tasks[0].note


def test_a_context_too_short_for_the_prompts_is_said(tmp_path: Path) -> None:
    message = (
        f"^None of the 5 prompts can be used with model {DEMO} .prompt longer than 40 tokens: 5.. "
        "Pass another model.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(model=DEMO, suite="letters", out=tmp_path / "a.zarr", limit=5, context_size=40)
    assert not (tmp_path / "a.zarr").exists()


def test_a_tokenizer_without_words_is_said(lm: Path, tmp_path: Path) -> None:
    making = Making(
        config=EvalSetConfig(model=str(lm), layer=1, suite="letters", out=tmp_path),
        info=inspect_model(str(lm)),
        tokenizer=TextTokenizer.load(str(lm)),
    )
    n_words = len(vocabulary_words(making))
    assert n_words > 11  # of 400 tokens; but prompts are longer than its 32 positions
    with pytest.raises(InputError, match=r"prompt longer than 32 tokens: \d+\)\. Pass another"):
        SUITES["letters"].draft(making)


# --- your own labelled texts ---


HEADER = ["prompt", "y", "z", "word"]


def labelled_rows(n: int = 60, seed: int = 0) -> list[list[str]]:
    """Texts of two labels and two groups, with a word that stands in them."""
    return [
        [text, ("cat", "dog")[i % 2], ("east", "west")[i // 2 % 2], text.split()[1]]
        for i, text in enumerate(sentences(n, seed))
    ]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "pets.csv", HEADER, labelled_rows())


def csv_flags(lm: Path, table: Path, **changes: Any) -> dict[str, Any]:
    given = {"model": str(lm), "suite": "csv", "csv": table, "out": table.parent / "pets.zarr"}
    return given | {"text_column": "prompt", "label_column": "y"} | changes


def test_the_last_token_of_each_text_is_its_row(lm: Path, table: Path) -> None:
    found = quiet(**csv_flags(lm, table, group_column="z"))
    rows = {text: (label, group) for text, label, group, _ in labelled_rows()}
    (task,) = found.tasks
    assert task.groups is not None
    assert (task.name, task.classes, task.groups) == ("pets", ["cat", "dog"], ["east", "west"])
    tokenizer = TextTokenizer.load(str(lm))
    for item in range(found.n_items):
        label, group = rows[found.text(item)]
        assert task.classes[found.item_label[item]] == label
        assert task.groups[found.item_group[item]] == group
        ids = tokenizer.encode([found.text(item)])[0]
        assert found.row_position[item] == len(ids) - 1
        assert found.row_token[item] == ids[-1]
    for item in (0, 31):
        ids = tokenizer.encode([found.text(item)])[0].tolist()
        expected_D = hidden_states(str(lm), ids, 1)[-1]
        np.testing.assert_allclose(found.read(item, item + 1)[0], expected_D, atol=1e-5)


def test_four_fifths_of_each_class_are_trained_on_and_a_text_is_on_one_side(
    lm: Path, tmp_path: Path
) -> None:
    rows = labelled_rows()
    table = write_csv(tmp_path / "pets.csv", HEADER, [*rows, *rows[:20]])
    found = quiet(**csv_flags(lm, table))
    sides: dict[str, set[int]] = {}
    for item in range(found.n_items):
        sides.setdefault(found.text(item), set()).add(int(found.item_split[item]))
    assert all(len(side) == 1 for side in sides.values())
    for label in (0, 1):
        of_label = {found.text(int(i)) for i in np.flatnonzero(found.item_label == label)}
        assert sum(sides[text] == {0} for text in of_label) == 24  # of 30
    documents = [found.item_document[i] for i in range(found.n_items)]
    assert len(set(documents)) == len(sides) == 60


def test_mean_pooling_has_every_token_but_the_attention_sink(lm: Path, table: Path) -> None:
    found = quiet(**csv_flags(lm, table, position="mean"))
    tokenizer = TextTokenizer.load(str(lm))
    for item in (0, 7):
        ids = tokenizer.encode([found.text(item)])[0]
        own = slice(int(found.first_row[item]), int(found.first_row[item + 1]))
        assert found.row_position[own].tolist() == list(range(1, len(ids)))
        assert found.row_token[own].tolist() == ids[1:].tolist()
        expected_TD = hidden_states(str(lm), ids.tolist(), 1)[1:]
        np.testing.assert_allclose(found.read(own.start, own.stop), expected_TD, atol=1e-5)


def test_a_marked_word_is_found_by_its_last_token(lm: Path, tmp_path: Path) -> None:
    rows = labelled_rows()
    rows[3][3] = "elephant"
    rows[4][3] = rows[4][0][:3]  # its first token or tokens
    table = write_csv(tmp_path / "pets.csv", HEADER, rows)
    found = quiet(**csv_flags(lm, table, position="marked", marked_column="word"))
    words = {text: word for text, _, _, word in rows}
    tokenizer = TextTokenizer.load(str(lm))
    for item in range(found.n_items):
        text = found.text(item)
        end = text.rfind(words[text]) + len(words[text])
        ids = tokenizer.encode([text])[0]
        before = tokenizer.decode(ids[: found.row_position[item]])
        with_it = tokenizer.decode(ids[: found.row_position[item] + 1])
        assert len(before) < end <= len(with_it)
    assert found.manifest["dropped"]["pets: marked word not in the text"] == 1


def test_texts_of_a_second_file_are_out_of_distribution(lm: Path, table: Path) -> None:
    other = write_csv(table.parent / "ood.csv", HEADER, labelled_rows(14, seed=5))
    found = quiet(**csv_flags(lm, table, ood_csv=other))
    texts = {found.text(int(i)) for i in np.flatnonzero(found.item_split == 2)}
    assert texts == {row[0] for row in labelled_rows(14, seed=5)}
    other = write_csv(other, HEADER, [["a b c", "bird", "", ""]])
    message = (
        f"^{other} has the labels bird, which {table} has not: those are cat, dog. Give both the "
        "same labels.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(**csv_flags(lm, table, ood_csv=other, out=table.parent / "b.zarr"))


def test_texts_that_cannot_be_used_are_counted_and_printed(lm: Path, tmp_path: Path) -> None:
    rows = [*labelled_rows(), ["", "cat", "", ""], [" ", "dog", "", ""], ["a b", "", "", ""]]
    table = write_csv(tmp_path / "pets.csv", HEADER, [*rows, ["a", "dog", "", ""]])
    lines = said(**csv_flags(lm, table))
    assert "left out  no text: 2 in pets" in lines
    assert "left out  no label: 1 in pets" in lines
    assert "left out  one token, which is at the attention sink: 1 in pets" in lines


CSV_MISTAKES: dict[str, tuple[list[list[str]], dict[str, Any], str]] = {
    "no such column": (
        labelled_rows(),
        {"text_column": "body"},
        "{file} has no column 'body'; it has 'prompt', 'y', 'z', 'word'. Pass one of them as "
        "--text-column.",
    ),
    "no such group": (
        labelled_rows(),
        {"group_column": "g"},
        "{file} has no column 'g'; it has 'prompt', 'y', 'z', 'word'. Pass one of them as "
        "--group-column.",
    ),
    "one class": (
        [[text, "cat", "", ""] for text in sentences(30)],
        {},
        "{file} has the one label 'cat', and a probe needs two. Pass another --label-column or a "
        "file with both.",
    ),
    "nothing": (
        [],
        {},
        "{file} has no labelled text, and a probe needs two. Pass another --label-column or a file "
        "with both.",
    ),
    "a rare class": (
        [*labelled_rows(), ["one bird", "bird", "", ""]],
        {},
        "{file} has fewer than 10 different texts of bird \\(1\\), and a probe needs that many of "
        "each label. Add texts, or leave those labels out.",
    ),
    "too long": (
        [*labelled_rows(), ["the dog " * 40, "cat", "", ""]],
        {},
        "1 of the 61 texts of {file} are longer than the 32 tokens that a context has, the first "
        "in line 62; the longest has \\d+. Pass --truncate to keep the last 32 tokens of each, or "
        "shorten them.",
    ),
    "too few fields": (
        [*labelled_rows(), ["a text", "cat"]],
        {},
        "Line 62 of {file} has fewer fields than the header. Put texts with commas or line ends in "
        "double quotes.",
    ),
    "too many fields": (
        [["a text", "cat", "", "", "and more"]],
        {},
        "Line 2 of {file} has more fields than the header. Put texts with commas or line ends in "
        "double quotes.",
    ),
}


@pytest.mark.parametrize("name", CSV_MISTAKES)
def test_a_table_that_cannot_be_used_is_refused_in_one_sentence(
    lm: Path, tmp_path: Path, name: str
) -> None:
    rows, changes, message = CSV_MISTAKES[name]
    table = write_csv(tmp_path / "pets.csv", HEADER, rows)
    with pytest.raises(InputError, match=f"^{message.format(file=table)}$"):
        quiet(**csv_flags(lm, table, **changes))
    assert not (tmp_path / "pets.zarr").exists()


def test_what_is_no_csv_file_is_refused(lm: Path, tmp_path: Path) -> None:
    message = f"^{tmp_path}/no.csv cannot be read .No such file or directory.. Pass a CSV file"
    with pytest.raises(InputError, match=message):
        quiet(**csv_flags(lm, tmp_path / "no.csv"))
    file = tmp_path / "pets.csv"
    for data in (b"prompt,y\n\xff\xfe,cat\n", b'prompt,y\n"a b,cat\n'):
        file.write_bytes(data)
        message = f"^{file} is not a CSV file in UTF-8 .*. Save it as one, with a header line.$"
        with pytest.raises(InputError, match=message):
            quiet(**csv_flags(lm, file))


def test_with_truncate_long_texts_lose_their_beginning(lm: Path, tmp_path: Path) -> None:
    long = "runs into the dark forest and " * 20 + "jumps"
    rows = [*labelled_rows(), [long, "cat", "", "forest"], [f"fox {long}", "cat", "", "fox"]]
    table = write_csv(tmp_path / "pets.csv", HEADER, rows)
    flags = csv_flags(lm, table, truncate=True, position="marked", marked_column="word")
    found = quiet(**flags)
    texts = [found.text(i) for i in range(found.n_items)]
    item = texts.index(long)
    tokenizer = TextTokenizer.load(str(lm))
    ids = tokenizer.encode([long])[0][-32:]
    position = int(found.row_position[item])
    assert found.row_token[item] == ids[position]
    assert tokenizer.decode(ids[: position + 1]).endswith("forest")
    assert found.manifest["truncated"] == {"pets": 1}
    assert found.manifest["dropped"] == {"pets: marked word in the part that was cut": 1}


def test_bos_stands_before_a_text_where_the_tokenizer_puts_it(
    lm: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (lm / "config.json", lm / "model.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folders["bos"] / name).read_bytes())
    table = write_csv(tmp_path / "pets.csv", HEADER, [*labelled_rows(), ["a", "cat", "", ""]])
    found = quiet(**csv_flags(folder, table))
    tokenizer = TextTokenizer.load(str(folder))
    assert tokenizer.prepends_bos
    texts = [found.text(i) for i in range(found.n_items)]
    assert "a" in texts  # its one token is behind BOS
    item = texts.index("a")
    assert found.row_position[item] == 1
    ids = [tokenizer.bos_id, *tokenizer.encode(["a"])[0].tolist()]
    np.testing.assert_allclose(
        found.read(item, item + 1)[0], hidden_states(str(folder), ids, 1)[1], atol=1e-5
    )


# --- sae-probes ---


def test_the_draw_is_the_published_one() -> None:
    """Recorded from get_train_test_indices of sae-probes 0.4.2, on alternating labels."""
    train, test = balanced_draw(np.arange(1500) % 2, 1024, 0, 42)
    assert train[:8].tolist() == [510, 406, 260, 858, 1328, 1432, 1110, 345]
    assert train[-4:].tolist() == [711, 889, 706, 1387]
    assert len(test) == 0
    train, test = balanced_draw(np.arange(1500) % 2, 100, 40, 42)
    assert train[:8].tolist() == [725, 404, 822, 908, 1355, 639, 1473, 140]
    assert test[:8].tolist() == [108, 797, 1012, 119, 117, 646, 1414, 413]


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the small wheel, whose digest is the one that is known."""
    (tmp_path / "index").mkdir()
    path = save_wheel(tmp_path / "index")
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheel, "WHEEL_SHA256", file_digest(path))
    wheel.fetch_wheel(path, lambda line: None)
    return path


@pytest.mark.usefixtures("fetched")
def test_ood_trains_on_a_balanced_draw_and_tests_in_and_out_of_distribution(
    lm: Path, tmp_path: Path
) -> None:
    found = quiet(model=str(lm), suite="ood", out=tmp_path / "ood.zarr", limit=200)
    assert [task.name for task in found.tasks] == ["9_b", "10_a"]
    assert [task.classes for task in found.tasks] == [["0", "1"], ["bigram", "not_bigram"]]
    assert found.tasks[0].note == "classes are spelt otherwise in it: 0 as 1, 1 as not_entailment"
    for task, seed in ((0, 0), (1, 1)):
        items = found.items_of(task)
        texts = [found.text(i) for i in items]
        split = found.item_split[items]
        label = found.item_label[items]
        table = sentences(300, seed)
        drawn = [*table, *table[:30], table[0]]
        labels = np.array([*(i % 2 for i in range(300)), *(i % 2 for i in range(30)), 1])
        train, _ = balanced_draw(labels, 200, 0, 42)
        assert [texts[i] for i in np.flatnonzero(split == 0)] == [drawn[i] for i in train]
        assert label[split == 0].tolist() == labels[train].tolist()
        rest = [
            i for i in range(331) if i not in train and drawn[i] not in {drawn[j] for j in train}
        ]
        assert [texts[i] for i in np.flatnonzero(split == 1)] == [drawn[i] for i in rest]
        assert [texts[i] for i in np.flatnonzero(split == 2)] == sentences(20, 7)
        assert label[split == 2].tolist() == [i % 2 for i in range(20)]
        left_out = found.manifest["dropped"]
        name = found.tasks[task].name
        assert left_out[f"{name}: test text that is among the training texts"] == 131 - len(rest)


@pytest.mark.usefixtures("fetched")
def test_probes_have_every_text_once_and_balanced_classes(lm: Path, tmp_path: Path) -> None:
    found = quiet(model=str(lm), suite="probes", out=tmp_path / "probes.zarr", limit=80)
    assert [task.name for task in found.tasks] == ["9_b", "10_a", "11_c"]
    for task in range(3):
        items = found.items_of(task)
        texts = [found.text(i) for i in items]
        assert len(set(texts)) == len(texts) == 160
        pairs = Counter(zip(found.item_split[items], found.item_label[items], strict=True))
        assert set(pairs.values()) == {40}
        name = found.tasks[task].name
        assert found.manifest["dropped"][f"{name}: repeated text"] == 29
        assert found.manifest["dropped"][f"{name}: text with both labels"] == 3
    one = quiet(model=str(lm), suite="probes", out=tmp_path / "one.zarr", limit=80, tasks=("10_a",))
    assert [one.text(i) for i in range(160)] == [found.text(i) for i in found.items_of(1)]


@pytest.mark.usefixtures("fetched")
def test_an_unknown_task_lists_the_known_ones(lm: Path, tmp_path: Path) -> None:
    message = r"^Suite ood has no task '5'\. Pass --task with one of 9_b, 10_a\.$"
    with pytest.raises(InputError, match=message):
        quiet(model=str(lm), suite="ood", out=tmp_path / "a.zarr", tasks=("5",))


@pytest.mark.usefixtures("fetched")
def test_published_texts_that_are_too_long_are_cut_and_counted(lm: Path, tmp_path: Path) -> None:
    flags = {"model": str(lm), "suite": "ood", "out": tmp_path / "a.zarr", "context_size": 12}
    lines = said(**flags, limit=40)
    (line,) = [line for line in lines if line.startswith("cut ")]
    assert re.fullmatch(r"cut       longer than a context: \d+ in 2 tasks \((9_b|10_a) .*\)", line)
    assert sum(quiet(**flags, limit=40).manifest["truncated"].values()) > 100


def test_without_the_wheel_the_command_that_fetches_it_is_named(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    message = (
        f"^The texts of sae-probes are not there: {tmp_path}/cache/{wheel.WHEEL} is missing. Run "
        r"`sae-pipe eval-set fetch probes` once \(45 MB\).$"
    )
    with pytest.raises(InputError, match=message):
        quiet(model=str(lm), suite="probes", out=tmp_path / "a.zarr")


def test_the_wheel_is_fetched_by_pip_and_kept_only_if_it_is_the_known_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index").mkdir()
    path = save_wheel(tmp_path / "index")
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    digest = file_digest(path)
    message = (
        f"^{wheel.WHEEL} is not the sae-probes 0.4.2 that is known: its SHA-256 is {digest} instead "
        f"of {wheel.WHEEL_SHA256}. It was not kept; fetch {wheel.WHEEL} again.$"
    )
    with pytest.raises(InputError, match=message):
        wheel.fetch_wheel(None, lambda line: None)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(wheel, "WHEEL_SHA256", digest)
    lines: list[str] = []
    kept = wheel.fetch_wheel(None, lines.append)
    assert kept.read_bytes() == path.read_bytes()
    assert wheel.fetch_wheel(None, lines.append) == kept
    assert lines == [
        f"{kept} is there: sae-probes 0.4.2, 0 MB, MIT licence.",
        f"{kept} is there already. Nothing to do.",
    ]
    kept.write_bytes(b"damaged")
    message = rf"^{kept} is damaged: its SHA-256 is not {digest}\. Run `sae-pipe eval-set fetch"
    with pytest.raises(InputError, match=message), wheel.open_tables():
        pass


def test_an_index_without_the_wheel_is_said_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = (
        r"^sae-probes==0\.4\.2 could not be fetched by pip \(ERROR: No matching distribution found "
        r"for sae-probes==0\.4\.2\)\. Try again where the package index answers\. Or fetch it on "
        r"another machine with `pip download --no-deps sae-probes==0\.4\.2` and pass the file as "
        r"--wheel\.$"
    )
    with pytest.raises(NetworkError, match=message):
        wheel.fetch_wheel(None, lambda line: None)


# --- held-out text ---


def test_a_store_of_the_same_layer_serves_as_it_is(lm: Path, store: Path, tmp_path: Path) -> None:
    lines = said(model=str(lm), suite="core", store=store, out=tmp_path / "core.zarr")
    assert lines == [
        f"Store {store} has {open_store(store).heldout.n_rows} held-out rows of this model, layer "
        "and hook point: nothing has to be built. Pass the store itself to `sae-pipe eval` as "
        "--store."
    ]
    assert not (tmp_path / "core.zarr").exists()


def test_another_layer_gives_the_rows_that_a_harvest_of_it_holds_out(
    lm: Path, text: Path, store: Path, tmp_path: Path
) -> None:
    flags = {"model": str(lm), "suite": "core", "store": store, "layer": 2, "limit": 250}
    found = quiet(**flags, out=tmp_path / "core.zarr")
    assert (found.n_rows, found.pooling, found.tasks) == (250, "all", [])
    (other,) = harvested(
        config_for(lm, text, tmp_path / "acts.zarr", layers=(2,), store_dtype="float32")
    )
    heldout = open_store(other).heldout
    np.testing.assert_allclose(found.read(0, 250), heldout.read(0, 250), atol=1e-5)
    context, position = np.divmod(heldout.source(0, 250), 32)
    np.testing.assert_array_equal(found.row_position, position)
    corpus = open_store(other).corpus.heldout
    document = corpus.documents(0, corpus.n_contexts)[context, position]
    np.testing.assert_array_equal(found.item_document[found.row_item], document)
    tokens = decode_tokens(found.tokenizer_json, found.row_token[:3].tolist())
    assert "".join(tokens) in found.text(0)


def test_text_is_packed_as_a_harvest_packs_it(lm: Path, text: Path, tmp_path: Path) -> None:
    found = quiet(
        model=str(lm), suite="core", text=str(text), out=tmp_path / "core.zarr", limit=200
    )
    assert found.n_rows == 200
    tokenizer = TextTokenizer.load(str(lm))
    assert tokenizer.bos_id not in found.row_token
    assert found.row_position.min() == 1
    assert (np.diff(found.item_document) >= 0).all()
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox")
    lines = said(model=str(lm), suite="core", text=str(short), out=tmp_path / "b.zarr")
    assert re.fullmatch(r"text      gives \d+ rows of the 100,000 asked for", lines[1])


def test_a_store_of_another_tokenizer_is_refused(store: Path, tmp_path: Path) -> None:
    message = (
        f"^The tokens of store {store} are of another tokenizer than that of model {DEMO}. Pass the "
        "model that it was harvested from, or --text.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(model=DEMO, suite="core", store=store, out=tmp_path / "a.zarr")


# --- flags ---


FLAG_MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"suite": "words"},
        "Unknown suite 'words': choose one of letters, ood, probes, core, csv.",
    ),
    (
        {"suite": "letters", "csv": Path("a.csv")},
        "--csv belongs to csv, and --suite letters was asked for. Leave it out.",
    ),
    (
        {"suite": "letters", "tasks": ("a",)},
        "--tasks belongs to ood and probes, and --suite letters was asked for. Leave it out.",
    ),
    ({"suite": "letters", "limit": 0}, "--limit is 0, and has to be 1 or more."),
    (
        {"suite": "letters", "context_size": 1},
        "--context-size is 1, and has to be at least 2: the first position is an attention sink.",
    ),
    (
        {"suite": "letters", "position": "mean"},
        "--position mean is not known to suite letters. Pass one of marked, or leave it out.",
    ),
    (
        {"suite": "csv", "csv": Path("a.csv"), "text_column": "x"},
        "Labelled texts need --csv, --text-column and --label-column. Pass --label-column, too.",
    ),
    (
        {
            "suite": "csv",
            "csv": Path("a.csv"),
            "text_column": "x",
            "label_column": "y",
            "position": "marked",
        },
        "--position marked and --marked-column belong together: the column has the word of each "
        "text whose activation is taken. Pass both or neither.",
    ),
    (
        {"suite": "core"},
        "Suite core needs text: pass --store with a store whose held-out text serves, or --text "
        "with text files or a dataset, one of them.",
    ),
]


@pytest.mark.parametrize(("flags", "message"), FLAG_MISTAKES)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": "m", "layer": 0, "out": Path("x")}
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        EvalSetConfig(**given | flags)


def test_a_context_longer_than_the_model_takes_is_refused(lm: Path, table: Path) -> None:
    message = (
        f"^--context-size 33 is longer than the 32 tokens that model {lm} can take. Pass 32 or "
        "less.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(**csv_flags(lm, table, context_size=33))


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_says_what_it_is_and_has_a_draft(name: str) -> None:
    suite = SUITES[name]
    assert suite.about
    assert suite.limits
    assert callable(suite.draft)


# --- the commands ---


def cli(*args: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, ["eval-set", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback is a bug of ours
    return result.exit_code, result.stdout, result.stderr


def test_the_commands_build_a_set_and_show_it(lm: Path, table: Path) -> None:
    out = table.parent / "pets.zarr"
    args = ["--model", lm, "--layer", 1, "--csv", table, "--text-column", "prompt"]
    args += ["--label-column", "y", "--out", out, "--device", "cpu"]
    code, stdout, _ = cli("build", *args)
    assert code == 0
    assert stdout.endswith(f"{out} is complete: 60 items, 60 rows of 32.\n")
    code, stdout, _ = cli("info", out, "--verify")
    lines = stdout.splitlines()
    assert lines[:2] == ["state   complete", "suite   csv, pooling last, seed 0"]
    assert lines[3:6] == [
        "hook    resid_post of layer 1",
        "items   60",
        "rows    60 of 32",
    ]
    assert "pets        2     48    12    0" in lines
    assert lines[-1] == f"{out} is whole: 26 files match their digests."
    assert json.loads(cli("info", out, "--json")[1])["suite"] == "csv"
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"building"'))
    assert "done   60 rows" in cli("info", out)[1].splitlines()


def test_mistakes_on_the_command_line_are_one_sentence(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--model", lm, "--layer", 1, "--out", tmp_path / "a.zarr"]
    assert cli("build", *args) == (
        2,
        "",
        "Error: Nothing says what to build. Pass --suite with one of letters, ood, probes, core, or "
        "--csv with your own labelled texts.\n",
    )
    assert cli("fetch", "weights") == (
        2,
        "",
        "Error: There is no 'weights' to fetch. Pass probes.\n",
    )
    monkeypatch.setenv("SAE_PIPE_CACHE", str(tmp_path / "cache"))
    assert cli("fetch", "probes", "--wheel", tmp_path / "no.whl")[2] == (
        f"Error: There is no file {tmp_path}/no.whl. Pass the wheel {wheel.WHEEL}.\n"
    )
    code, _, stderr = cli("info", tmp_path / "a.zarr")
    assert code == 2
    assert stderr == (
        f"Error: There is no evaluation set at {tmp_path}/a.zarr. Pass the folder that `sae-pipe "
        "eval-set build --out` wrote.\n"
    )
