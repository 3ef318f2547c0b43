"""Text from files as it may be shown: a name must not move a cursor, colour a terminal or be markup.

Stores, SAE folders and evaluation sets come from anybody. What they call themselves is data until it
reaches a terminal or a page, where ESC sequences, carriage returns, the characters that turn the
direction of writing around (U+202A to U+202E, U+2066 to U+2069) and those without width would make
it something else. The pages of `report` escape by themselves; docs/security.md has the whole list.
"""

import html
import re

# Everything that CommonMark, GitHub and YAML take for markup somewhere inside a line.
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:@$^=])")


def shown(text: str) -> str:
    """The text on one line, with what is not printable escaped: control characters, line ends,
    characters that turn the direction or have no width, lone surrogates.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_lines(text: str) -> str:
    """The same for text of several lines whose line ends are ours."""
    return "\n".join(map(shown, text.split("\n")))


def shown_in_markdown(text: str) -> str:
    """Plain text of Markdown, in a cell of a table too: no markup, no HTML, no links, one line."""
    return html.escape(_PUNCTUATION.sub(r"\\\1", shown(text)), quote=False)
