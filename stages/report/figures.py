"""The pictures of a report: plain numbers in, SVG out, with all numbers in words for a reader that
does not see them.

An error bar is a 95 % interval. Which colour and mark stands for what is in the legend of the page,
as text (`groups.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compare.grid import number
from ..compare.intervals import Difference, Estimate
from .groups import Group
from .svg import GRID, HEIGHT, INK, MUTED, SERIES, SURFACE, draw

_MOST_BARS = 24
_AXIS_CHARACTERS, _TICK_CHARACTERS = 36, 24

ARROW_WORDS = {"up": "more is better", "down": "less is better", "none": "no way is better"}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One group over L0. points: L0, mean; seeds: L0 and value of each run."""

    group: Group
    points: Sequence[tuple[float, Estimate]]
    seeds: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a value is called, and which way is better."""

    title: str
    direction: str = "none"

    @property
    def label(self) -> str:
        arrow = {"up": " ↑", "down": " ↓"}.get(self.direction, "")
        return self.title + arrow

    @property
    def short_label(self) -> str:
        """As much of it as an axis is long."""
        arrow = {"up": " ↑", "down": " ↓"}.get(self.direction, "")
        return short(self.title, _AXIS_CHARACTERS) + arrow


def short(text: str, most: int) -> str:
    """A text cut to what there is room for; whole it stands in the description."""
    return text if len(text) <= most else text[: most - 1] + "…"


def colour(group: Group) -> str:
    return MUTED if group.slot is None else SERIES[group.slot % len(SERIES)]


def marker(group: Group) -> dict[str, Any]:
    """matplotlib's arguments for the marks of a group."""
    own = colour(group)
    return {
        "marker": group.mark,
        "markerfacecolor": own if group.is_filled else SURFACE,
        "markeredgecolor": own,
        "markeredgewidth": 1.4,
    }


def pareto(name: str, curves: Sequence[Curve], y: Axis, *, x_title: str) -> str:
    """A value over L0, a line for each group."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for curve in curves:
            own = colour(curve.group)
            points = sorted(curve.points, key=lambda point: point[0])
            xs, ys = [x for x, _ in points], [e.value for _, e in points]
            axes.plot(xs, ys, curve.group.line, color=own, zorder=2)
            for x, estimate in points:
                _interval(axes, x, estimate, own)
            axes.plot(xs, ys, linestyle="none", zorder=4, **marker(curve.group))
            if curve.seeds:
                axes.plot(*zip(*curve.seeds, strict=True), ".", color=own, markersize=4, zorder=3)
        _l0_axis(axes, [x for curve in curves for x, _ in curve.points])
        axes.set_ylim(*span(curves))
        axes.set(xlabel=x_title, ylabel=y.short_label)

    words = "; ".join(
        f"{curve.group.label}: "
        + ", ".join(
            f"{number(e.value, 4)} at L0 {x:.1f}" for x, e in sorted(curve.points, key=_first)
        )
        for curve in curves
    )
    return draw(
        paint,
        name=name,
        title=f"{y.title} over L0",
        description=f"{ARROW_WORDS[y.direction]}. {words}.",
    )


def span(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits of the values: all of the runs, and of baselines what is not far from them."""

    def ends(chosen: Sequence[Curve]) -> list[float]:
        every = [estimate for curve in chosen for _, estimate in curve.points]
        found = [e.value for e in every] + [e.low for e in every if e.low is not None]
        found += [e.high for e in every if e.high is not None]
        return found + [value for curve in chosen for _, value in curve.seeds]

    own = ends([curve for curve in curves if curve.group.slot is not None]) or ends(curves)
    low, high = min(own), max(own)
    size = (high - low) or abs(high) or 1.0
    for value in ends(curves):
        if low - size <= value <= high + size:
            own.append(value)
    low, high = min(own), max(own)
    margin = 0.07 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def beyond(curves: Sequence[Curve]) -> str:
    """What does not fit into the picture, in words; empty where all fits."""
    low, high = span(curves)
    found = [
        f"{curve.group.label} {number(e.value, 2)} at L0 {x:.0f}"
        for curve in curves
        for x, e in sorted(curve.points, key=_first)
        if not low <= e.value <= high
    ]
    return f"Beyond the picture: {', '.join(found)}." if found else ""


def _first(point: tuple[float, Estimate]) -> float:
    return point[0]


