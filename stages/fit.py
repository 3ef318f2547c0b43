"""Fit SAEs from a store: many from one stream of its rows, or one.

# B rows, D d_in

The main path: `fit_many` prepares the run folders, `fit_loop.train_all` gives each batch to all runs,
`fit_run.Run` steps, checkpoints and judges. Under torchrun every process calls it, the first writes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from ..storage import ActivationStore
from ..storage.address import Place, described
from ..storage.errors import InputError, SaePipeError, StoreError
from ..storage.lock import sole_writer
from ..storage.store import store_name
from .devices import pick_device, usable_cores
from .fit_loop import train_all
from .fit_memory import check_memory, memory_is_enough
from .fit_run import Member, Run, Summary
from .fit_together import check_given_alike, check_together
from .fitconfig import FitConfig, Schedule
from .loggers import get_logger
from .parallel import ALONE, Group, join
from .rundir import RunFolder
from .sae import get_architecture
from .sae.weights import describe_sae
from .trainer import Trainer

__all__ = ["Outcome", "Summary", "build_trainer", "default_out", "fit", "fit_many", "norm_factor"]

# They do not decide the weights, so a run may go on with other values.
_FREE_FIELDS = (
    "device",
    "capture",
    "log_every",
    "heldout_every",
    "heldout_rows",
    "checkpoint_minutes",
    "checkpoint_steps",
    "keep_checkpoints",
    "log_to",
)
# What SAEs that share a stream have in common: it is read once, in one order, for all of them.
_SHARED_FIELDS = ("batch_size", "order_seed", "normalise", "dtype", "device", "threads")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one SAE of a sweep ended: with a summary, or with what stopped it."""

    run: Path
    config: FitConfig
    summary: Summary | None = None
    error: SaePipeError | None = None


def fit(
    store: ActivationStore,
    config: FitConfig,
    out: str | Path | None = None,
    *,
    show_progress: bool = True,
) -> Summary:
    """Fit an SAE, or go on with the run in `out`, or return the summary of a complete one.

    out: the run folder; None is `default_out`. Killed at any instant and called again, it gives the
    weights of a run that was not. Raises InputError (a configuration that cannot work, another run
    or something else in that folder, a second process on it), StoreError, DiskError, and
    NonFiniteError for NaN.
    Processes that torchrun has started fit one SAE together when all of them call this alike.
    """
    out = default_out(store, config) if out is None else out
    [outcome] = fit_many(store, [config], [out], show_progress=show_progress)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.summary is not None
    return outcome.summary


