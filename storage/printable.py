"""Text from files as it may be shown: a name must not move a cursor or colour a terminal."""


def printable(text: str) -> str:
    """The text with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