def _interval(axes: Any, x: float, estimate: Estimate, own: str) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([x, x], [estimate.low, estimate.high], "-", color=own, linewidth=1.1, zorder=3)


def _l0_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic to base 2 with plain numbers, where all values allow it."""
    if values and min(values) > 0 and max(values) > 1.5 * min(values):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.margins(x=0.08)


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Two groups at one place of the axis. pairs: values of runs that share a seed."""

    label: str
    pairs: Sequence[tuple[float, float]]
    difference: Difference | None


def paired(
    name: str, pairings: Sequence[Pairing], groups: tuple[Group, Group], y: Axis, x_title: str
) -> str:
    """Above: each run without and with, joined. Below: the difference with its interval."""
    reference, other = groups

    def paint(figure: Any) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for place, pairing in enumerate(pairings):
            xs = place - 0.17, place + 0.17
            for one, two in pairing.pairs:
                above.plot(xs, (one, two), "-", color=MUTED, linewidth=1, zorder=1)
                above.plot(xs[0], one, linestyle="none", zorder=3, **marker(reference))
                above.plot(xs[1], two, linestyle="none", zorder=3, **marker(other))
            found = pairing.difference
            if found is None:
                continue
            own = colour(other) if found.excludes_zero else MUTED
            if found.low is not None and found.high is not None:
                below.plot((place, place), (found.low, found.high), "-", color=own, linewidth=2)
            below.plot(
                place, found.value, marker="o", color=own, zorder=3, markeredgewidth=1.4,
                markerfacecolor=own if found.excludes_zero else SURFACE,
            )  # fmt: skip
        below.axhline(0, color=INK, linewidth=0.9, zorder=1)
        above.set(ylabel=y.short_label)
        below.set(xlabel=x_title, ylabel="difference")
        for axes in (above, below):
            axes.grid(visible=False, axis="x")
        ticks = [short(pairing.label, _TICK_CHARACTERS) for pairing in pairings]
        below.set_xticks(range(len(pairings)), ticks)
        below.set_xlim(-0.5, len(pairings) - 0.5)
        figure.align_ylabels([above, below])

    words = "; ".join(f"{p.label}: {_in_words(p.difference)}" for p in pairings)
    return draw(
        paint,
        name=name,
        title=f"{y.title}: {other.label} against {reference.label}",
        description=f"Differences, {ARROW_WORDS[y.direction]}. {words}.",
        height=HEIGHT * 1.25,
    )


def _in_words(found: Difference | None) -> str:
    if found is None:
        return "nothing to compare"
    if found.low is None or found.high is None:
        return f"{number(found.value, 4)}, no interval"
    return f"{number(found.value, 4)} from {number(found.low, 4)} to {number(found.high, 4)}"


