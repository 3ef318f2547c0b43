"""Do our trainers give the answers that are known on toys, and does masking act where it must?

For hier4 and tree20 every architecture with a known answer is fitted from several seeds (of the
features, the rows and the weights) and judged on fresh rows: the parent-recall gap first, beside
explained variance, matched cosine, and the median of largest cosines, which does not see
absorption. For masked_tokens SAEs are fitted on text masked with several p and judged on unmasked
text: the gap with a 95 % interval over seeds (Student's t), and of p against 0 the mean difference of the
same seeds.

    python tests/benchmarks/toys.py
    python tests/benchmarks/toys.py --toy masked_tokens --arch relu --p 0 0.3 --seeds 10
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from scipy.stats import t as student

from sae_pipe.stages.toys import TOYS, get_toy
from sae_pipe.stages.toys.fitting import best_of, fit_toy
from sae_pipe.stages.toys.masked_tokens import MaskedTokens
from sae_pipe.stages.toys.truth import Truth, judge
from sae_pipe.storage.provenance import hardware, versions

COLUMNS = (
    "recall_gap", "recall_alone", "recall_with_child", "explained_variance", "l0", "matched_cosine",
    "matched_correlation", "median_max_cosine", "f1", "parent_f1",
)  # fmt: skip


def found(name: str, arch: str, seed: int, **options: Any) -> Truth:
    """One SAE of the toy's own setting, judged."""
    toy = get_toy(name, seed, **options)
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


def masked(archs: Sequence[str], ps: Sequence[float], seeds: int) -> Iterator[str]:
    """One line an architecture and p."""
    yield (
        "| architecture | p | P(parent given child) in training rows | recall gap, unmasked "
        "| change from p = 0 | explained variance, unmasked | parents' F1 |"
    )
    yield "|---" * 7 + "|"
    for arch in (arch for arch in MaskedTokens.settings if arch in archs):
        at_0: list[float] = []
        for p in ps:
            runs = [found("masked_tokens", arch, seed, p=p) for seed in range(seeds)]
            gaps = [run.recall_gap for run in runs]
            at_0 = gaps if p == 0 else at_0
            change = "" if p == 0 else interval([a - b for a, b in zip(gaps, at_0, strict=False)])
            yield (
                f"| {arch} | {p:g} | {cooccurrence(p, seeds):.3f} | {interval(gaps)} | {change} | "
                f"{statistics.fmean(run.explained_variance for run in runs):.4f} | "
                f"{statistics.fmean(run.parent_f1 for run in runs):.3f} |"
            )


def cooccurrence(p: float, seeds: int, n_rows: int = 50_000) -> float:
    """P(a parent fires | one of its children fires) in the rows that an SAE is fitted on."""
    counts = torch.zeros(2)
    for seed in range(seeds):
        toy = MaskedTokens(seed=seed, p=p)
        fires_NF = toy.fires(n_rows)
        for family in toy.families:
            has_child_N = fires_NF[:, list(family.children)].any(dim=1)
            both_N = has_child_N & fires_NF[:, family.parent]
            counts += torch.stack([both_N.sum(), has_child_N.sum()])
    return float(counts[0] / counts[1])


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
