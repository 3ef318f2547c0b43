"""Groups of runs, and how each is drawn: one colour and mark wherever it appears.

A group is all runs that differ in nothing but L0 and seed. Colours stand for mask ratios where that
is all that differs, and else for everything but the mask ratio, which is then told by the mark:
hollow without a mask, filled with one. Marks differ too, so that no picture needs its colours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..compare.choose import Judgement
from ..compare.facts import WHAT_IT_IS, fact, label, shown, sort_key

_MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "p": "⬟"}
_HOLLOW = {"o": "○", "s": "□", "D": "◇", "^": "△", "v": "▽", "P": "✚", "X": "✖", "p": "⬠"}
_ALWAYS_SAID = ("arch", "mask_p")
_ALONG = ("k",)  # drawn along an axis


@dataclass(frozen=True, kw_only=True)
class Group:
    """slot: number of its colour, None for grey; mark: of matplotlib; line: its dashes."""

    label: str
    slot: int | None
    mark: str
    is_filled: bool = True
    line: str = "-"
    mask_p: Any = None
    apart_from_mask: str = ""

    @property
    def glyph(self) -> str:
        """The mark as a character, for legends."""
        return (_MARKS if self.is_filled else _HOLLOW)[self.mark]


def baseline_group(kind: str) -> Group:
    """Grey: a baseline."""
    mark = {"untrained": "X", "random latents": "P"}.get(kind, "v")
    return Group(label=kind, slot=None, mark=mark, line=":")


@dataclass(frozen=True)
class Groups:
    """The groups of all runs, in the order of legends."""

    keys: tuple[str, ...]
    by_values: dict[tuple[Any, ...], Group]

    @classmethod
    def of(cls, runs: Sequence[Judgement]) -> "Groups":
        keys = tuple(
            key
            for key in WHAT_IT_IS
            if key not in _ALONG
            and (key in _ALWAYS_SAID or len({fact(run.facts, key) for run in runs}) > 1)
        )
        found = {tuple(fact(run.facts, key) for key in keys) for run in runs}
        ordered = sorted(found, key=lambda values: [sort_key(value) for value in values])
        others = list(dict.fromkeys(_without_mask(keys, values) for values in ordered))
        masks = sorted({values[keys.index("mask_p")] for values in ordered}, key=sort_key)
        marks = list(_MARKS)
        groups: dict[tuple[Any, ...], Group] = {}
        for values in ordered:
            mask = values[keys.index("mask_p")]
            other = others.index(_without_mask(keys, values))
            slot, mark = (masks.index(mask),) * 2 if len(others) == 1 else (other, other)
            is_masked = mask not in (None, 0)
            groups[values] = Group(
                label=_label(keys, values),
                slot=slot,
                mark=marks[mark % len(marks)],
                is_filled=is_masked or len(masks) == 1,
                line="-" if is_masked or len(masks) == 1 else "--",
                mask_p=mask,
                apart_from_mask=_label(*_without_mask(keys, values)),
            )
        return cls(keys, groups)

    def of_run(self, run: Judgement) -> Group:
        return self.by_values[tuple(fact(run.facts, key) for key in self.keys)]

    @property
    def all(self) -> list[Group]:
        return list(self.by_values.values())


def _without_mask(
    keys: tuple[str, ...], values: tuple[Any, ...]
) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    pairs = [(key, value) for key, value in zip(keys, values, strict=True) if key != "mask_p"]
    return tuple(key for key, _ in pairs), tuple(value for _, value in pairs)


def _label(keys: Sequence[str], values: Sequence[Any]) -> str:
    pairs = zip(keys, values, strict=True)
    return ", ".join(shown(value) if key == "arch" else label(key, value) for key, value in pairs)
