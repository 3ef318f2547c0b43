"""sae-pipe sweep"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..stages.torchrun import find_seat
from ..storage.address import Place
from ..storage.errors import InputError
from .cache_flags import CacheDir, CacheSize, use_cache
from .errors import told_once
from .say import say

if TYPE_CHECKING:
    from ..stages.plan import Plan
    from ..stages.sweep import StoreTask
    from ..stages.sweep_plan import StoreShape
    from .sweep_file import FitTable, SweepFile


@told_once
def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            help="TOML with [harvest] and [fit] tables, whose keys are the flags of these commands."
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan of harvests and fits, and stop.")
    ] = False,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
) -> None:
    """Harvest what is missing, then fit every SAE that a file asks for from every store.

    A list in [fit] gives an SAE for each value; several [[harvest]] or [[fit]] tables may stand in
    one file. The same command goes on with what was interrupted.
    """
    from .sweep_file import read_sweep

    if (processes := find_seat().world_size) > 1:
        raise InputError(
            f"sweep is a single process, and torchrun has started {processes}. Start it without "
            "torchrun; the lists of `sae-pipe fit` can be fitted by several."
        )
    use_cache(cache_dir, cache_size)
    asked = read_sweep(file)
    if dry_run:
        _plan(asked)
        return
    from ..stages.harvest_remote import harvest_anywhere
    from ..stages.sweep import check_all_ended_well
    from .fitting import run_tasks

    stores: list[Place] = [
        path for config in asked.harvests for path in harvest_anywhere(config, say=say)
    ]
    results = []
    for root, tasks in _tasks(asked, stores).items():
        workers = max(table.workers or 1 for table in asked.fits if table.out == root)
        results += run_tasks(tasks, root, workers=workers)
    check_all_ended_well(results)


def _tasks(asked: "SweepFile", stores: list[Place]) -> "dict[Path, list[StoreTask]]":
    """What is fitted into each folder: tables of one folder are one sweep, from one stream."""
    from ..stages.sweep import sweep_tasks

    tables: dict[Path, list[FitTable]] = {}
    for table in asked.fits:
        tables.setdefault(table.out, []).append(table)
    return {
        root: sweep_tasks(
            {
                store: [
                    config
                    for table in of_root
                    for config in table.configs
                    if store in (stores if table.stores is None else table.stores)
                ]
                for store in _stores_of(of_root, stores)
            },
            root,
        )
        for root, of_root in tables.items()
    }


def _stores_of(tables: "list[FitTable]", stores: list[Place]) -> list[Place]:
    named = [
        path for table in tables for path in (stores if table.stores is None else table.stores)
    ]
    return list(dict.fromkeys(named))


def _plan(asked: "SweepFile") -> None:
    """The harvests' own plans, then what the fits will take."""
    from ..stages.harvest_remote import harvest_anywhere
    from ..stages.sweep_plan import StoreShape, plan_lines

    shapes: dict[Place, StoreShape] = {}
    for config in asked.harvests:
        plans: list[Plan] = []
        say(f"harvest   {config.model}")
        paths = harvest_anywhere(config, say=say, dry_run=True, planned=plans.append)
        for path in paths:
            shapes[path] = _shape(path, plans)
    for root, tasks in _tasks(asked, list(shapes)).items():
        say(f"fit       into {root}")
        fits = [(shapes.get(task.store) or _shape(task.store, []), task.configs) for task in tasks]
        for line in plan_lines(fits):
            say(line)


def _shape(path: Place, plans: "list[Plan]") -> "StoreShape":
    """The sizes of a store: as it is laid out, or else as planned."""
    from ..stages.sweep_plan import StoreShape
    from ..storage.manifest import MANIFEST, layout_of, read_manifest

    is_begun = isinstance(path, Path) and (path / MANIFEST).is_file()
    if plans and not (is_begun and "train" in read_manifest(path)):
        return StoreShape(path=path, n_rows=plans[0].rows, d_in=plans[0].d_in)
    layout = layout_of(read_manifest(path)["train"], path)
    return StoreShape(path=path, n_rows=layout.n_rows, d_in=layout.d_in)
