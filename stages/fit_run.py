"""One SAE being fitted: its folder, its steps, its checkpoints, its judgement.

# B rows, D d_in

A run does not read batches: `fit_loop.py` gives the same ones to all runs of a sweep. Where several
processes step an SAE together the first has the `Run`, and the others a `Member` each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from ..storage import ActivationStore
from ..storage.errors import NonFiniteError, SaePipeError
from ..storage.files import write_json, write_whole
from ..storage.unfinished import WaitEnded
from .curve import draw_curve
from .fit_memory import memory_is_enough, peak_device_bytes, peak_memory_bytes
from .fitconfig import FitConfig, Schedule
from .loggers import get_logger
from .metrics import evaluate
from .rundir import Line, RunFolder, plain
from .runlog import RunLog, to_numbers
from .sae.weights import write_weights
from .trainer import NEVER, Trainer

SUMMARY_METRICS = ("explained_variance", "fvu", "mse", "l0", "dead_fraction", "gamma")
PROGRESS_METRICS = ("explained_variance", "l0", "dead_fraction", "gamma")
HELDOUT_BATCH_ROWS = 2048
MANY_DEAD = 0.1  # of the latents, at the end: worth a warning


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended; summary.json. None is a value that the held-out rows do not define."""

    run: str
    arch: str
    k: int | None
    d_sae: int
    seed: int
    order_seed: int = 0
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
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None


class Member:
    """One process's part of a run that another writes: it reads the checkpoint, and steps.

    error: what ended it before its end; then it takes no more steps. summary: of a complete run.
    """

    def __init__(
        self,
        store: ActivationStore,
        config: FitConfig,
        folder: RunFolder,
        trainer: Trainer,
        *,
        norm_factor: float,
    ) -> None:
        self.store, self.config, self.folder, self.trainer = store, config, folder, trainer
        self.schedule: Schedule = config.schedule(store.n_rows)
        self.norm_factor = norm_factor
        self.error: SaePipeError | None = None
        self.summary: Summary | None = None
        self.warning: str | None = None  # when it is complete
        self.line: Line | None = None  # the last that was logged
        saved = folder.read_checkpoint()
        self.progress: dict[str, Any] | None = None  # that came with the checkpoint
        if saved is not None:
            state, self.progress = saved
            trainer.load_state_dict(state)

    @property
    def updates(self) -> int:
        """Steps done: the number of the batch that it needs next, counted from 0."""
        return self.trainer.updates

    @property
    def is_trained(self) -> bool:
        """Whether all steps are done; what is left is `finish`."""
        return self.updates >= self.schedule.steps

    def step(self, batch_BD: torch.Tensor, waited_s: float) -> None:
        """One update, and what is due after it.

        waited_s: seconds that this process has waited for data so far.
        """
        self.update(batch_BD)

    def update(self, batch_BD: torch.Tensor) -> dict[str, torch.Tensor | float]:
        """One update; its values."""
        group, device = self.trainer.group, self.trainer.device
        with group.in_step(), memory_is_enough(self.config, device):
            values = self.trainer.step(batch_BD)
        if not group.is_alone and self.updates % self.schedule.log_every == 0:
            # Each has stepped for itself: other hardware rounds otherwise, and they would part.
            group.check_alike(
                {f"the checksum of weights {self.updates}": weights_digest(self.trainer)},
                "Start all processes with the same hardware and versions.",
            )
        return values

    def checkpoint(self) -> None:
        """Make the present state the one to resume from."""

    def finish(self) -> None:
        """Fold, judge, write: makes the run complete."""

    def close(self) -> None:
        """Give the memory back."""
        self.__dict__.pop("trainer", None)