def fit_many(
    store: ActivationStore,
    configs: Sequence[FitConfig],
    outs: Sequence[str | Path],
    *,
    show_progress: bool = True,
    cores: int | None = None,
) -> list[Outcome]:
    """Fit several SAEs from one stream of a store's rows, each in its own run folder.

    Each has the weights that `fit` alone gives it with the same `threads`, and its folder can be
    gone on with by `fit`. Complete ones are left as they are. One that fails (NaN, a folder that is
    not a run of this configuration, a disk error) does not stop the others: its outcome has the
    error. cores: that this process may use; None is all. Raises InputError, before anything is
    written, for configurations that cannot work or do not share a stream.
    """
    paths, group = [Path(out) for out in outs], join()
    show = show_progress and group.is_first
    # Before a folder is made, or anything in one that is not ours is touched.
    configs = group.together(lambda: _checked(store, configs, paths, group))
    device = pick_device(configs[0].device)
    group.use(device)
    recipes = [_recipe(store, config, group) for config in configs]
    check_given_alike(dict(zip(paths, recipes, strict=True)), group)
    todo = {
        path: _Asked(store, config, path, group, show=show)
        for path, config in zip(paths, configs, strict=True)
    }
    new = [asked.config for asked in todo.values() if asked.is_unfinished()]
    threads = step_threads(configs[0], group)
    cores = cores or usable_cores()
    at_once = max(cores // threads, 1)
    group.together(lambda: check_memory(new, store.d_in, device, at_once=at_once, group=group))
    with ExitStack() as locks:
        for asked in todo.values():
            asked.prepare(locks, threads)
        runs = [asked.run for asked in todo.values() if asked.run is not None]
        if runs:
            train_all(store, runs, cores=cores, show=show)
    return [asked.outcome() for asked in todo.values()]


def _checked(
    store: ActivationStore, configs: Sequence[FitConfig], paths: Sequence[Path], group: Group
) -> list[FitConfig]:
    """The configs with the device of this process; InputError for what cannot work."""
    _check_shared(configs, paths)
    check_together(store, configs, group)
    if not group.is_alone:
        configs = [replace(each, device=str(group.device(each.device))) for each in configs]
    for config in configs:
        _check_possible(config, store.d_in, store.n_rows)
    return list(configs)


class _Asked:
    """One SAE of a sweep, from what is asked for to how it ended.

    run: None before `prepare`, and of what was complete or has failed by then.
    """

    def __init__(
        self, store: ActivationStore, config: FitConfig, path: Path, group: Group, *, show: bool
    ) -> None:
        self.store, self.config, self.folder, self._show = store, config, RunFolder(path), show
        self.group = group
        self.run: Member | None = None
        self._summary: Summary | None = None
        self._error: SaePipeError | None = None

    def is_unfinished(self) -> bool:
        """Whether there is something to train; what cannot be is kept as the outcome."""

        def look() -> bool:
            self.folder.check_place()
            return self.folder.summary() is None

        try:
            return self.group.first(look)
        except SaePipeError as error:
            self._error = error
            return False

    def prepare(self, locks: ExitStack, threads: int) -> None:
        """Lock the folder, compare it, and build the run that goes on in it."""
        if self._error is None:
            try:
                self._prepare(locks, threads)
            except SaePipeError as error:
                self._error = error

    def _prepare(self, locks: ExitStack, threads: int) -> None:
        store, folder, group = self.store, self.folder, self.group
        found = group.first(lambda: self._look_closer(locks, threads))
        if found["summary"] is not None:
            if self._show:
                print(f"Run {folder.path} is complete: nothing to do.", file=sys.stderr)
            self._summary = _read_summary(found["summary"], folder)
            return
        config = replace(self.config, threads=found["threads"])

        def build() -> Trainer:
            with memory_is_enough(config, pick_device(config.device)):
                return build_trainer(config, store.d_in, store.n_rows, group)

        def begin() -> Member:
            with memory_is_enough(config, trainer.device):
                kind = Run if group.is_first else Member
                return kind(store, config, folder, trainer, norm_factor=factor)

        trainer = group.together(build)  # fails before config.json
        group.first(lambda: folder.begin(_recipe(store, config, group), _details(store, config)))
        factor = norm_factor(store, config)
        self.run = group.together(begin)
        group.check_alike(
            {f"a checkpoint in {folder.path} of step": self.run.updates},
            "The run folder has to be on a disk that all processes see.",
        )

    def _look_closer(self, locks: ExitStack, threads: int) -> dict[str, Any]:
        """Lock the folder and compare it: `threads` of the run, `summary` of a complete one."""
        folder = self.folder
        locks.enter_context(sole_writer(folder.path, "Run"))
        folder.remove_leftovers()
        own_threads = self._threads(pick_device(self.config.device), threads)
        folder.check_same(
            _recipe(self.store, replace(self.config, threads=own_threads), self.group)
        )
        summary = folder.summary()
        if summary is not None:
            folder.remove_checkpoint()  # a kill may have come right after the summary
        return {"threads": own_threads, "summary": summary}

    def _threads(self, device: torch.device, threads: int) -> int | None:
        """As asked for, or as the run was begun; off the CPU nothing depends on it."""
        if self.config.threads is not None:
            return self.config.threads
        begun = self.folder.recipe()
        if begun:
            return begun.get("threads")
        return threads if device.type == "cpu" else None

    def outcome(self) -> Outcome:
        run = self.run
        return Outcome(
            run=self.folder.path,
            config=self.config,
            summary=self._summary if run is None else run.summary,
            error=self._error if run is None else run.error,
        )


def step_threads(config: FitConfig, group: Group = ALONE) -> int:
    """CPU threads of a step, of a run that is begun now: all, or a process's share of the cores."""
    if group.is_alone:  # torchrun leaves each process one thread, unless told otherwise
        return config.threads or torch.get_num_threads()
    return config.threads or max(usable_cores() // group.seat.local_size, 1)


def _check_shared(configs: Sequence[FitConfig], paths: Sequence[Path]) -> None:
    """InputError unless the SAEs can be fitted from one stream, each in a folder of its own."""
    for name in _SHARED_FIELDS:
        values = sorted({str(getattr(config, name)) for config in configs})
        if len(values) > 1:
            raise InputError(
                f"SAEs that are fitted together share one stream of rows, but {name} is "
                f"{' and '.join(values)}. Fit them by one command each."
            )
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"Two SAEs would be written to {path}. Pass a folder for each.")


def default_out(store: ActivationStore | Place, config: FitConfig) -> str:
    """A readable run name: runs/STORE-ARCH-l0_K-seedSEED."""
    name = store.name if isinstance(store, ActivationStore) else store_name(store)
    aim = f"sparsity_{config.sparsity:g}" if config.k is None else f"l0_{config.k}"
    return f"runs/{name}-{config.arch}-{aim}-seed{config.seed}"


def build_trainer(
    config: FitConfig, d_in: int, n_rows: int | None = None, group: Group = ALONE
) -> Trainer:
    """A trainer to step by hand on batches (B, d_in) already divided by the norm factor.

    n_rows: rows of the store, needed only when the config does not say how many tokens to train.
    group: processes that step it together, each on its `Group.part` of the batches.
    """
    schedule, device = _check_possible(config, d_in, n_rows)
    architecture = get_architecture(config.arch)
    options = architecture.options_from(config)
    sae = architecture(d_in=d_in, d_sae=config.d_sae, k=config.k, **options)
    sae.initialise_(config.seed)
    if config.dtype == "float64":
        sae.double()
    return Trainer(sae, config, schedule, device, group)


def _check_possible(
    config: FitConfig, d_in: int, n_rows: int | None
) -> tuple[Schedule, torch.device]:
    if config.k_anneal_steps is not None and config.k is not None and config.k >= d_in:
        raise InputError(
            f"k is annealed from d_in down to --l0, but d_in is {d_in} and --l0 {config.k}. "
            "Pass a smaller --l0, or leave out --k-anneal-steps."
        )
    for name in config.log_to:
        get_logger(name)
    return config.schedule(n_rows), pick_device(config.device)


def norm_factor(store: ActivationStore, config: FitConfig) -> float:
    """What rows are divided by, so that their mean squared norm is 1."""
    if not config.normalise:
        return 1.0
    if not store.mean_squared_norm > 0:
        raise StoreError(
            f"Store {store.place} cannot be normalised: its mean squared norm is "
            f"{store.mean_squared_norm:g}. Harvest it again."
        )
    return float(store.mean_squared_norm**0.5)


def _recipe(store: ActivationStore, config: FitConfig, group: Group) -> dict[str, Any]:
    """What decides the weights, flat, so that a difference can be shown by name.

    The number of processes does: to the last bits, by the order of sums.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE_FIELDS}
    others = {"store_digest": store.digest, "world_size": group.world_size}
    return fields | others | store.pin


def _details(store: ActivationStore, config: FitConfig) -> dict[str, Any]:
    schedule = config.schedule(store.n_rows)
    return {
        "resolved": asdict(schedule) | {"norm_factor": norm_factor(store, config)},
        "free": {name: getattr(config, name) for name in _FREE_FIELDS},
        "store": {
            "path": described(store.place),
            "name": store.name,
            "digest": store.digest,
            "n_rows": store.n_rows,
            "d_in": store.d_in,
            "recipe": store.recipe,
        },
        "sae": _describe(config, store.d_in),
    }


def _describe(config: FitConfig, d_in: int) -> dict[str, Any]:
    architecture = get_architecture(config.arch)
    options = architecture.options_from(config)
    with torch.device("meta"):  # its shape is asked for, not its weights
        sae = architecture(d_in=d_in, d_sae=config.d_sae, k=config.k, **options)
    return describe_sae(sae)


def _read_summary(found: dict[str, Any], folder: RunFolder) -> Summary:
    try:
        summary, kinds = Summary(**found), get_type_hints(Summary)
        for name, value in found.items():
            kind = (
                kinds[name] | int if float in (kinds[name], *get_args(kinds[name])) else kinds[name]
            )
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TypeError(f"{name} is {str(value)[:100]!r}")
        return summary
    except TypeError as error:
        raise StoreError(
            f"{folder.summary_file} is damaged ({error}). Remove the run folder and fit again."
        ) from error
