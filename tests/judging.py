"""Result files as `sae-pipe eval` writes them, made up: shared by the tests of compare and report."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_pipe.stages.evaluation.results import (
    Measured,
    Result,
    Source,
    result_path,
    write_result,
)
from sae_pipe.stages.metrics.base import Value

CORE = Source(kind="evaluation set", name="core", digest="c0" * 32, suite="core")
OTHER = Source(kind="store", name="acts", digest="5e" * 32)


def value_of(centre: float, shifts: np.ndarray[Any, Any] | None, width: float = 0.01) -> Value:
    """A value whose replicates are centre + width * shifts, with their percentile interval."""
    if shifts is None:
        return Value(value=centre)
    replicates = centre + width * shifts
    low, high = np.percentile(replicates, (2.5, 97.5))
    return Value(value=centre, low=low, high=high, replicates=tuple(replicates.tolist()))


def entry(
    metric: str,
    values: dict[str, Value],
    *,
    direction: str = "up",
    source: Source = CORE,
    seed: int = 0,
    **changes: Any,
) -> Measured:
    """One metric of one run."""
    fields: dict[str, Any] = {
        "metric": metric,
        "definition": f"what {metric} is",
        "direction": direction,
        "source": source,
        "seed": seed,
        "sample": {"rows": 20_000, "documents": 50},
        "interval": "95 %, bootstrap over documents, 200 resamples",
        "values": values,
        "seconds": 1.0,
        "version": 1,
    }
    return Measured(**fields | changes)


def result(
    out: Path,
    *entries: Measured,
    mask_p: float | None = 0.0,
    k: int = 20,
    seed: int = 0,
    **changes: Any,
) -> Result:
    """The result of one run, or of a baseline of it; its name follows from mask ratio, k and seed."""
    facts: dict[str, Any] = {
        "name": f"acts-p{mask_p}-l0_{k}-seed{seed}",
        "path": f"/runs/acts-p{mask_p}-l0_{k}-seed{seed}",
        "sae_sha256": hashlib.sha256(f"{mask_p} {k} {seed}".encode()).hexdigest(),
        "arch": "matryoshka",
        "k": k,
        "d_in": 128,
        "d_sae": 1024,
        "seed": seed,
        "steps": 390,
        "tokens": 798_720,
        "model": "neox-pd",
        "model_revision": None,
        "layer": 3,
        "hook": "resid_post",
        "mask_p": mask_p,
        "store": f"/stores/acts-p{mask_p}.zarr",
        "store_digest": f"{int((mask_p or 0) * 10):064x}",
        "recipe": {"arch": "matryoshka", "k": k, "seed": seed, "lr": None},
        "baseline": None,
    } | changes
    path = result_path(out, str(facts["name"]), str(facts["sae_sha256"]), facts["baseline"])
    return Result(path=path, run=facts, metrics=entries)


def with_facts(result: Result, **facts: Any) -> Result:
    """A result whose run section says something else."""
    return replace(result, run={**result.run, **facts})


def write_all(results: list[Result]) -> Path:
    """Write results; returns their folder."""
    for each in results:
        write_result(each)
    return results[0].path.parent


def experiment(
    out: Path, *, seeds: tuple[int, ...] = (0, 1), ks: tuple[int, ...] = (10, 20, 40)
) -> list[Result]:
    """Masked and unmasked runs, with explained variance (no difference), absorption (masking is
    better), L0, and the untrained baseline of each."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(200)
    results = []
    for mask_p in (0.0, 0.3):
        for k in ks:
            for seed in seeds:
                noise = 0.1 * rng.standard_normal((3, 200))
                variance = 0.6 + 0.1 * np.log2(k / 10) + 0.0001 * seed
                absorption = 86 + k / 10 + (3 if mask_p else 0) + 0.1 * seed
                results.append(
                    result(
                        out,
                        entry(
                            "explained_variance",
                            {"explained_variance": value_of(variance, shared + noise[0])},
                        ),
                        entry(
                            "absorption",
                            {
                                "mean_full": value_of(absorption, shared + noise[1], 0.5),
                                "raw": value_of(1 - absorption / 100, shared),
                            },
                        ),
                        entry(
                            "l0",
                            {"l0": value_of(k * (1.5 if mask_p else 1.0), shared + noise[2], 0.1)},
                            direction="none",
                        ),
                        mask_p=mask_p,
                        k=k,
                        seed=seed,
                    )
                )
                results.append(
                    result(
                        out,
                        entry("explained_variance", {"explained_variance": value_of(0.2, shared)}),
                        entry("absorption", {"mean_full": value_of(95.0, shared)}),
                        mask_p=mask_p,
                        k=k,
                        seed=seed,
                        baseline="untrained",
                        of=f"acts-p{mask_p}-l0_{k}-seed{seed}",
                        name=f"acts-p{mask_p}-l0_{k}-seed{seed} (untrained)",
                    )
                )
    return results


