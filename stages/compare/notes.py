"""What stands under a table: of how much the numbers are, and what to keep in mind about them."""

from collections.abc import Sequence
from typing import Any

from .choose import Judgement, Series
from .facts import differing_recipes, fact, label, name_of, shown
from .intervals import NO_INTERVAL, PAIRED, UNPAIRED
from .table import BASELINES, Comparison, Line

ARROWS = {"up": "↑", "down": "↓", "none": ""}
MARKS = {PAIRED: "", UNPAIRED: "†", NO_INTERVAL: "‡"}
_LISTED = 6
_MUCH = 1.2  # L0 that differ by more than this factor are no like-for-like comparison


def notes(comparison: Comparison) -> list[str]:
    """Sentences, the most needed first."""
    return [
        *_of_seeds(comparison),
        *_of_differences(comparison),
        *_of_baselines(comparison),
        *_of_refused(comparison),
        *_of_data(comparison),
        *_of_apart(comparison),
        *about_l0(comparison),
        *_of_recipes(comparison),
        *_of_samples(comparison),
    ]


def source_label(comparison: Comparison, series: Series) -> str:
    """What a series was judged on, where another one of the same metric was judged on other data."""
    of_metric = {each.data for each in comparison.series if each.metric == series.metric}
    if len(of_metric) < 2:
        return ""
    entry = next(entry for entry in _entries(comparison, series))
    same_source = {
        other.data
        for other in comparison.series
        if other.metric == series.metric
        and next(_entries(comparison, other)).source.digest == entry.source.digest
    }
    options = ", ".join(f"{name}={shown(value)}" for name, value in entry.options.items())
    what = f"{entry.source.name} ({entry.source.digest[:8]})"
    return f"{what}, {options or 'no options'}, v{entry.version}" if len(same_source) > 1 else what


def _entries(comparison: Comparison, series: Series) -> Any:
    found = (judgement.entry(series) for judgement in comparison.judgements)
    return (entry for entry in found if entry is not None)


def _of_seeds(comparison: Comparison) -> list[str]:
    counts = {
        (place(comparison, line), label(comparison.compared, column)): len(cell.estimate.seeds)
        for line in comparison.lines
        for column, cell in line.cells.items()
    }
    seeds = sorted({str(s) for run in comparison.runs for s in [run.facts.get("seed")]})
    most = max(counts.values())
    if most == 1:
        return ["Each number is of one SAE: what another seed would give is not in any interval."]
    few = [f"{where}, {column}: {n}" for (where, column), n in counts.items() if n < most]
    sentence = f"Means over {most} SAEs (seeds {', '.join(seeds)})"
    return [f"{sentence}; fewer in {_some(few)}." if few else f"{sentence}."]


def place(comparison: Comparison, line: Line) -> str:
    """A line as text: series and value of the last key."""
    if comparison.line_key is None:
        return line.series.name
    return f"{line.series.name} at {label(comparison.line_key, line.key_value)}"


def _of_differences(comparison: Comparison) -> list[str]:
    found = comparison.all_differences
    if not found:
        return []
    ways = {each.how for each in found}
    reference = label(comparison.compared, comparison.columns[0])
    sentences = [
        f"Differences are from {reference}, with 95 % intervals, each by itself. Bold: the interval "
        "excludes 0; a bold number is the better one."
    ]
    if PAIRED in ways:
        sentences.append(
            "Intervals are percentiles of paired differences, on the same bootstrap resamples, "
            "pooled over seeds."
        )
    if UNPAIRED in ways:
        sentences.append(
            f"{MARKS[UNPAIRED]} unpaired: not on the same resamples (another seed or number of them, "
            "or none kept), so that the two are taken as independent; the interval is wider."
        )
    if NO_INTERVAL in ways:
        sentences.append(f"{MARKS[NO_INTERVAL]} no interval: the two numbers have none.")
    return sentences


def _of_baselines(comparison: Comparison) -> list[str]:
    found = {name for line in comparison.lines for name in line.baselines}
    missing = [name for name in BASELINES if name not in found]
    sentences = []
    if found:
        sentences.append(
            "Baselines are means over those of the line's SAEs: untrained ones of the same shape, "
            "random latents of the same frequencies, the mean of the data, and the probe on raw "
            "activations (oracle) where there is one."
        )
    if missing:
        sentences.append(f"Not among these results: {', '.join(missing)}.")
    return sentences