def by_concept(
    name: str,
    concepts: Sequence[str],
    shares: Mapping[Group, Mapping[str, float]],
    y: Axis,
    *,
    title: str,
) -> str:
    """One mark for each concept (letter) and group; the marks of a concept are joined."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        places = {concept: place for place, concept in enumerate(concepts)}
        for concept, place in places.items():
            found = [of_group[concept] for of_group in shares.values() if concept in of_group]
            if len(found) > 1:
                axes.plot((place, place), (min(found), max(found)), "-", color=GRID, linewidth=2.5)
        for group, of_group in shares.items():
            known = [concept for concept in concepts if concept in of_group]
            axes.plot(
                [places[concept] for concept in known], [of_group[concept] for concept in known],
                linestyle="none", zorder=3, **marker(group) | {"markersize": 4.5},
            )  # fmt: skip
        axes.grid(visible=False, axis="x")
        rotation = 0 if all(len(concept) <= 2 for concept in concepts) else 60
        ticks = [short(concept, _TICK_CHARACTERS) for concept in concepts]
        axes.set_xticks(range(len(concepts)), ticks, fontsize=7, rotation=rotation)
        axes.set_xlim(-0.8, len(concepts) - 0.2)
        axes.set_ylim(bottom=0)
        axes.set(ylabel=y.short_label)

    words = "; ".join(
        f"{group.label}: " + ", ".join(f"{c} {of_group[c]:.0%}" for c in concepts if c in of_group)
        for group, of_group in shares.items()
    )
    return draw(paint, name=name, title=title, description=f"{words}.")


def bars_with_oracle(
    name: str,
    sets: Sequence[str],
    values: Mapping[Group, Mapping[str, float]],
    oracle: Mapping[str, float],
    *,
    title: str,
    axis: Axis,
    chance: float,
) -> str:
    """Horizontal bars from chance, one for each set and group, and the oracle as a line across."""
    height = 0.9 + len(sets) * (0.13 * len(values) + 0.16)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        thick = 0.76 / max(len(values), 1)
        for place, each in enumerate(sets):
            for number_, (group, of_group) in enumerate(values.items()):
                if each in of_group:
                    at = place - 0.38 + (number_ + 0.5) * thick
                    own = colour(group)
                    axes.barh(
                        at, of_group[each] - chance, left=chance, height=thick * 0.86,
                        color=own if group.is_filled else SURFACE, edgecolor=own, linewidth=1.1,
                    )  # fmt: skip
            if each in oracle:
                ends = (place - 0.44, place + 0.44)
                axes.plot((oracle[each],) * 2, ends, "-", color=INK, linewidth=2)
        axes.axvline(chance, color=MUTED, linewidth=0.9)
        axes.set_yticks(range(len(sets)), [short(each, _TICK_CHARACTERS) for each in sets])
        axes.set_ylim(len(sets) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=axis.short_label)

    words = "; ".join(
        f"{each}: "
        + ", ".join(
            [f"{g.label} {v[each]:.3f}" for g, v in values.items() if each in v]
            + ([f"oracle {oracle[each]:.3f}"] if each in oracle else [])
        )
        for each in sets
    )
    return draw(paint, name=name, title=title, description=f"{words}.", height=height)


def steps(
    name: str,
    histograms: Mapping[Group, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_title: str,
    y_title: str,
) -> str:
    """Histograms as outlines. Each: edges, and one count fewer."""
    shown = {group: _trimmed(*histogram) for group, histogram in histograms.items()}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for group, (edges, counts) in shown.items():
            axes.stairs(
                counts, edges, color=colour(group), linewidth=1.6, linestyle=group.line, zorder=2
            )
        axes.set_ylim(bottom=0)
        axes.set(xlabel=x_title, ylabel=y_title)

    words = "; ".join(
        f"{group.label}: most latents, {max(counts):g}, from {edges[_peak(counts)]:g} to "
        f"{edges[_peak(counts) + 1]:g}"
        for group, (edges, counts) in shown.items()
        if len(counts)
    )
    return draw(paint, name=name, title=title, description=f"{words}.")


def _peak(counts: Sequence[float]) -> int:
    return max(range(len(counts)), key=counts.__getitem__)


def _trimmed(
    edges: Sequence[float], counts: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """Without the empty bins at both ends."""
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return edges[:2], counts[:1]
    return edges[filled[0] : filled[-1] + 2], counts[filled[0] : filled[-1] + 1]


def activations(name: str, edges: Sequence[float], counts: Sequence[int], *, title: str) -> str:
    """How often a latent fires how strongly: bars over a logarithmic axis."""
    edges, counts = _merged(edges, counts)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.stairs(counts, edges, fill=True, color=SERIES[0], linewidth=0)
        axes.set_xscale("log", base=10)
        ticks = _ticks(edges[0], edges[-1])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.yaxis.get_major_locator().set_params(nbins=3, integer=True)
        axes.set(xlabel="activation", ylabel="rows")

    top = _peak(counts)
    return draw(
        paint,
        name=name,
        title=title,
        description=(
            f"Activations from {edges[0]:.3g} to {edges[-1]:.3g}; most rows, {counts[top]:,}, from "
            f"{edges[top]:.3g} to {edges[top + 1]:.3g}."
        ),
        width=2.9,
        height=1.35,
    )


def _merged(edges: Sequence[float], counts: Sequence[int]) -> tuple[list[float], list[int]]:
    """Neighbouring bins together, so that there are few enough bars to see."""
    each = -(-len(counts) // _MOST_BARS)
    merged = [sum(counts[start : start + each]) for start in range(0, len(counts), each)]
    return [*edges[: len(counts) : each], edges[-1]], merged


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers of a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps_ in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [step * 10.0**decade for decade in decades for step in steps_]
        inside = [value for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return [low, high] if len(inside) < 2 else inside
