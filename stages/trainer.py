"""One training step, to the reference recipe, and all the state that it has.

# B rows, D d_in, S d_sae

A step never waits for a GPU: what it returns are tensors, to be read when a line is logged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..storage.errors import InputError
from .adam import Adam, Bfloat16Adam, FusedAdam
from .captured import CapturedStep, CudaGraph, Graph
from .fitconfig import FitConfig, Schedule
from .parallel import ALONE, Bucket, Group
from .sae.asking import may_ask
from .sae.auxk import auxk_loss
from .sae.base import Sae, TrainingPass
from .sae.dead import DeadLatents
from .sae.decoder import normalise_rows_, project_gradient_
from .sae.ksparse import KSparse
from .sae.p_anneal import PAnneal
from .sae.resample import Resampler
from .sae.schedule import annealed_k, lr_factor
from .sae.sparsity import Sparsity
from .sae.threshold import update_threshold_
from .sae.whole_batch import of_whole_batch, spread_and_size

NEVER = torch.iinfo(torch.int64).max
# Of the controller that leads to an L0, over a whole run: how far log(coefficient) can go.
_CONTROL_RANGE = 50.0
_MOST_GAIN = 0.02


class Trainer:
    """Steps one SAE by hand: `trainer.step(batch)` on rows already divided by the norm factor.

    `updates` is the number of steps done; `state_dict()` is everything that the next step depends
    on.
    """

    def __init__(
        self,
        sae: Sae,
        config: FitConfig,
        schedule: Schedule,
        device: torch.device,
        group: Group = ALONE,
    ) -> None:
        """group: the processes that step this SAE together, each on its rows of a batch."""
        self.config, self.schedule, self.device = config, schedule, device
        self.sae = sae.to(device)
        self.group = sae.group = group
        sae.reference = config.reference
        on_cpu = device.type == "cpu"
        # To choose by, where choosing is all that they are for: off the CPU the others need them all.
        chooses = config.selection == "bf16" and (on_cpu or isinstance(sae, KSparse))
        sae.low_precision = config.dtype == "bfloat16" or chooses
        sae.low_products = config.dtype == "bfloat16" and not on_cpu
        self.updates = 0
        self.captured: CapturedStep | None = None
        self._now = _Now(updates=0, warmth=1.0)
        self._numbers: dict[str, float] = {}
        self.dead = DeadLatents(sae.d_sae, schedule.dead_after_tokens, device)
        self.first_bad_step = torch.tensor(NEVER, device=device)
        # What Adam steps: the parameters, W_enc as the contiguous (S, D) that it is in memory,
        # because Adam's fused kernel copies what is not contiguous.
        self._stepped = {
            name: torch.nn.Parameter(value.detach().T) if name == "W_enc" else value
            for name, value in self.sae.named_parameters()
        }
        self.adam = self._make_adam()
        self._bucket = None if group.is_alone else Bucket(self.sae.parameters())
        self.sparsity = self._make_sparsity()
        self.annealing = sae.prepare(config, schedule) if isinstance(sae, PAnneal) else None
        self.resampler = (
            None
            if config.resample_steps is None
            else Resampler(sae, config.resample_steps, config.seed, device)
        )
        # Exchanges between processes are not recorded.
        if device.type == "cuda" and config.capture and group.is_alone:
            self.capture_with(lambda: CudaGraph(device))

    def capture_with(self, new_graph: Callable[[], Graph]) -> None:
        """Record steps in such graphs, each a phase of the run, and replay them."""
        own = weakref.proxy(self)  # no cycle: a trainer's memory goes when the trainer does
        self.captured = CapturedStep(
            lambda x_BD: own._work(x_BD), new_graph, lambda: own._while_recorded()
        )
        updates = torch.tensor(self.updates, device=self.device)
        self._now = _Now(updates=updates, warmth=torch.zeros_like(updates, dtype=torch.float64))

    @contextmanager
    def _while_recorded(self) -> Iterator[object]:
        with self.sae.own_workspace() as workspace, self.adam.recorded():
            yield workspace

    def _make_adam(self) -> Adam:
        constants: dict[str, Any] = {"betas": self.schedule.betas, "eps": self.config.eps}
        if self.config.optimizer_state == "bfloat16":
            return Bfloat16Adam(self._stepped, **constants, seed=self.config.seed)
        return FusedAdam(self._stepped, **constants)

    def _make_sparsity(self) -> Sparsity | None:
        config, plan = self.config, self.schedule
        if plan.sparsity is None:
            return None
        return Sparsity(
            coefficient=plan.sparsity,
            warmup_steps=plan.sparsity_warmup_steps,
            target_l0=None if config.sparsity is not None else config.k,
            gain=min(_MOST_GAIN, _CONTROL_RANGE / plan.steps),
            device=self.device,
        )

    def step(self, batch_BD: Tensor) -> dict[str, Tensor | float]:
        """One update. The batch is only read; values are tensors on the device or plain numbers.

        loss = l2 + what the architecture adds + auxk_coefficient * aux; l2 is its reconstruction
        term, and explained_variance that of the whole reconstruction, around this batch's mean:
        1 - sum ||x - x_hat||^2 / sum ||x - mean||^2. With several processes all are of the whole
        batch, of which each is given its rows.
        threshold, k, coefficient and lr are those of this update.
        """
        x_BD = batch_BD.detach().to(device=self.device, dtype=self.sae.W_dec.dtype)
        if self.updates == 0:
            self.sae.start_from(x_BD)
        self._plan()
        if self.captured is None:
            values = self._work(x_BD)
        else:
            values = {**self.captured(self._phase(len(x_BD)), x_BD), **self._numbers}
        self._turn(values, x_BD)
        return values

    def _plan(self) -> None:
        """Tell the step what the schedule has for it."""
        warmth = 1.0 if self.sparsity is None else self.sparsity.warmth(self.updates)
        self._now = self._now.set_to(self.updates, warmth)
        self.adam.plan(self.lr, self.updates)
        self._numbers = {"lr": self.lr}
        if isinstance(self.sae, KSparse):
            self._numbers["k"] = self.sae.train_k
        if isinstance(self.sae, PAnneal):
            self._numbers["p"] = self.sae.p

    def _phase(self, n_rows: int) -> Hashable:
        """What `_work` branches on, and numbers of it that change in few steps only."""
        sae, sparsity = self.sae, self.sparsity
        if isinstance(sae, KSparse):
            return self._averages_threshold, self._nothing_is_dead(n_rows), sae.train_k
        assert sparsity is not None
        is_led = sparsity.target_l0 is not None and self.updates >= sparsity.warmup_steps
        return is_led, (sae.p, sae.next_p) if isinstance(sae, PAnneal) else None

    def _work(self, x_BD: Tensor) -> dict[str, Tensor | float]:
        """The part of a step that is done on the device."""
        now = self._now
        weight = 0.0 if self.sparsity is None else self.sparsity.weight(now.warmth).to(x_BD)
        passed = of_whole_batch(self.sae.training_pass(x_BD, weight), self.group)
        self._observe(passed, n_tokens=len(x_BD) * self.group.world_size)
        residual_BD = x_BD - passed.x_hat_BD
        aux = self._auxiliary_loss(residual_BD, passed)
        loss = passed.loss + self.config.auxk_coefficient * aux
        spread, error, whole_loss, whole_aux = spread_and_size(
            x_BD, residual_BD, self.group, loss.detach(), aux.detach()
        )
        self._remember_bad(whole_loss)
        values: dict[str, Tensor | float] = {
            "loss": whole_loss,
            **passed.parts,
            "aux": whole_aux,
            "explained_variance": 1 - (error / spread).square(),
            "l0": passed.l0,
            "dead": self.dead.mask().sum(),
            **self._numbers,
        }
        if isinstance(self.sae, KSparse):
            values["threshold"] = self.sae.threshold.clone()
        if self.sparsity is not None:
            values["coefficient"] = self.sparsity.weight(now.warmth)
        values["grad_norm"] = self._update(loss)
        if self.sparsity is not None:
            self.sparsity.observe_(self.updates, passed.l0)
        return values

    def _turn(self, values: Mapping[str, Tensor | float], x_BD: Tensor) -> None:
        """What the next step does otherwise: decided on the host, from few values if any."""
        if isinstance(self.sae, KSparse) and self.config.k_anneal_steps is not None:
            self.sae.train_k = annealed_k(
                self.updates,
                k=self.sae.k,
                k_start=min(self.sae.d_in, self.sae.d_sae),
                anneal_steps=self.config.k_anneal_steps,
            )
        if self.resampler is not None:
            self._forget(self.resampler.after_step_(self.updates, x_BD))
        if self.annealing is not None:
            assert self.sparsity is not None
            self.annealing.observe(self.updates, values, self.sparsity)
        self.updates += 1

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        plan = self.schedule
        return plan.lr * lr_factor(
            self.updates,
            steps=plan.steps,
            warmup_steps=plan.warmup_steps,
            decay_start_step=plan.decay_start_step,
            restart_steps=self.config.resample_steps,
        )

    def _low_precision_products(self) -> AbstractContextManager[Any]:
        if self.config.dtype == "bfloat16" and not self.sae.low_products:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _observe(self, passed: TrainingPass, *, n_tokens: int) -> None:
        """What a batch teaches beside gradients: exactly once a step, before the auxiliary loss."""
        if isinstance(self.sae, KSparse) and self._averages_threshold:
            sample = passed.smallest_kept
            assert sample is not None
            if self.config.reference:  # a batch in which nothing fires counts as a smallest of 0
                sample = torch.where(sample.isfinite(), sample, 0)
            update_threshold_(self.sae.threshold, sample, self.schedule.threshold_beta)
        self.dead.update_(passed.fired_S, n_tokens)
        if self.resampler is not None:
            self.resampler.observe_(passed.fired_S)

    @property
    def _averages_threshold(self) -> bool:
        return self.updates > self.schedule.threshold_start

    def _nothing_is_dead(self, n_rows: int) -> bool:
        """Whether that is known without looking: no latent can be dead before so many tokens."""
        n_tokens = (self.updates + 1) * n_rows * self.group.world_size
        return n_tokens < self.dead.dead_after_tokens

    def _auxiliary_loss(self, residual_BD: Tensor, passed: TrainingPass) -> Tensor:
        if not isinstance(self.sae, KSparse) or self.config.auxk_coefficient == 0:
            return residual_BD.new_zeros(())
        # Which spares a GPU the whole computation; a CPU looks at the counters, which may have been
        # set by hand.
        if not may_ask(residual_BD) and self._nothing_is_dead(len(residual_BD)):
            return residual_BD.new_zeros(())
        k_aux = self.config.k_aux or max(self.sae.d_in // 2, 1)
        with self._low_precision_products():
            return auxk_loss(self.sae, passed, residual_BD, self.dead.mask(), k_aux)

    def _remember_bad(self, loss: Tensor) -> None:
        bad = torch.where(loss.isfinite(), NEVER, self._now.updates)
        torch.minimum(self.first_bad_step, bad, out=self.first_bad_step)

    def _update(self, loss: Tensor) -> Tensor:
        """Backward, project, clip, Adam, unit rows; in the reference's order."""
        epsilon = self.config.recipe.norm_epsilon
        self.sae.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._bucket is not None:
            self.group.mean_gradients_(self._bucket)
        if self.sae.has_unit_rows:
            project_gradient_(self.sae.W_dec, epsilon)
        grad_norm = self._clip()
        w_enc_grad = self.sae.W_enc.grad
        self._stepped["W_enc"].grad = None if w_enc_grad is None else w_enc_grad.T
        self.adam.step()
        if self.sae.has_unit_rows:
            normalise_rows_(self.sae.W_dec, epsilon)
        return grad_norm

    def _forget(self, latent_N: Tensor) -> None:
        """Adam starts anew with latents that were resampled."""
        for name in ("W_enc", "W_dec", "b_enc") if len(latent_N) else ():
            self.adam.forget_(name, latent_N)

    def _clip(self) -> Tensor:
        """The total norm of the gradients, which are scaled down to grad_clip where it is more."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        limit = self.schedule.grad_clip
        # A CPU is asked whether there is anything to scale; a GPU scales by 1 instead.
        if limit and (not may_ask(norm) or bool(norm + 1e-6 > limit)):
            torch.nn.utils.clip_grads_with_norm_(self.sae.parameters(), limit, norm)
        return norm

    @property
    def _parts(self) -> list[Any]:
        """What has a state of its own, in a fixed order."""
        parts = (self.sparsity, self.annealing, self.resampler)
        return [part for part in parts if part is not None]

    def state_dict(self) -> dict[str, Tensor]:
        """Every number that the next step depends on, as a flat dict of tensors."""
        state = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name in self._stepped:
            for moment, value in self.adam.moments(name).items():
                state[f"adam_{moment}.{name}"] = value.T if name == "W_enc" else value
        for part in self._parts:
            state |= part.state_dict()
        state["tokens_since_fired"] = self.dead.tokens_since_fired_S
        state["first_bad_step"] = self.first_bad_step
        state["updates"] = torch.tensor(self.updates)
        if isinstance(self.sae, KSparse):
            state["k"] = torch.tensor(self.sae.train_k)
        state["lr"] = torch.tensor(self.lr, dtype=torch.float64)
        return {name: value.detach() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up another trainer's state. Raises InputError when names or shapes differ."""
        expected = self.state_dict()
        _check_alike(state, expected)
        # lr is float64, which MPS cannot hold, and it and the counts are read on the host anyway.
        of_host = ("updates", "k", "lr", "p", "p_updates")
        saved = {n: v if n in of_host else v.to(self.device) for n, v in state.items()}
        self.sae.load_state_dict({n[4:]: v for n, v in saved.items() if n.startswith("sae.")})
        self.updates = int(state["updates"])
        if self.captured is not None:
            self.captured.forget()
        if isinstance(self.sae, KSparse):
            self.sae.train_k = int(state["k"])
        for part in self._parts:
            part.load_state_dict(saved)
        self.dead.tokens_since_fired_S = saved["tokens_since_fired"].clone()
        self.first_bad_step = saved["first_bad_step"].clone()
        # lr follows from the number of updates; a saved one only documents it.
        moments = {
            name: {moment: saved[f"adam_{moment}.{name}"] for moment in self.adam.MOMENTS}
            for name in self._stepped
        }
        moments["W_enc"] = {moment: value.T for moment, value in moments["W_enc"].items()}
        self.adam.load(moments, self.updates)