def _of_refused(comparison: Comparison) -> list[str]:
    """Series without a number, with the reason that their metric gives."""
    shown_series = {line.series for line in comparison.lines}
    by_reason: dict[str, dict[str, None]] = {}
    for series in comparison.series:
        if series not in shown_series:
            entries = (run.entry(series) for run in comparison.runs)
            reasons = (entry.details.get("refused") for entry in entries if entry is not None)
            reason = next((each for each in reasons if isinstance(each, str)), "It is not defined.")
            by_reason.setdefault(reason, {})[series.name] = None
    return [f"No value of {', '.join(names)}. {reason}" for reason, names in by_reason.items()]


def _of_data(comparison: Comparison) -> list[str]:
    """One sentence for each metric that some runs were judged on other data than others for."""
    sentences = []
    for metric in dict.fromkeys(series.metric for series in comparison.series):
        sides: dict[bytes, tuple[str, list[str]]] = {}
        for series in comparison.series:
            if series.metric == metric and series.data not in sides:
                runs = [run.name for run in comparison.runs if run.entry(series) is not None]
                sides[series.data] = source_label(comparison, series), runs
        if len({tuple(runs) for _, runs in sides.values()}) > 1:
            listed = "; ".join(f"{what}: {_some(runs)}" for what, runs in sides.values())
            sentences.append(
                f"{metric} was judged on different data, which is not mixed but listed apart: "
                f"{listed}."
            )
    return sentences


def _of_apart(comparison: Comparison) -> list[str]:
    return [
        f"SAEs differ in {name_of(key)}, which --by does not name: they are listed apart by it."
        for key in comparison.apart
    ]


def about_l0(comparison: Comparison) -> list[str]:
    """A sentence where measured L0 differ: other metrics are not compared like for like there."""
    worst: tuple[float, str] | None = None
    for line in comparison.lines:
        values = {c: cell.estimate.value for c, cell in line.cells.items()}
        if line.series.name != "l0" or len(values) < 2 or min(values.values()) <= 0:
            continue
        low, high = min(values.values()), max(values.values())
        if high > _MUCH * low and (worst is None or high / low > worst[0]):
            where = (
                [] if comparison.line_key is None else [label(comparison.line_key, line.key_value)]
            )
            each = ", ".join(f"{label(comparison.compared, c)}: {v:.1f}" for c, v in values.items())
            worst = high / low, "; ".join([*where, each])
    if worst is None:
        return []
    return [
        "Measured L0 differ by more than 20 % between columns, so that other metrics are not compared "
        f"like for like there. Most where {worst[1]}."
    ]


def _of_recipes(comparison: Comparison) -> list[str]:
    """Recipes that differ among the SAEs of one cell."""
    keys = [comparison.compared, *(t for table in comparison.tables for t in table.heading)]
    keys += [comparison.line_key] if comparison.line_key else []
    cells: dict[tuple[Any, ...], list[Judgement]] = {}
    for run in comparison.runs:
        cells.setdefault(tuple(fact(run.facts, key) for key in dict.fromkeys(keys)), []).append(run)
    differing: dict[str, list[Any]] = {}
    for runs in cells.values():
        for name, values in differing_recipes([run.facts for run in runs]).items():
            differing.setdefault(name, values)
    named = [n for n in differing if f"recipe.{n}" not in keys]
    if not named:
        return []
    listed = ", ".join(
        f"{name} ({', '.join(map(shown, differing[name]))})" for name in named[:_LISTED]
    )
    return [f"SAEs of one cell differ in their recipes: {listed}. Name it in --by as recipe.NAME."]


def _of_samples(comparison: Comparison) -> list[str]:
    """Of how much each number is; metrics that agree in it share a sentence."""
    by_text: dict[str, dict[str, None]] = {}
    for series in comparison.series:
        entries = list(_entries(comparison, series))
        names = dict.fromkeys(name for entry in entries for name in entry.sample)
        sizes = [_range([e.sample[n] for e in entries if n in e.sample], n) for n in names]
        source = entries[0].source
        seeds = sorted({entry.seed for entry in entries})
        suite = f", suite {source.suite}" if source.suite else ""
        text = (
            f"{', '.join(sizes) or 'size not given'} of {source.name} ({source.kind}{suite}, "
            f"{source.digest[:8]}); interval {' or '.join(dict.fromkeys(e.interval for e in entries))}; "
            f"seed {', '.join(map(str, seeds))}"
        )
        by_text.setdefault(text, {})[series.name] = None
    return [f"{', '.join(names)}: {text}." for text, names in by_text.items()]


def _range(values: Sequence[int], unit: str) -> str:
    low, high = min(values), max(values)
    unit = unit.replace("_", " ")
    return f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