LETTERS = Source(kind="evaluation set", name="letters", digest="1e" * 32, suite="letters")
OOD = Source(kind="evaluation set", name="ood", digest="0d" * 32, suite="ood")


def letters_entry(rng: np.random.Generator, share: float) -> Measured:
    """Absorption with details of 24 judged letters, around a share; X and Z are refused."""
    concepts = []
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWY":
        full = float(np.clip(share * rng.uniform(0.2, 2), 0, 1))
        words = [
            {
                "word": f" {letter.lower()}{end}",
                "latent": 7 + ord(letter),
                "share": 0.6,
                "cosine": 0.3,
            }
            for end in ("pple", "nd", "bout")[: int(10 * full) + 1]
        ]
        concepts.append(
            {
                "concept": letter, "words": 40, "probe_f1": 0.9, "k1_f1": 0.7, "l1_steps": 200,
                "l1_converged": True, "main": [ord(letter), 3], "f1_by_k": [0.7, 0.75],
                "full_absorption": full, "absorption_fraction": full / 2, "absorbed": words,
            }
        )  # fmt: skip
    mean = float(np.mean([each["full_absorption"] for each in concepts]))
    shifts = rng.standard_normal(200)
    return entry(
        "absorption",
        {
            "full_absorption": value_of(mean, shifts),
            "full_absorption_score": value_of(100 * (1 - mean), -shifts, 1.0),
        },
        direction="down",
        source=LETTERS,
        sample={"words": 960, "concepts": 24, "concepts_refused": 2},
        interval="95 %, bootstrap over words, inside each concept, 200 resamples",
        details={
            "concepts": concepts,
            "refused_concepts": {"X": "12 words, and 20 are needed", "Z": "its probe has F1 0.31"},
        },
    )


def ood_entry(rng: np.random.Generator, auc: float) -> Measured:
    """AUC on eight sets around a mean, with the oracle's."""
    names = (
        "5_ismale", "6_isamerican", "7_ispolitician", "66_living-room", "67_social-security",
        "73_control-group", "87_cola", "90_glue_qnli",
    )  # fmt: skip
    tasks = [
        {
            "task": name, "concept": "1", "ood_auc": float(auc + 0.02 * rng.standard_normal() - 0.02 * i),
            "oracle_ood_auc": 0.9 - 0.03 * i,
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    shifts = rng.standard_normal(200)
    mean = float(np.mean([float(str(task["ood_auc"])) for task in tasks]))
    values = {
        "ood_auc": value_of(mean, shifts),
        "oracle_ood_auc": value_of(0.8, shifts),
        "ood_auc_without_malformed": value_of(mean + 0.02, shifts),
    }
    return entry(
        "ood_probing", values, source=OOD, options={"k": 128}, sample={"sets": 8, "items": 2400},
        interval="95 %, bootstrap over items, inside each class, and over sets, 200 resamples",
        details={"tasks": tasks, "malformed": ["90_glue_qnli"]},
    )  # fmt: skip


def density_entry(rng: np.random.Generator, centre: float) -> Measured:
    """A histogram of densities around a power of ten."""
    edges = np.arange(-8, 0.25, 0.25)
    found = np.clip(centre + 0.6 * rng.standard_normal(1024), -8, 0)
    return entry(
        "density",
        {"density_p50": value_of(10.0**centre, rng.standard_normal(200), 1e-4)},
        direction="none",
        details={
            "log10_density_edges": edges.tolist(),
            "latents": np.histogram(found, edges)[0].tolist(),
            "latents_never": 3,
        },
    )


def with_details(results: list[Result]) -> list[Result]:
    """An experiment whose runs were also judged on letters, out of distribution, and for density."""
    rng = np.random.default_rng(1)
    found = []
    for each in results:
        if each.baseline is None:
            masked = each.run["mask_p"] > 0
            more = (
                letters_entry(rng, 0.08 if masked else 0.15),
                ood_entry(rng, 0.78 if masked else 0.75),
                density_entry(rng, -2.0 if masked else -2.4),
            )
            kept = tuple(e for e in each.metrics if e.metric != "absorption")
            each = replace(each, metrics=kept + more)
        found.append(each)
    return found