@dataclass(frozen=True)
class _Now:
    """What changes in every step: numbers, or 0-dimensional tensors where steps are captured.

    updates: done before; warmth: how much of the sparsity coefficient counts.
    """

    updates: int | Tensor
    warmth: float | Tensor

    def set_to(self, updates: int, warmth: float) -> _Now:
        """These values, in the same tensors if there are any."""
        if not isinstance(self.updates, Tensor) or not isinstance(self.warmth, Tensor):
            return _Now(updates, warmth)
        self.updates.fill_(updates)
        self.warmth.fill_(warmth)
        return self


def _check_alike(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if set(state) != set(expected):
        names = ", ".join(sorted(set(state) ^ set(expected)))
        raise InputError(
            f"The checkpoint is not one of this architecture: it differs in {names}. "
            "Pass the configuration that it was made with."
        )
    d_in, found_d_in = expected["sae.b_dec"].shape[0], state["sae.b_dec"].shape[0]
    if found_d_in != d_in:
        raise InputError(
            f"The checkpoint has d_in={found_d_in}, but the activations have {d_in}. "
            "Pass the store that it was made from."
        )
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise InputError(
                f"The checkpoint has {name} of shape {tuple(state[name].shape)}, but this "
                f"configuration needs {tuple(value.shape)}. Pass the configuration that it was "
                "made with."
            )
