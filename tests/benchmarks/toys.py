"""Do our trainers give the answers that are known on toys, and does masking act where it must?

For hier4 and tree20 every architecture with a known answer is fitted from several seeds (of the
features, the rows and the weights) and judged on fresh rows: the parent-recall gap first, beside
explained variance, matched cosine, and the median of largest cosines, which does not see
absorption. For masked_tokens SAEs are fitted on text masked with several p and judged on unmasked
text: the gap with a 95 % interval over seeds (Student's t), and of p against 0 the mean difference
of the same seeds. As a control one line leaves out the rows at the largest p in which a child has
lost its parent: everything else about masking stays, and with it the absorption has to come back.

    python tests/benchmarks/toys.py
    python tests/benchmarks/toys.py --toy masked_tokens --arch relu --p 0 0.3 --seeds 10
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from scipy.stats import t as student

from sae_pipe.stages.toys import TOYS, get_toy
from sae_pipe.stages.toys.base import Toy
from sae_pipe.stages.toys.fitting import best_of, fit_toy
from sae_pipe.stages.toys.masked_tokens import MaskedTokens
from sae_pipe.stages.toys.truth import Truth, judge
from sae_pipe.storage.provenance import hardware, versions

COLUMNS = (
    "recall_gap", "recall_alone", "recall_with_child", "explained_variance", "l0", "matched_cosine",
    "matched_correlation", "median_max_cosine", "f1", "parent_f1",
)  # fmt: skip


def found(name: str, arch: str, seed: int) -> Truth:
    """One SAE of the toy's own setting, judged."""
    toy = get_toy(name, seed)
    config, starts = toy.config(arch, seed=seed), toy.settings[arch].starts
    if starts == 1:
        return judge(fit_toy(toy, config).sae, toy)
    return judge(best_of(toy, config, range(seed * starts, (seed + 1) * starts)).sae, toy)


def known_answers(name: str, archs: Sequence[str], seeds: int) -> Iterator[str]:
    """One line an architecture: means over seeds, the range of the gap, what is known."""
    head = " | ".join(column.replace("_", " ") for column in COLUMNS)
    yield f"| {name} | {head} | known gap, explained variance | processor s each |"
    yield "|---" * (len(COLUMNS) + 3) + "|"
    toy = get_toy(name)
    for arch in (arch for arch in toy.settings if arch in archs):
        setting, begun = toy.settings[arch], time.process_time()
        runs = [found(name, arch, seed) for seed in range(seeds)]
        each = (time.process_time() - begun) / seeds / setting.starts
        values = {column: [getattr(run, column) for run in runs] for column in COLUMNS}
        means = [f"{statistics.fmean(values[column]):.3f}" for column in COLUMNS]
        gaps = values["recall_gap"]
        means[0] += f" ({min(gaps):.3f} to {max(gaps):.3f})"
        known = ", ".join(
            f"{setting.known[key][0]:g} ± {setting.known[key][1]:g}"
            for key in ("recall_gap", "explained_variance")
        )
        of_starts = f", best of {setting.starts}" if setting.starts > 1 else ""
        yield f"| {arch}{of_starts} | {' | '.join(means)} | {known} | {each:.1f} |"


class StillTogether(MaskedTokens):
    """Masked text without the rows in which a child has lost its parent."""

    def fires(self, n_rows: int) -> torch.Tensor:
        parts, missing = [], n_rows
        while missing:
            fires_NF = super().fires(2 * missing)
            kept_NF = fires_NF[~_lost_parent(self, fires_NF)][:missing]
            parts.append(kept_NF)
            missing -= len(kept_NF)
        return torch.cat(parts)


def _lost_parent(toy: Toy, fires_NF: torch.Tensor) -> torch.Tensor:
    lost_N = torch.zeros(len(fires_NF), dtype=torch.bool)
    for family in toy.families:
        lost_N |= fires_NF[:, list(family.children)].any(dim=1) & ~fires_NF[:, family.parent]
    return lost_N


def masked(archs: Sequence[str], ps: Sequence[float], seeds: int) -> Iterator[str]:
    """One line an architecture and p, and one of the control."""
    yield (
        "| architecture | p | P(parent given child) in training rows | recall gap, unmasked "
        "| change from p = 0 | explained variance, unmasked | parents' F1 |"
    )
    yield "|---" * 7 + "|"
    for arch in (arch for arch in MaskedTokens.settings if arch in archs):
        at_0: list[float] = []
        for kind, p in [*((MaskedTokens, p) for p in ps), (StillTogether, max(ps))]:
            runs, shares = [], []
            for seed in range(seeds):
                toy = kind(seed=seed, p=p)
                shares.append(1 - _share_lost(kind(seed=seed, p=p)))
                sae = fit_toy(toy, toy.config(arch, seed=seed)).sae
                runs.append(judge(sae, MaskedTokens(seed=seed)))
            gaps = [run.recall_gap for run in runs]
            at_0 = gaps if p == 0 else at_0
            change = [a - b for a, b in zip(gaps, at_0, strict=False)] if p else []
            name = f"{p:g}" if kind is MaskedTokens else f"{p:g}, control"
            yield (
                f"| {arch} | {name} | {statistics.fmean(shares):.3f} | {interval(gaps)} | "
                f"{interval(change) if change else ''} | "
                f"{statistics.fmean(run.explained_variance for run in runs):.4f} | "
                f"{statistics.fmean(run.parent_f1 for run in runs):.3f} |"
            )


def _share_lost(toy: Toy, n_rows: int = 50_000) -> float:
    """Of the rows in which a child fires, those without its parent."""
    fires_NF = toy.fires(n_rows)
    children = [child for family in toy.families for child in family.children]
    lost_N, has_child_N = _lost_parent(toy, fires_NF), fires_NF[:, children].any(dim=1)
    return float(lost_N.sum() / has_child_N.sum())


def interval(values: Sequence[float]) -> str:
    """Mean (95 % interval of the mean, Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = statistics.stdev(values) / len(values) ** 0.5 * student.ppf(0.975, len(values) - 1)
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    every = sorted({arch for name in TOYS for arch in get_toy(name).settings})
    parser.add_argument("--toy", nargs="+", choices=sorted(TOYS), default=sorted(TOYS))
    parser.add_argument("--arch", nargs="+", choices=every, default=every)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--p", nargs="+", type=float, default=[0, 0.003, 0.01, 0.03, 0.1, 0.3])
    arguments = parser.parse_args()
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {hardware()['processor']}, {torch.get_num_threads()} threads")
    print(f"versions  {versions()}")
    print(f"command   {' '.join(sys.argv)}")
    for name in arguments.toy:
        begun = time.process_time()
        if name == "masked_tokens":
            lines = masked(arguments.arch, arguments.p, arguments.seeds)
        else:
            lines = known_answers(name, arguments.arch, arguments.seeds)
        print()
        for line in lines:
            print(line, flush=True)
        print(f"\n{name}: {time.process_time() - begun:.0f} s of processor time")


if __name__ == "__main__":
    main()