class Run(Member):
    """The part that writes the folder, too: from its checkpoint, if there is one, to the end."""

    def __init__(
        self,
        store: ActivationStore,
        config: FitConfig,
        folder: RunFolder,
        trainer: Trainer,
        *,
        norm_factor: float,
    ) -> None:
        super().__init__(store, config, folder, trainer, norm_factor=norm_factor)
        progress = self.progress or {"seconds": 0.0, "waited_s": 0.0}
        self._seconds_before: float = progress["seconds"]
        self._waited_before_s: float = progress["waited_s"]
        self._waited_s = 0.0
        self._checkpointed_step = None if self.progress is None else self.updates
        folder.truncate_metrics(self.updates)
        self._begun = self._last_checkpoint = time.monotonic()
        self._trained: float | None = None  # when the last step was done
        self._log = RunLog(
            folder,
            first_step=self.updates,
            batch_size=config.batch_size,
            loggers=[
                get_logger(name)(folder.path, folder.recipe(), self.updates)
                for name in config.log_to
            ],
        )

    def step(self, batch_BD: torch.Tensor, waited_s: float) -> None:
        """One update, the line and the checkpoint that are due after it."""
        values = self.update(batch_BD)
        self._waited_s = waited_s
        step, plan = self.updates, self.schedule
        judged = self.is_trained or step % plan.heldout_every == 0
        if judged or step % plan.log_every == 0 or step == 1:
            self._record(step, values, judged=judged)
        if self.is_trained:
            self._trained = time.monotonic()
        if self.is_trained or self._checkpoint_is_due(step):
            self.checkpoint()

    def _record(self, step: int, values: dict[str, Any], *, judged: bool) -> None:
        self._check_finite(values["loss"])
        heldout = self._judge_in_passing() if judged else {}
        self.line = self._log.record(step, to_numbers(values), heldout, self._waited_s)

    def _checkpoint_is_due(self, step: int) -> bool:
        every = self.config.checkpoint_steps
        age_s = time.monotonic() - self._last_checkpoint
        return age_s >= 60 * self.config.checkpoint_minutes or bool(every and step % every == 0)

    def checkpoint(self) -> None:
        """Never a state with NaN in it."""
        step = self.updates
        if step == self._checkpointed_step:
            return
        self._check_finite(*self.trainer.sae.parameters())
        self._log.flush(durably=True)
        progress = {"step": step, "seconds": self._seconds(), "waited_s": self._all_waited_s()}
        self.folder.write_checkpoint(
            self.trainer.state_dict(), progress, keep=self.config.keep_checkpoints
        )
        self._checkpointed_step, self._last_checkpoint = step, time.monotonic()

    def _check_finite(self, *values: torch.Tensor) -> None:
        """NonFiniteError when a loss so far, or one of the values, was NaN or Inf."""
        bad_step = int(self.trainer.first_bad_step)
        if bad_step == NEVER and all(bool(value.isfinite().all()) for value in values):
            return
        step = self.updates - 1 if bad_step == NEVER else bad_step
        what = "weights" if bad_step == NEVER else "loss"
        first = step * self.config.batch_size
        kept = self._checkpointed_step
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

    def finish(self) -> None:
        """The judgement is on all held-out rows; the summary is written last.

        Then nothing needs the checkpoint any more, which is three times as large as the weights.
        The checkpoint of the last step is written already: whatever interrupts this, it is done
        again from there.
        """
        seconds, waited_s = self._seconds(), self._all_waited_s()
        self._log.flush()
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
            order_seed=config.order_seed,
            steps=plan.steps,
            tokens=plan.tokens,
            store_digest=self.store.digest,
            heldout_rows=rows,
            seconds=round(seconds, 3),
            rows_per_s=round(plan.tokens / max(seconds, 1e-9), 1),
            wait_share=round(waited_s / max(seconds, 1e-9), 5),
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_bytes=peak_device_bytes(self.trainer.device),
            **metrics,
        )
        write_weights(sae, self.folder.path)
        lines = self.folder.read_metrics()
        curve = draw_curve(lines, f"{summary.run} ({config.arch})")
        write_whole(self.folder.path / "curve.png", curve)
        write_json(self.folder.summary_file, asdict(summary))
        self.folder.remove_checkpoint()
        self.warning = self._about_dead(lines)
        self.summary = summary

    def _about_dead(self, lines: list[Line]) -> str | None:
        dead, d_sae = (lines[-1].get("dead") if lines else None) or 0, self.config.d_sae
        if dead <= MANY_DEAD * d_sae:
            return None
        return (
            f"Warning: {dead:.0f} of {d_sae} latents of {self.folder.path} ({dead / d_sae:.0%}) "
            f"have not fired for {self.schedule.dead_after_tokens:,} tokens. A smaller --d-sae, "
            f"more --tokens or {self._against_dead()} leaves fewer dead."
        )

    def _against_dead(self) -> str:
        if self.config.recipe.keeps_k:
            return "a larger --auxk-coefficient"
        return "--resample-steps" if self.config.arch == "relu" else "a smaller --sparsity"

    def close(self) -> None:
        """Write the lines that are left, too."""
        super().close()
        self._log.close()

    def _seconds(self) -> float:
        end = time.monotonic() if self._trained is None else self._trained
        return self._seconds_before + end - self._begun

    def _all_waited_s(self) -> float:
        return self._waited_before_s + self._waited_s


def weights_digest(trainer: Trainer) -> int:
    """The sum of the bits of all weights: the same for the same weights only, all but surely."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = [value.detach() for value in trainer.sae.parameters()]
    return sum(int(part.view(bits[part.itemsize]).sum()) for part in parts)
