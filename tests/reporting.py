"""A tiny real store with SAEs fitted from it, and results of them: what reports are tested on."""

from dataclasses import replace
from pathlib import Path

from sae_pipe.stages.evaluation.judged import read_facts
from sae_pipe.stages.evaluation.results import Result, result_path
from sae_pipe.stages.fit import fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.storage import open_store

from .judging import experiment, with_details, with_facts, write_all


def fit_two(store: Path, folder: Path) -> list[Path]:
    """Two SAEs of 64 latents, L0 4 and 8, fitted for an instant."""
    runs = []
    for k in (4, 8):
        run = folder / f"acts-topk-l0_{k}"
        config = FitConfig(arch="topk", k=k, d_sae=64, batch_size=256, epochs=2, device="cpu")
        fit(open_store(store), config, run, show_progress=False)
        runs.append(run)
    return runs


def results_of(runs: list[Path], out: Path) -> Path:
    """Results with every section of a report, of which two are of these runs and others of runs that
    are nowhere; gives their folder."""
    made_up = with_details(experiment(out, seeds=(0,), ks=(4, 8)))
    unmasked = [each for each in made_up if each.baseline is None and each.run["mask_p"] == 0]
    real = {each.name: run for each, run in zip(unmasked, runs, strict=True)}
    return write_all([_of_run(each, real.get(each.name), out) for each in made_up])


def _of_run(result: Result, run: Path | None, out: Path) -> Result:
    if run is None:
        return result
    facts = read_facts(run) | {"mask_p": 0.0, "arch": "matryoshka"}
    facts |= {
        name: result.run[name]
        for name in ("model", "model_revision", "d_sae", "d_in", "steps", "tokens", "layer")
    }
    path = result_path(out, str(facts["name"]), str(facts["sae_sha256"]))
    return replace(with_facts(result, **facts), path=path)
