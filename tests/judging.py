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
                    )
                )
    return results
