"""Contexts of a latent as marked text: which tokens are shaded, and how strongly.

A token has one of LEVELS shades by its share of the latent's largest activation shown. What is
read is the text; a shade repeats what the marks say, and the number at the peak is beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...storage.shown import shown
from ..latents import LatentView, ShadedContext

LEVELS = 9
AROUND = 24  # tokens on each side of the peak
NEWLINE = "↵"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens of one shade. level 0: not active; value: the activation, as text."""

    text: str
    level: int = 0
    value: str = ""
    is_peak: bool = False


@dataclass(frozen=True, kw_only=True)
class ContextView:
    """excerpt: the tokens around the peak; whole: all of them, empty where the excerpt is all."""

    activation: str
    context: int
    excerpt: list[Piece]
    whole: list[Piece]
    begins: bool
    ends: bool


def context_views(latent: LatentView) -> list[ContextView]:
    """The contexts of a latent, on one scale."""
    largest = max((context.largest for context in latent.contexts), default=0.0)
    return [_view(context, largest) for context in latent.contexts]


def _view(context: ShadedContext, largest: float) -> ContextView:
    first = max(context.peak - AROUND, 0)
    last = min(context.peak + AROUND + 1, len(context.tokens))
    is_all = (first, last) == (0, len(context.tokens))
    return ContextView(
        activation=f"{context.largest:.3g}",
        context=context.context,
        excerpt=pieces(context, first, last, largest),
        whole=[] if is_all else pieces(context, 0, len(context.tokens), largest),
        begins=first == 0,
        ends=last == len(context.tokens),
    )


def pieces(context: ShadedContext, first: int, last: int, largest: float) -> list[Piece]:
    """Tokens first to last; those that are not active are joined."""
    found: list[Piece] = []
    plain: list[str] = []
    for place in range(first, last):
        value = float(context.activation_T[place])
        level = level_of(value, largest)
        if level == 0:
            plain.append(context.tokens[place])
            continue
        if plain:
            found.append(Piece(text=visible(plain)))
            plain = []
        found.append(
            Piece(
                text=visible([context.tokens[place]]),
                level=level,
                value=f"{value:.3g}",
                is_peak=place == context.peak,
            )
        )
    if plain:
        found.append(Piece(text=visible(plain)))
    return found


def level_of(value: float, largest: float) -> int:
    """0 for what is not active (or has no row), else 1 to LEVELS by its share of the largest."""
    if not value > 0 or not largest > 0:
        return 0
    return max(1, math.ceil(LEVELS * min(value / largest, 1.0)))


def visible(tokens: Sequence[str]) -> str:
    """Texts of tokens joined, with line breaks as a sign, so that a context is one paragraph."""
    return shown("".join(tokens).replace("\r\n", NEWLINE).replace("\n", NEWLINE))
