"""Sections from the details of metrics: letters, sets out of distribution, densities.

Details are JSON of other hands: what has another form than ours is left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..compare.choose import Judgement
from ..compare.facts import fact, label, sort_key
from .figures import Axis, bars_with_oracle, by_concept, steps
from .groups import Group, Groups
from .page import Cell, DataTable, LatentPages, Link, Picture, Section

_CHANCE = 0.5  # AUC of a probe that knows nothing
_MOST_EXAMPLES = 10

Details = Mapping[str, Any]


def letters_section(
    runs: Sequence[Judgement], groups: Groups, places: LatentPages
) -> Section | None:
    """Absorption by concept: a picture for each L0, a table with examples for each run."""
    shown_groups: dict[Group, None] = {}
    pictures, tables = [], []
    for number, (title, judged) in enumerate(_panels(runs, "absorption", groups)):
        shares = _means(judged, groups, "concepts", _concept_share)
        concepts = sorted({concept for share in shares.values() for concept in share})
        if not concepts:
            continue
        shown_groups |= dict.fromkeys(shares)
        picture = by_concept(
            f"letters-{number}", concepts, shares, Axis(title="share absorbed", direction="down"),
            title=f"Full absorption by concept, {title}",
        )  # fmt: skip
        pictures.append(Picture(caption=title, svg=picture))
        tables += [_concept_table(run, details, places) for run, details in judged]
    if not pictures:
        return None
    return Section(
        id="absorption",
        title="Absorption, letter by letter",
        text=[
            "Share of judged words in which every main latent of a letter is silent and another "
            "latent carries the letter instead; mean over seeds. The tables name the words, the "
            "latent that carries each, and the share of the letter's direction that it carries."
        ],
        legend=list(shown_groups),
        pictures=pictures,
        tables=tables,
        tables_title="Words and latents, run by run",
    )


def _concept_share(entry: Details) -> tuple[str, float] | None:
    name, share = entry.get("concept"), _number(entry.get("full_absorption"))
    return None if name is None or share is None else (str(name), share)


def _concept_table(run: Judgement, details: Details, places: LatentPages) -> DataTable:
    rows: list[list[Cell]] = []
    for entry in _entries(details, "concepts"):
        main = entry.get("main")
        words = _entries(entry, "absorbed")[:_MOST_EXAMPLES]
        rows.append(
            [
                str(entry.get("concept", "")),
                str(entry.get("words", "-")),
                _text(entry.get("probe_f1"), ".2f"),
                _text(entry.get("k1_f1"), ".2f"),
                _joined([[places.link(run, each)] for each in main])
                if isinstance(main, list)
                else "-",
                _text(entry.get("full_absorption"), ".0%"),
                _text(entry.get("absorption_fraction"), ".0%"),
                _joined([_word(run, each, places) for each in words]) or "none",
            ]
        )
    refused = details.get("refused_concepts")
    note = ""
    if isinstance(refused, Mapping) and refused:
        listed = "; ".join(f"{name}: {why}" for name, why in refused.items())
        note = f"Not judged: {listed}."
    return DataTable(
        title=run.name,
        header=(
            "concept", "words", "F1 of its probe", "F1 of one latent", "main latents", "absorbed",
            "fraction", "absorbed words",
        ),
        rows=rows,
        note=note,
    )  # fmt: skip


def _word(run: Judgement, example: Details, places: LatentPages) -> list[Link]:
    share = _text(example.get("share"), ".0%")
    return [
        Link(text=f"{str(example.get('word', '')).strip()} (latent "),
        places.link(run, example.get("latent")),
        Link(text=f", {share})"),
    ]


def _joined(parts: Sequence[Sequence[Link]]) -> list[Link]:
    """Parts with commas between them."""
    found: list[Link] = []
    for part in parts:
        found += [Link(text=", ")] if found else []
        found += part
    return found


def ood_section(runs: Sequence[Judgement], groups: Groups) -> Section | None:
    """AUC on each set out of distribution, with the oracle's."""
    shown_groups: dict[Group, None] = {}
    malformed: dict[str, None] = {}
    pictures = []
    for number, (title, judged) in enumerate(_panels(runs, "ood_probing", groups)):
        values = _means(judged, groups, "tasks", _task_value("ood_auc"))
        oracles = _means(judged, groups, "tasks", _task_value("oracle_ood_auc"))
        sets = list(dict.fromkeys(each for of_group in values.values() for each in of_group))
        if not sets:
            continue
        oracle = {k: v for of_group in oracles.values() for k, v in of_group.items()}
        shown_groups |= dict.fromkeys(values)
        for _, details in judged:
            found = details.get("malformed")
            malformed |= dict.fromkeys(map(str, found if isinstance(found, list) else []))
        picture = bars_with_oracle(
            f"ood-{number}", sets, values, oracle,
            title=f"AUC out of distribution, {title}",
            axis=Axis(title="AUC", direction="up"), chance=_CHANCE,
        )  # fmt: skip
        pictures.append(Picture(caption=title, svg=picture))
    if not pictures:
        return None
    text = [
        "AUC of a probe on a few latents, on text of another kind than it was trained on; mean over "
        "seeds. The upright line is the oracle, a probe on raw activations. Bars begin at chance, 0.5."
    ]
    if malformed:
        text.append(f"Malformed out of distribution, as published: {', '.join(malformed)}.")
    return Section(
        id="ood",
        title="Out of distribution",
        text=text,
        legend=list(shown_groups),
        has_oracle_line=True,
        pictures=pictures,
    )


