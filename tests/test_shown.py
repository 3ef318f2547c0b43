"""Text from files on a terminal and in Markdown: it stays text."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_pipe.storage.shown import shown, shown_in_markdown, shown_lines

HOSTILE = [
    ("\x1b[2Jpythia", "\\x1b[2Jpythia"),
    ("good\rbad", "good\\rbad"),
    ("one\nError: two", "one\\nError: two"),
    ("bell\x07", "bell\\x07"),
    ("\x9b31m", "\\x9b31m"),  # CSI as one character
    ("evil\u202etxt.exe", "evil\\u202etxt.exe"),
    ("\u2066inner\u2069", "\\u2066inner\\u2069"),
    ("pay\u200bpal", "pay\\u200bpal"),
    ("\ufeffname", "\\ufeffname"),
    ("tag\U000e0041", "tag\\U000e0041"),
    ("half \ud800 pair", "half \\ud800 pair"),
    ("a\u2028b\u2029c", "a\\u2028b\\u2029c"),
    *(
        (f"a{c}b", f"a\\u{ord(c):04x}b")
        for c in "\u034f\u3164\u115f\u1160\ufe0f\u17b4\u180b\u2800\uffa0"
    ),
    ("a\U000e0100b", "a\\U000e0100b"),
    ("a\u20dd", "a\\u20dd"),  # a circle around the character before
    ("a" + "\u0301" * 4 + "b", "a\u0301\u0301\\u0301\\u0301b"),  # piled up beyond its line
]


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_what_moves_a_cursor_or_hides_is_escaped(text: str, expected: str) -> None:
    assert shown(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "EleutherAI/pythia-160m",
        "blocks.8.hook_resid_post",
        "größe 大 é",
        "e\u0301",
        "ที่",
        "हिन्दी",
        "😀",
    ],
)
def test_ordinary_names_stay_as_they_are(text: str) -> None:
    assert shown(text) == text


def test_line_ends_of_ours_stay_and_the_lines_are_escaped() -> None:
    assert shown_lines("one\n\x1btwo\r\n") == "one\n\\x1btwo\\r\n"


@given(st.text())
def test_nothing_that_is_shown_is_a_control_or_a_format_character(text: str) -> None:
    result = shown(text)
    assert not {unicodedata.category(c) for c in result} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    result.encode()  # no lone surrogate is left


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x](javascript:alert(1))", r"x\]\(javascript\:alert\(1\)\)"),
        ("<script>alert(1)</script>", r"&lt;script&gt;alert\(1\)&lt;/script&gt;"),
        ("a | b", r"a \| b"),
        ("a\n\n# b", r"a\\n\\n\# b"),
        ("![x](http://a.b/c)", r"\!\[x\]\(http\://a\.b/c\)"),
        ("`code`&amp;", r"\`code\`&amp;amp;"),
    ],
)
def test_markup_is_shown_as_the_text_that_it_is(text: str, expected: str) -> None:
    assert shown_in_markdown(text) == expected
