"""The table of `sae-pipe store ls`, as wide as the terminal."""

from collections.abc import Sequence

from ..storage.disk import human_bytes
from ..storage.listing import StoreEntry
from ..storage.shown import shown
from .tables import table

HEADER = (
    "store", "model", "layer", "hook", "p", "rows", "size", "codec", "state", "owner", "date"
)  # fmt: skip
_SHORTENED = ("store", "model", "owner", "codec", "hook")  # where the terminal is narrow
_LEAST = 8  # characters that are left of one
_LEFT_OUT = ("hook", "owner", "codec", "size")  # in this order, where that is not enough
_GAP = 2


def store_table(entries: Sequence[StoreEntry], width: int | None) -> str:
    """One line a store. width: of the terminal, in characters; None for whatever it takes."""
    rows = [dict(zip(HEADER, map(shown, _cells(entry)), strict=True)) for entry in entries]
    names, left_out = list(HEADER), list[str]()
    if width is not None:
        for name in _LEFT_OUT:
            if _width(rows, names, _LEAST) <= width:
                break
            names.remove(name)
            left_out.append(name)
        rows = _shortened(rows, names, width)
    lines = table(names, [[row[name] for name in names] for row in rows])
    if not left_out:
        return lines
    return f"{lines}\n\nLeft out for lack of room: {', '.join(left_out)}; --json has all."


def _cells(entry: StoreEntry) -> list[str]:
    return [
        entry.store,
        entry.model or "-",
        "-" if entry.layer is None else str(entry.layer),
        entry.hook or "-",
        "-" if entry.mask_p is None else f"{entry.mask_p:g}",
        "-" if entry.n_rows is None else f"{entry.n_rows:,}",
        "-" if entry.bytes is None else human_bytes(entry.bytes),
        entry.codec,
        f"part, {entry.progress}" if entry.is_sampled else entry.progress,
        entry.owner or "-",
        (entry.date or "-")[:10],
    ]


def _widths(rows: Sequence[dict[str, str]], names: Sequence[str]) -> dict[str, int]:
    return {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}


def _width(rows: Sequence[dict[str, str]], names: Sequence[str], at_most: int) -> int:
    """Of the table, when what can be shortened has no more characters than `at_most`."""
    widths = _widths(rows, names).items()
    cells = (min(width, at_most) if name in _SHORTENED else width for name, width in widths)
    return sum(cells) + _GAP * (len(names) - 1)


def _shortened(
    rows: Sequence[dict[str, str]], names: Sequence[str], width: int
) -> list[dict[str, str]]:
    """The rows, with the longest cells cut in the middle, as little as will do."""
    at_most = max(_widths(rows, names).values())
    while at_most > _LEAST and _width(rows, names, at_most) > width:
        at_most -= 1
    return [
        {name: _cut(cell, at_most) if name in _SHORTENED else cell for name, cell in row.items()}
        for row in rows
    ]


def _cut(text: str, at_most: int) -> str:
    """The beginning and the end of what is too long: both tell stores apart."""
    if len(text) <= at_most:
        return text
    end = (at_most - 1) // 2
    return f"{text[: at_most - 1 - end]}…{text[len(text) - end :]}"
