"""Groups of runs, and how each is drawn: one colour and mark wherever it appears.

A group is all runs that differ in nothing but L0 and seed. Colours stand for mask ratios where that
is all that differs, and else for everything but the mask ratio, which is then told by the mark:
hollow without a mask, filled with one. Marks differ too, so that no picture needs its colours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compare.choose import Judgement
from ..compare.facts import WHAT_IT_IS, fact, label, shown, sort_key

_MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "p": "⬟"}
_HOLLOW = {"o": "○", "s": "□", "D": "◇", "^": "△", "v": "▽", "P": "✚", "X": "✖", "p": "⬠"}
_ARCH, _MASK = "arch", "mask_p"
_ALONG = "k"  # drawn along an axis
# What makes groups, in the order of their labels.
_KEYS = (_ARCH, *(key for key in WHAT_IT_IS if key not in (_ARCH, _MASK, _ALONG)), _MASK)


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
        differing = [key for key in _KEYS if len({fact(run.facts, key) for run in runs}) > 1]
        said = differing or [_ARCH, _MASK]
        keys = tuple(dict.fromkeys([*differing, _ARCH, _MASK]))
        found = {tuple(fact(run.facts, key) for key in keys) for run in runs}
        ordered = sorted(found, key=lambda values: [sort_key(value) for value in values])
        kinds = [dict(zip(keys, values, strict=True)) for values in ordered]
        others = list(dict.fromkeys(_label(kind, keys, but=_MASK) for kind in kinds))
        masks = sorted({kind[_MASK] for kind in kinds}, key=sort_key)
        groups = {}
        for values, kind in zip(ordered, kinds, strict=True):
            place = others.index(_label(kind, keys, but=_MASK))
            slot = masks.index(kind[_MASK]) if len(others) == 1 else place
            is_masked = kind[_MASK] not in (None, 0) or len(masks) == 1
            groups[values] = Group(
                label=_label(kind, said),
                slot=slot,
                mark=list(_MARKS)[slot % len(_MARKS)],
                is_filled=is_masked,
                line="-" if is_masked else "--",
                mask_p=kind[_MASK],
                apart_from_mask=_label(kind, said, but=_MASK),
            )
        return cls(keys, groups)

    def of_run(self, run: Judgement) -> Group:
        return self.by_values[tuple(fact(run.facts, key) for key in self.keys)]

    @property
    def all(self) -> list[Group]:
        return list(self.by_values.values())


def _label(kind: Mapping[str, Any], keys: Iterable[str], *, but: str | None = None) -> str:
    parts = [
        shown(kind[key]) if key == _ARCH else label(key, kind[key]) for key in keys if key != but
    ]
    return ", ".join(parts)
