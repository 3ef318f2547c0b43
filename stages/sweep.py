"""Every combination of settings, from every store: the folders of the runs, and what came out.

runs/
    acts-matryoshka-l0_20-seed0/   one run folder for each SAE (rundir.py)
    sweep.json                     how each of them ended
    sweep.png                      L0 against explained variance
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..storage import ActivationStore, provenance
from ..storage.address import Place, described
from ..storage.errors import InputError, SaePipeError
from ..storage.files import write_json, write_whole
from ..storage.manifest import read_manifest
from .fit import Outcome, default_out, fit_many
from .fit_source import open_to_fit
from .fitconfig import FitConfig
from .parallel import ALONE, Group
from .sweep_picture import draw_sweep

FORMAT, FORMAT_VERSION = "sae-pipe-sweep", 1
_IN_EVERY_NAME = ("arch", "k", "seed")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StoreTask:
    """The SAEs to fit from one store, each into its own folder; plain data."""

    store: Place
    configs: tuple[FitConfig, ...]
    outs: tuple[Path, ...]
    follow: bool = False


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """One SAE of one store."""

    store: Place
    outcome: Outcome


def sweep_tasks(
    configs: Mapping[Place, Sequence[FitConfig]], root: Path, *, follow: bool = False
) -> list[StoreTask]:
    """What to fit from each store, and where to. Raises InputError where names would be the same.

    A run's folder is named as by default, and by whatever else differs between the configs.
    """
    all_configs = [config for of_store in configs.values() for config in of_store]
    differing = [
        name
        for name in asdict(all_configs[0])
        if name not in _IN_EVERY_NAME and len({repr(getattr(c, name)) for c in all_configs}) > 1
    ]
    tasks = [
        StoreTask(
            store=store,
            configs=tuple(of_store),
            outs=tuple(root / _run_name(store, config, differing) for config in of_store),
            follow=follow,
        )
        for store, of_store in configs.items()
    ]
    all_outs = [out for task in tasks for out in task.outs]
    twice = next((out for out in all_outs if all_outs.count(out) > 1), None)
    if twice is not None:
        raise InputError(
            f"Two SAEs would be written to {twice}: two stores of one name, or a value that is "
            "given twice. Fit them by one command each, with another --out."
        )
    return tasks


def _run_name(store: Place, config: FitConfig, differing: Sequence[str]) -> str:
    others = "".join(f"-{name}_{getattr(config, name)}" for name in differing)
    return Path(default_out(store, config)).name + others


def fit_all(
    tasks: Sequence[StoreTask],
    root: Path,
    *,
    workers: int | None,
    say: Say,
    group: Group = ALONE,
) -> list[SweepResult]:
    """Fit all SAEs of all stores; writes sweep.json and sweep.png after each store.

    workers: processes of this machine that each take a store; None or 1 is this process, store by
    store. A store that cannot be read does not stop the others: all of its SAEs have that error.
    group: processes that step every SAE together; the first writes.
    """
    for task in tasks:  # a name that is mistyped is found now, and not in the night
        group.together(partial(read_manifest, task.store))
    results: list[SweepResult] = []

    def report() -> None:
        if root.is_dir():  # else nothing was begun
            write_report(root, results)

    for task, outcomes in _by_store(tasks, workers, say, group):
        results += [SweepResult(store=task.store, outcome=outcome) for outcome in outcomes]
        group.first(report)
    return results


def _by_store(
    tasks: Sequence[StoreTask], workers: int | None, say: Say, group: Group
) -> Iterator[tuple[StoreTask, list[Outcome]]]:
    if workers is not None and workers > 1 and len(tasks) > 1:
        from .sweep_workers import fit_in_workers  # distributed takes half a second to import

        yield from fit_in_workers(tasks, min(workers, len(tasks)), say)
        return
    for number, task in enumerate(tasks, 1):
        if len(tasks) > 1:
            say(f"store {number} of {len(tasks)}: {task.store}")
        try:
            yield task, fit_store(task, say, group=group)
        except SaePipeError as error:
            yield task, all_failed(task, error)


def fit_store(
    task: StoreTask,
    say: Say,
    *,
    show_progress: bool = True,
    cores: int | None = None,
    group: Group = ALONE,
) -> list[Outcome]:
    """Fit the SAEs of one store from one stream of its rows."""

    def opened() -> ActivationStore:
        begun = (out for out in task.outs if (out / "config.json").is_file())
        return open_to_fit(task.store, next(begun, task.outs[0]), follow=task.follow, say=say)

    store = group.together(opened)
    return fit_many(store, task.configs, task.outs, show_progress=show_progress, cores=cores)


def all_failed(task: StoreTask, error: SaePipeError) -> list[Outcome]:
    """The same end for every SAE of a store."""
    pairs = zip(task.outs, task.configs, strict=True)
    return [Outcome(run=out, config=config, error=error) for out, config in pairs]


def write_report(root: Path, results: Sequence[SweepResult]) -> None:
    """sweep.json and sweep.png: of the SAEs of this command, whatever else is in the folder."""
    runs = [
        {
            "run": result.outcome.run.name,
            "store": described(result.store),
            "summary": None if result.outcome.summary is None else asdict(result.outcome.summary),
            "error": None if result.outcome.error is None else str(result.outcome.error),
        }
        for result in results
    ]
    report = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written": provenance.now(),
        "command": provenance.command_line(),
        "runs": runs,
    }
    write_json(root / "sweep.json", report)
    write_whole(root / "sweep.png", draw_sweep(runs))


def check_all_ended_well(results: Sequence[SweepResult]) -> None:
    """InputError, one sentence that names every SAE that failed, and why; or the error that is the
    same for all."""
    failed = [result.outcome for result in results if result.outcome.error is not None]
    errors = [outcome.error for outcome in failed if outcome.error is not None]
    if errors and len(failed) == len(results) and all(each is errors[0] for each in errors):
        raise errors[0]
    if failed:
        what = "; ".join(f"{outcome.run}: {outcome.error}" for outcome in failed)
        raise InputError(f"{len(failed)} of {len(results)} SAEs failed. {what}")
