"""Fit one SAE from a store: steps, checkpoints, held-out judgement, summary.

# B rows, D d_in

The main path: `fit` prepares the run folder, `_Run.train` steps to the end, `_Run.finish` judges on
held-out rows and writes weights, picture and summary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ..storage import ActivationStore
from ..storage.errors import InputError, NonFiniteError, StoreError
from ..storage.files import write_json, write_whole
from ..storage.lock import sole_writer
from ..storage.store import store_name
from ..storage.unfinished import WaitEnded
from .batches import TorchBatches
from .curve import draw_curve
from .devices import pick_device
from .fit_memory import check_memory, memory_is_enough
from .fitconfig import FitConfig, Schedule
from .metrics import evaluate
from .rundir import RunFolder, plain
from .runlog import RunLog, to_numbers
from .sae import get_architecture
from .sae.weights import describe_sae, write_weights
from .stopping import leave, signals_asked
from .trainer import NEVER, Trainer

SUMMARY_METRICS = ("explained_variance", "fvu", "mse", "l0", "dead_fraction", "gamma")
PROGRESS_METRICS = ("explained_variance", "l0", "dead_fraction", "gamma")
HELDOUT_BATCH_ROWS = 2048

# They do not decide the weights, so a run may go on with other values.
_FREE_FIELDS = (
    "device",
    "log_every",
    "heldout_every",
    "heldout_rows",
    "checkpoint_minutes",
    "checkpoint_steps",
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended; summary.json. None is a value that the held-out rows do not define."""

    run: str
    arch: str
    k: int | None
    d_sae: int
    seed: int
    steps: int
    tokens: int
    store_digest: str
    heldout_rows: int
    explained_variance: float | None
    fvu: float | None
    mse: float | None
    l0: float | None
    dead_fraction: float | None
    gamma: float | None
    seconds: float
    rows_per_s: float
    wait_share: float


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
    """
    out = Path(default_out(store, config) if out is None else out)
    folder = RunFolder(out)
    # Before a folder is made, or anything in one that is not ours is touched.
    _, device = _check_possible(config, store.d_in, store.n_rows)
    folder.check_place()
    if folder.summary() is None:
        check_memory(config, store.d_in, device)
    with sole_writer(out, "Run"):
        folder.remove_leftovers()
        recipe = _recipe(store, config)
        folder.check_same(recipe)
        summary = folder.summary()
        if summary is not None:
            folder.remove_checkpoint()  # a kill may have come right after the summary
            if show_progress:
                print(f"Run {out} is complete: nothing to do.", file=sys.stderr)
            return _read_summary(summary, folder)
        with memory_is_enough(config, device):
            trainer = build_trainer(config, store.d_in, store.n_rows)  # fails before config.json
            folder.begin(recipe, _details(store, config))
            return _Run(store, config, folder, trainer, show_progress=show_progress).complete()


def default_out(store: ActivationStore | Path, config: FitConfig) -> str:
    """A readable run name: runs/STORE-ARCH-l0_K-seedSEED."""
    name = store_name(store) if isinstance(store, Path) else store.name
    aim = f"sparsity_{config.sparsity:g}" if config.k is None else f"l0_{config.k}"
    return f"runs/{name}-{config.arch}-{aim}-seed{config.seed}"


def build_trainer(config: FitConfig, d_in: int, n_rows: int | None = None) -> Trainer:
    """A trainer to step by hand on batches (B, d_in) already divided by the norm factor.

    n_rows: rows of the store, needed only when the config does not say how many tokens to train.
    """
    schedule, device = _check_possible(config, d_in, n_rows)
    architecture = get_architecture(config.arch)
    options = architecture.options_from(config)
    sae = architecture(d_in=d_in, d_sae=config.d_sae, k=config.k, **options)
    sae.initialise_(config.seed)
    if config.dtype == "float64":
        sae.double()
    return Trainer(sae, config, schedule, device)


def _check_possible(
    config: FitConfig, d_in: int, n_rows: int | None
) -> tuple[Schedule, torch.device]:
    if config.k_anneal_steps is not None and config.k is not None and config.k >= d_in:
        raise InputError(
            f"k is annealed from d_in down to --l0, but d_in is {d_in} and --l0 {config.k}. "
            "Pass a smaller --l0, or leave out --k-anneal-steps."
        )
    return config.schedule(n_rows), pick_device(config.device)


def norm_factor(store: ActivationStore, config: FitConfig) -> float:
    """What rows are divided by, so that their mean squared norm is 1."""
    if not config.normalise:
        return 1.0
    if not store.mean_squared_norm > 0:
        raise StoreError(
            f"Store {store.path} cannot be normalised: its mean squared norm is "
            f"{store.mean_squared_norm:g}. Harvest it again."
        )
    return float(store.mean_squared_norm**0.5)


def _recipe(store: ActivationStore, config: FitConfig) -> dict[str, Any]:
    """What decides the weights, flat, so that a difference can be shown by name."""
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE_FIELDS}
    return fields | {"store_digest": store.digest} | store.pin


def _details(store: ActivationStore, config: FitConfig) -> dict[str, Any]:
    schedule = config.schedule(store.n_rows)
    return {
        "resolved": asdict(schedule) | {"norm_factor": norm_factor(store, config)},
        "free": {name: getattr(config, name) for name in _FREE_FIELDS},
        "store": {
            "path": str(store.path.resolve()),
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
        return Summary(**found)
    except TypeError as error:
        raise StoreError(
            f"{folder.summary_file} is damaged ({error}). Remove the run folder and fit again."
        ) from error


class _Run:
    """One process's part of a run: from its checkpoint, if there is one, to the end."""

    def __init__(
        self,
        store: ActivationStore,
        config: FitConfig,
        folder: RunFolder,
        trainer: Trainer,
        *,
        show_progress: bool,
    ) -> None:
        self.store, self.config, self.folder, self.trainer = store, config, folder, trainer
        self.schedule: Schedule = config.schedule(store.n_rows)
        self.norm_factor = norm_factor(store, config)
        self.seconds_before = self.waited_before_s = 0.0
        self.checkpointed_step: int | None = None
        self._resume()
        self.begun = self.last_checkpoint = time.monotonic()
        self.batches = TorchBatches(
            store,
            batch_size=config.batch_size,
            seed=config.seed,
            start=self.trainer.updates,
            device=self.trainer.device,
            dtype=self.trainer.sae.W_dec.dtype,
            scale=1 / self.norm_factor,
        )
        self.log = RunLog(
            folder,
            steps=self.schedule.steps,
            first_step=self.trainer.updates,
            batch_size=config.batch_size,
            show=show_progress,
        )

    def _resume(self) -> None:
        saved = self.folder.read_checkpoint()
        if saved is not None:
            state, progress = saved
            self.trainer.load_state_dict(state)
            self.seconds_before = progress["seconds"]
            self.waited_before_s = progress["waited_s"]
            self.checkpointed_step = self.trainer.updates
        self.folder.truncate_metrics(self.trainer.updates)

    def complete(self) -> Summary:
        """Train to the end, judge, write everything."""
        try:
            with signals_asked() as asked, _products(self.config.dtype):
                self.store.while_waiting(lambda: bool(asked), self.log.say)
                self.train(asked)
            self.store.while_waiting(lambda: False, self.log.say)
            return self.finish()
        finally:
            self.batches.close()
            self.log.close()

    def train(self, asked: list[int]) -> None:
        """Step until the end; a signal in `asked` checkpoints and ends the process."""
        trainer, plan = self.trainer, self.schedule
        while trainer.updates < plan.steps:
            try:
                batch_BD = next(self.batches)
            except WaitEnded:  # of a store that is followed
                self.checkpoint()
                leave(asked[0], self.folder.path)
                raise
            values = trainer.step(batch_BD)
            self.log.advance()
            step = trainer.updates
            is_last = step == plan.steps
            judged = is_last or step % plan.heldout_every == 0
            if judged or step % plan.log_every == 0 or step == 1:
                self._record(step, values, judged=judged)
            if is_last or asked or self._checkpoint_is_due(step):
                self.checkpoint()
            if asked:
                leave(asked[0], self.folder.path)

    def _record(self, step: int, values: dict[str, Any], *, judged: bool) -> None:
        self._check_finite(values["loss"])
        heldout = self._judge_in_passing() if judged else {}
        self.log.record(step, to_numbers(values), heldout, self.batches.waited_s)

    def _checkpoint_is_due(self, step: int) -> bool:
        every = self.config.checkpoint_steps
        age_s = time.monotonic() - self.last_checkpoint
        return age_s >= 60 * self.config.checkpoint_minutes or bool(every and step % every == 0)

    def checkpoint(self) -> None:
        """Make the present state the one to resume from; never a state with NaN in it."""
        self._check_finite(*self.trainer.sae.parameters())
        self.log.flush(durably=True)
        step = self.trainer.updates
        progress = {"step": step, "seconds": self._seconds(), "waited_s": self._waited_s()}
        self.folder.write_checkpoint(self.trainer.state_dict(), progress)
        self.checkpointed_step, self.last_checkpoint = step, time.monotonic()

    def _check_finite(self, *values: torch.Tensor) -> None:
        """NonFiniteError when a loss so far, or one of the values, was NaN or Inf."""
        bad_step = int(self.trainer.first_bad_step)
        if bad_step == NEVER and all(bool(value.isfinite().all()) for value in values):
            return
        step = self.trainer.updates - 1 if bad_step == NEVER else bad_step
        what = "weights" if bad_step == NEVER else "loss"
        first = step * self.config.batch_size
        kept = self.checkpointed_step
        good = (
            "there is no checkpoint before it"
            if kept is None
            else f"the last good checkpoint is that of step {kept} in "
            f"{self.folder.checkpoint_folder}"
        )
        raise NonFiniteError(
            f"The {what} became NaN or Inf at step {step + 1} of {self.schedule.steps}, on rows "
            f"{first} to {first + self.config.batch_size - 1} of the training order; {good}. "
            "Pass a smaller --lr with a new --out."
        )

    def _judge_in_passing(self) -> dict[str, float]:
        """A few metrics on some held-out rows; nothing before inference has its threshold."""
        rows = min(self.config.heldout_rows, self.store.heldout.n_rows)
        if rows == 0 or not self.trainer.sae.is_ready:
            return {}
        batches = self._heldout(rows, scale=1 / self.norm_factor)
        try:
            return evaluate(self.trainer.sae, batches, PROGRESS_METRICS)
        except WaitEnded:  # the line goes without them, and the run ends after this step
            return {}

    def _heldout(self, rows: int, *, scale: float) -> Iterator[NDArray[Any]]:
        for start in range(0, rows, HELDOUT_BATCH_ROWS):
            yield self.store.heldout.read(start, min(start + HELDOUT_BATCH_ROWS, rows)) * scale

    def finish(self) -> Summary:
        """Fold, judge on all held-out rows, write; the summary last, which makes it complete.

        Then nothing needs the checkpoint any more, which is three times as large as the weights.
        """
        seconds, waited_s = self._seconds(), self._waited_s()
        self.log.flush()
        sae = self.trainer.sae
        sae.fold_norm_factor_(self.norm_factor)
        rows = self.store.heldout.n_rows
        metrics = plain(evaluate(sae, self._heldout(rows, scale=1.0), SUMMARY_METRICS))
        metrics.pop("dead_fraction_rows", None)
        config, plan = self.config, self.schedule
        summary = Summary(
            run=self.folder.path.name,
            arch=config.arch,
            k=config.k,
            d_sae=config.d_sae,
            seed=config.seed,
            steps=plan.steps,
            tokens=plan.tokens,
            store_digest=self.store.digest,
            heldout_rows=rows,
            seconds=round(seconds, 3),
            rows_per_s=round(plan.tokens / max(seconds, 1e-9), 1),
            wait_share=round(waited_s / max(seconds, 1e-9), 5),
            **metrics,
        )
        write_weights(sae, self.folder.path)
        curve = draw_curve(self.folder.read_metrics(), f"{summary.run} ({config.arch})")
        write_whole(self.folder.path / "curve.png", curve)
        write_json(self.folder.summary_file, asdict(summary))
        self.folder.remove_checkpoint()
        return summary

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.begun

    def _waited_s(self) -> float:
        return self.waited_before_s + self.batches.waited_s


@contextmanager
def _products(dtype: str) -> Iterator[None]:
    """TF32 for float32 products where asked for, and as it was before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
