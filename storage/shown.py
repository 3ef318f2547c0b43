"""Text from files as it may be shown: a name must not move a cursor, colour a terminal or be markup.

Stores, SAE folders and evaluation sets come from anybody. What they call themselves is data until it
reaches a terminal or a page, where ESC sequences, carriage returns, the characters that turn the
direction of writing around (U+202A to U+202E, U+2066 to U+2069) and those without width would make
it something else. The pages of `report` escape by themselves; docs/security.md has the whole list.
"""

import html
import re
import unicodedata

# Everything that CommonMark, GitHub and YAML take for markup somewhere inside a line.
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:@$^=])")


# What Python calls printable, and nobody sees: Default_Ignorable_Code_Point of Unicode 16
# (DerivedCoreProperties.txt) as far as it is neither Cf nor unassigned, and the blank of Braille.
_UNSEEN = frozenset(
    map(ord, "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
).union(range(0xFE00, 0xFE10), range(0xE0000, 0xE1000))
_MARKS_TOGETHER = 2  # a vowel and a tone: more are piled up beyond their line


def shown(text: str) -> str:
    """The text on one line, with what is not seen as itself escaped: control characters, line ends,
    characters that turn the direction or have no width, lone surrogates, marks that enclose others
    and all but two marks on one character.
    """
    if text.isascii() and text.isprintable():
        return text
    out, marks = [], 0
    for c in text:
        kind = unicodedata.category(c)
        marks = marks + 1 if kind == "Mn" else 0
        is_seen = c.isprintable() and ord(c) not in _UNSEEN and kind != "Me"
        is_seen = is_seen and marks <= _MARKS_TOGETHER
        out.append(c if is_seen else c.encode("unicode_escape").decode())
    return "".join(out)


def shown_lines(text: str) -> str:
    """The same for text of several lines whose line ends are ours."""
    return "\n".join(map(shown, text.split("\n")))


def shown_in_markdown(text: str) -> str:
    """Plain text of Markdown, in a cell of a table too: no markup, no HTML, no links, one line."""
    return html.escape(_PUNCTUATION.sub(r"\\\1", shown(text)), quote=False)
