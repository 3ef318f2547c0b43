"""Running fits and telling how they ended: what `fit` and `sweep` share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from ..stages.fit import default_out, fit
from ..stages.fit_source import open_to_fit
from ..stages.fitconfig import FitConfig
from ..stages.parallel import ALONE, Group, OutOfStep, join
from ..stages.sweep import Say, StoreTask, SweepResult, check_all_ended_well, fit_all, sweep_tasks
from ..storage.address import Place
from ..storage.errors import SaePipeError
from .errors import USER_ERROR, tell
from .say import say as show
from .tables import run_table


def say(line: str) -> None:
    """Tell the user what is going on, beside the progress bar."""
    show(line, err=True)


@contextmanager
def in_group() -> Iterator[Group]:
    """The processes that torchrun has started for this command, or this one by itself.

    An error that all of them meet is told by the first, one of a single process by that; none ends
    before it is told, because torchrun stops the others then.
    """
    group: Group | None = None
    try:
        group = join()
        yield group
    except (SaePipeError, OutOfStep) as error:
        if group is None or group.is_first or not error.is_shared:
            tell(error)
        if group is not None:
            group.wait()
        raise typer.Exit(USER_ERROR) from None


def fit_one(store: Place, config: FitConfig, out: Path | None, *, follow: bool) -> None:
    """Fit one SAE into a run folder, and show it."""
    folder = Path(default_out(store, config)) if out is None else out
    with in_group() as group:
        opened = group.together(
            lambda: open_to_fit(store, folder, follow=follow, say=_speaker(group))
        )
        summary = fit(opened, config, folder)
    if group.is_first:
        show(run_table([(str(folder), summary)]))
        show(f"Weights, curve and metrics are in {folder}.")


def _speaker(group: Group) -> Say:
    """`say` for the first process; the others are silent."""
    return say if group.is_first else lambda line: None


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
    with in_group() as group:
        results = run_tasks(tasks, root, workers=workers, group=group)
        group.together(lambda: check_all_ended_well(results))


def run_tasks(
    tasks: Sequence[StoreTask], root: Path, *, workers: int | None, group: Group = ALONE
) -> list[SweepResult]:
    """Fit what is to go into one folder, and show what came out."""
    results = fit_all(tasks, root, workers=workers, say=_speaker(group), group=group)
    if not group.is_first:
        return results
    ended = [result.outcome for result in results]
    table = [(each.run.name, each.summary) for each in ended if each.summary is not None]
    if table:
        show(run_table(table))
        show(
            f"The run folders are in {root}, all summaries in {root}/sweep.json, L0 against "
            f"explained variance in {root}/sweep.png."
        )
    return results