def _task_value(key: str) -> Callable[[Details], tuple[str, float] | None]:
    def value(entry: Details) -> tuple[str, float] | None:
        name, found = entry.get("task"), _number(entry.get(key))
        return None if name is None or found is None else (str(name), found)

    return value


def density_section(runs: Sequence[Judgement], groups: Groups) -> Section | None:
    """How often latents fire, as histograms over latents."""
    shown_groups: dict[Group, None] = {}
    pictures = []
    for number, (title, judged) in enumerate(_panels(runs, "density", groups)):
        by_group: dict[Group, list[tuple[list[float], list[float], int]]] = {}
        for run, details in judged:
            histogram = _histogram(details)
            if histogram is not None:
                by_group.setdefault(groups.of_run(run), []).append(histogram)
        by_group = {g: [h for h in found if h[0] == found[0][0]] for g, found in by_group.items()}
        if not by_group:
            continue
        shown_groups |= dict.fromkeys(by_group)
        means = {
            group: (found[0][0], [sum(c) / len(found) for c in zip(*(h[1] for h in found), strict=True)])
            for group, found in by_group.items()
        }  # fmt: skip
        never = "; ".join(
            f"{group.label}: {sum(h[2] for h in found) / len(found):g}"
            for group, found in by_group.items()
        )
        picture = steps(
            f"density-{number}", means,
            title=f"Histogram of densities, {title}",
            x_title="log10 of the share of rows that a latent fires on", y_title="latents",
        )  # fmt: skip
        pictures.append(Picture(caption=title, svg=picture, note=f"Never fired: {never}."))
    if not pictures:
        return None
    return Section(
        id="density",
        title="How often latents fire",
        text=["Latents by the share of rows they fire on; mean over seeds."],
        legend=list(shown_groups),
        pictures=pictures,
    )


def _histogram(details: Details) -> tuple[list[float], list[float], int] | None:
    edges, counts = details.get("log10_density_edges"), details.get("latents")
    if not isinstance(edges, list) or not isinstance(counts, list):
        return None
    numbers = [_number(value) for value in (*edges, *counts)]
    if None in numbers or len(edges) != len(counts) + 1 or not counts:
        return None
    never = _number(details.get("latents_never"))
    return [float(e) for e in edges], [float(c) for c in counts], int(never or 0)


def _panels(
    runs: Sequence[Judgement], metric: str, groups: Groups
) -> Iterator[tuple[str, list[tuple[Judgement, Details]]]]:
    """A panel for each set of data, kind of run and L0: its title, and details of its runs."""
    found: dict[tuple[Any, ...], list[tuple[Judgement, Details]]] = {}
    sources: dict[bytes, str] = {}
    for run in runs:
        for (name, data), entry in run.entries.items():
            if name == metric:
                sources[data] = f"{entry.source.name} ({entry.source.digest[:8]})"
                kind = groups.of_run(run).apart_from_mask
                key = data, kind, fact(run.facts, "k")
                found.setdefault(key, []).append((run, entry.details))
    kinds = {kind for _, kind, _ in found}
    for data, kind, k in sorted(found, key=lambda key: (key[0], key[1], sort_key(key[2]))):
        parts = [label("k", k)]
        parts += [kind] if len(kinds) > 1 else []
        parts += [f"on {sources[data]}"] if len(sources) > 1 else []
        yield ", ".join(parts), found[data, kind, k]


def _means(
    judged: Sequence[tuple[Judgement, Details]],
    groups: Groups,
    key: str,
    value_of: Callable[[Details], tuple[str, float] | None],
) -> dict[Group, dict[str, float]]:
    """By group and name, the mean over entries of details[key] and over runs."""
    found: dict[Group, dict[str, list[float]]] = {}
    for run, details in judged:
        for entry in _entries(details, key):
            pair = value_of(entry)
            if pair is not None:
                of_group = found.setdefault(groups.of_run(run), {})
                of_group.setdefault(pair[0], []).append(pair[1])
    ordered = sorted(found, key=lambda group: sort_key(group.mask_p))
    return {g: {name: sum(v) / len(v) for name, v in found[g].items()} for g in ordered}


def _entries(details: Details, key: str) -> list[Details]:
    found = details.get(key)
    return [e for e in found if isinstance(e, Mapping)] if isinstance(found, list) else []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any, form: str) -> str:
    found = _number(value)
    return "-" if found is None else format(found, form).replace("%", "\N{NO-BREAK SPACE}%")
