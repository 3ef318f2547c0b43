"""Running fits and telling how they ended: what `fit` and `sweep` share."""

from collections.abc import Sequence
from pathlib import Path

import typer

from ..stages.fit import default_out, fit
from ..stages.fit_source import open_to_fit
from ..stages.fitconfig import FitConfig
from ..stages.sweep import StoreTask, SweepResult, check_all_ended_well, fit_all, sweep_tasks
from ..storage.address import Place
from .tables import run_table


def say(line: str) -> None:
    """Tell the user what is going on, beside the progress bar."""
    typer.echo(line, err=True)


def fit_one(store: Place, config: FitConfig, out: Path | None, *, follow: bool) -> None:
    """Fit one SAE into a run folder, and show it."""
    folder = Path(default_out(store, config)) if out is None else out
    opened = open_to_fit(store, folder, follow=follow, say=say)
    summary = fit(opened, config, folder)
    typer.echo(run_table([(str(folder), summary)]))
    typer.echo(f"Weights, curve and metrics are in {folder}.")


def fit_several(
    stores: Sequence[Place],
    configs: Sequence[FitConfig],
    root: Path,
    *,
    follow: bool,
    workers: int | None,
) -> None:
    """Fit every config from every store into folders of `root`, and show them side by side."""
    tasks = sweep_tasks(dict.fromkeys(stores, configs), root, follow=follow)
    check_all_ended_well(run_tasks(tasks, root, workers=workers))


def run_tasks(tasks: Sequence[StoreTask], root: Path, *, workers: int | None) -> list[SweepResult]:
    """Fit what is to go into one folder, and show what came out."""
    results = fit_all(tasks, root, workers=workers, say=say)
    ended = [result.outcome for result in results]
    table = [(each.run.name, each.summary) for each in ended if each.summary is not None]
    if table:
        typer.echo(run_table(table))
        typer.echo(
            f"The run folders are in {root}, all summaries in {root}/sweep.json, L0 against "
            f"explained variance in {root}/sweep.png."
        )
    return results
