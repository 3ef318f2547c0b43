"""Sections over L0: Pareto curves, and masked against unmasked runs."""

from collections.abc import Sequence

from ..compare.choose import Judgement, Series, baselines_of, series_of
from ..compare.facts import fact, sort_key
from ..compare.headlines import DIRECTIONS
from ..compare.intervals import Difference, Estimate, Sample, difference, mean_of
from .figures import Axis, Curve, Pairing, beyond, paired, pareto
from .groups import Group, Groups, baseline_group
from .names import FOREMOST, title_of
from .page import Picture, Section

_PARETO_TEXT = (
    "Points are means over seeds, small dots single SAEs, bars 95 % intervals. L0 is measured on the "
    "same unmasked rows, not the one asked for: compare curves at equal L0. Up and to the left is "
    "better where the arrow points up."
)
_PAIRED_TEXT = (
    "Above, each line joins two SAEs of one seed. Below, the mean difference with its 95 % interval; "
    "a filled mark is a difference whose interval excludes 0, a hollow one may be none. Places are by "
    "the L0 asked for; what was measured is in the curves above."
)


class Curves:
    """The runs of a report, by what figures need of them."""

    def __init__(self, judgements: Sequence[Judgement], groups: Groups) -> None:
        self.judgements, self.groups = judgements, groups
        self.runs = [judgement for judgement in judgements if judgement.baseline is None]
        series = series_of(self.runs, None)
        self._l0 = [each for each in series if each.metric == "l0"]
        self.foremost = _widest(self.runs, [s for s in series if (s.metric, s.value) in FOREMOST])
        self.foremost.sort(key=lambda each: FOREMOST.index((each.metric, each.value)))
        others = [s for s in series if (s.metric, s.value) not in FOREMOST]
        self.others = [s for s in _widest(self.runs, others) if self.direction(s) != "none"]

    def direction(self, series: Series) -> str:
        entries = (run.entry(series) for run in self.runs)
        stated = next((entry.direction for entry in entries if entry is not None), "none")
        return DIRECTIONS.get((series.metric, series.value), stated)

    def axis(self, series: Series) -> Axis:
        title = title_of(series.metric, series.value)
        return Axis(title=title, direction=self.direction(series))

    def l0(self, judgement: Judgement) -> float | None:
        """Measured L0, or else the one asked for."""
        for series in self._l0:
            sample = judgement.sample(series)
            if sample is not None:
                return sample.value
        k = judgement.facts.get("k")
        return float(k) if isinstance(k, int | float) else None

    # --- Pareto ---

    def pareto_section(self) -> Section | None:
        pictures = [self._pareto(series, f"pareto-{n}") for n, series in enumerate(self.foremost)]
        folded = [self._pareto(series, f"more-{n}") for n, series in enumerate(self.others)]
        if not pictures and not folded:
            return None
        kinds = dict.fromkeys(each.baseline for each in self.judgements if each.baseline)
        return Section(
            id="pareto",
            title="What sparsity costs",
            text=[_PARETO_TEXT],
            legend=[*self.groups.all, *(baseline_group(str(k)) for k in kinds if k == "untrained")],
            pictures=pictures,
            folded=folded,
            folded_title=f"{len(folded)} more metrics over L0",
        )

    def _pareto(self, series: Series, name: str) -> Picture:
        curves = [self._curve(group, self._of(group), series) for group in self.groups.all]
        untrained = baselines_of(self.runs, self.judgements).get("untrained", [])
        curves.append(self._curve(baseline_group("untrained"), untrained, series))
        axis = self.axis(series)
        x_title = "active latents a row (L0)"
        shown = [curve for curve in curves if curve.points]
        return Picture(
            caption=f"{axis.label} over L0",
            svg=pareto(name, shown, axis, x_title=x_title),
            note=beyond(shown),
        )

    def _of(self, group: Group) -> list[Judgement]:
        return [run for run in self.runs if self.groups.of_run(run) == group]

    def _curve(self, group: Group, judged: Sequence[Judgement], series: Series) -> Curve:
        by_k: dict[object, list[tuple[float, Sample]]] = {}
        for judgement in judged:
            sample, l0 = judgement.sample(series), self.l0(judgement)
            if sample is not None and l0 is not None:
                by_k.setdefault(fact(judgement.facts, "k"), []).append((l0, sample))
        points: list[tuple[float, Estimate]] = [
            (sum(l0 for l0, _ in found) / len(found), mean_of([sample for _, sample in found]))
            for found in by_k.values()
        ]
        seeds = [
            (l0, sample.value) for found in by_k.values() if len(found) > 1 for l0, sample in found
        ]
        return Curve(group=group, points=points, seeds=seeds)

    # --- masked against unmasked ---

    def paired_section(self) -> Section | None:
        pictures = [
            picture
            for number, (reference, other) in enumerate(self._mask_pairs())
            for picture in self._paired_pictures(reference, other, number)
        ]
        if not pictures:
            return None
        used = [group for pair in self._mask_pairs() for group in pair]
        return Section(
            id="masking",
            title="What masking changes",
            text=[_PAIRED_TEXT],
            legend=list(dict.fromkeys(used)),
            pictures=pictures,
        )

    def _mask_pairs(self) -> list[tuple[Group, Group]]:
        """Groups that differ in the mask ratio alone: the lowest, and each other."""
        families: dict[str, list[Group]] = {}
        for group in self.groups.all:
            families.setdefault(group.apart_from_mask, []).append(group)
        pairs = []
        for family in families.values():
            first, *others = sorted(family, key=lambda group: sort_key(group.mask_p))
            pairs += [(first, other) for other in others]
        return pairs

    def _paired_pictures(self, reference: Group, other: Group, number: int) -> list[Picture]:
        pictures = []
        for place, series in enumerate(self.foremost):
            pairings = self._pairings(reference, other, series)
            if not any(pairing.pairs for pairing in pairings):
                continue
            axis = self.axis(series)
            x_title = "L0 asked for"
            pictures.append(
                Picture(
                    caption=f"{axis.label}: {other.label} against {reference.label}",
                    svg=paired(
                        f"paired-{number}-{place}", pairings, (reference, other), axis, x_title
                    ),
                )
            )
        return pictures

    def _pairings(self, reference: Group, other: Group, series: Series) -> list[Pairing]:
        sides = []
        for group in (reference, other):
            by_k: dict[object, list[Sample]] = {}
            for run in self._of(group):
                sample = run.sample(series)
                if sample is not None:
                    by_k.setdefault(fact(run.facts, "k"), []).append(sample)
            sides.append(by_k)
        pairings = []
        for k in sorted({*sides[0], *sides[1]}, key=sort_key):
            ones, twos = (side.get(k, []) for side in sides)
            found: Difference | None = difference(twos, ones) if ones and twos else None
            pairs = [(one.value, two.value) for one in ones for two in twos if one.seed == two.seed]
            pairings.append(Pairing(label=str(k), pairs=pairs, difference=found))
        return pairings


def _widest(runs: Sequence[Judgement], series: Sequence[Series]) -> list[Series]:
    """Of each value the one set of data that most runs were judged on: a picture mixes none."""
    best: dict[tuple[str, str], tuple[int, Series]] = {}
    for each in series:
        count = sum(run.sample(each) is not None for run in runs)
        if count > best.get((each.metric, each.value), (0, each))[0]:
            best[each.metric, each.value] = count, each
    return [each for _, each in best.values()]
