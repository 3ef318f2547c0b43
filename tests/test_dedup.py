"""Duplicates: what counts as one, and that what was seen outlives the process."""

import re
import sqlite3
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_pipe.stages.dedup import DEDUPS, digest_of, get_dedup, normalise
from sae_pipe.storage.errors import InputError

WORDS = [f"word{i}" for i in range(400)]
TEXT = " ".join(WORDS)
ONE_WORD_CHANGED = " ".join([*WORDS[:200], "other", *WORDS[201:]])
UNLIKE = " ".join(reversed(WORDS))


def _are_new(name: str, database: sqlite3.Connection, *texts: str) -> list[bool]:
    normalised = [normalise(text) for text in texts]
    return get_dedup(name)(database).are_new(normalised, [digest_of(text) for text in normalised])


@pytest.fixture
def database() -> sqlite3.Connection:
    return sqlite3.connect(":memory:", isolation_level=None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [True, True, True, True]),
        ("exact", [True, False, True, True]),
        ("minhash", [True, False, False, True]),
    ],
)
def test_each_way_drops_what_it_says(
    database: sqlite3.Connection, name: str, expected: list[bool]
) -> None:
    texts = [TEXT, f"\n {TEXT.upper()}\t", ONE_WORD_CHANGED, UNLIKE]
    assert _are_new(name, database, *texts) == expected


@pytest.mark.parametrize("name", [name for name in DEDUPS if name != "none"])
def test_what_was_committed_is_remembered_and_the_rest_forgotten(
    tmp_path: object, name: str
) -> None:
    path = f"{tmp_path}/seen.sqlite"
    first = sqlite3.connect(path, isolation_level=None)
    get_dedup(name)(first)
    first.execute("BEGIN")
    assert _are_new(name, first, TEXT) == [True]
    first.execute("COMMIT")
    first.execute("BEGIN")
    assert _are_new(name, first, UNLIKE) == [True]
    first.close()  # as a killed process leaves it
    second = sqlite3.connect(path, isolation_level=None)
    assert _are_new(name, second, TEXT, UNLIKE, UNLIKE) == [False, True, False]
    second.close()


@pytest.mark.parametrize("name", DEDUPS)
@settings(deadline=None, max_examples=40)
@given(texts=st.lists(st.sampled_from(["a b c", "A  b c", "d e f", "é", "é"]), max_size=8))
def test_the_answers_do_not_depend_on_how_the_text_is_batched(name: str, texts: list[str]) -> None:
    whole, split = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
    one_by_one = [_are_new(name, split, text)[0] for text in texts]
    assert _are_new(name, whole, *texts) == one_by_one
    whole.close()
    split.close()


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_normalised_text_knows_no_case_space_or_compatibility_form(text: str) -> None:
    normal = normalise(text)
    assert normal == normalise(f" {text}\n\n")
    assert normal == normalise(unicodedata.normalize("NFKC", text))
    assert normal == " ".join(normal.split())
    assert len(digest_of(normal)) == 16


def test_normalisation_of_ascii_is_that_of_all_text() -> None:
    assert normalise("The  Quick\tFOX") == "the quick fox"
    assert normalise("ﬁne Straße") == "fine strasse"


def test_texts_shorter_than_a_shingle_are_compared_whole(database: sqlite3.Connection) -> None:
    assert _are_new("minhash", database, "a b", "b a", "A B") == [True, True, False]


def test_minhash_without_its_library_says_what_to_install(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    message = (
        "--dedup minhash needs the datasketch library, which is not installed. Run "
        "`pip install 'sae-pipe[minhash]'`, or pass --dedup exact."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        get_dedup("minhash")(database)


def test_an_unknown_way_lists_the_known_ones() -> None:
    message = "Dedup 'fuzzy' is not known. Known are none, exact, minhash; pass one as --dedup."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        get_dedup("fuzzy")
