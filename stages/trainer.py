"""One training step, to the reference recipe, and all the state that it has.

# B rows, D d_in, S d_sae

A step never waits for a GPU: what it returns are tensors, to be read when a line is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..storage.errors import InputError
from .fitconfig import FitConfig, Schedule
from .parallel import ALONE, Bucket, Group
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
_MOMENTS = {"adam_m": "exp_avg", "adam_v": "exp_avg_sq"}  # in a state: in Adam


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
        sae.low_precision = config.selection == "bf16" or config.dtype == "bfloat16"
        self.updates = 0
        self.dead = DeadLatents(sae.d_sae, schedule.dead_after_tokens, device)
        self.first_bad_step = torch.tensor(NEVER, device=device)
        # What Adam steps: the parameters, W_enc as the contiguous (S, D) that it is in memory,
        # because Adam's fused kernel copies what is not contiguous.
        self._stepped = {
            name: torch.nn.Parameter(value.detach().T) if name == "W_enc" else value
            for name, value in self.sae.named_parameters()
        }
        self.optimizer = torch.optim.Adam(
            self._stepped.values(),
            lr=schedule.lr,
            betas=schedule.betas,
            eps=config.eps,
            fused=device.type != "mps",
        )
        self._bucket = None if group.is_alone else Bucket(self.sae.parameters())
        self.sparsity = self._make_sparsity()
        self.annealing = sae.prepare(config, schedule) if isinstance(sae, PAnneal) else None
        self.resampler = (
            None
            if config.resample_steps is None
            else Resampler(sae, config.resample_steps, config.seed, device)
        )

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
        weight = 0.0 if self.sparsity is None else self.sparsity.weight(self.updates).to(x_BD)
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
            "lr": self.lr,
            **self._of_the_kind(),
        }
        values["grad_norm"] = self._update(loss, x_BD)
        self._learn_from(passed)
        return values

    def _of_the_kind(self) -> dict[str, Tensor | float]:
        """Values that only some architectures have."""
        if isinstance(self.sae, KSparse):
            return {"threshold": self.sae.threshold.clone(), "k": self.sae.train_k}
        assert self.sparsity is not None
        own: dict[str, Tensor | float] = {"coefficient": self.sparsity.weight(self.updates)}
        return own | ({"p": self.sae.p} if isinstance(self.sae, PAnneal) else {})

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
        if self.config.dtype == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _observe(self, passed: TrainingPass, *, n_tokens: int) -> None:
        """What a batch teaches beside gradients: exactly once a step, before the auxiliary loss."""
        if isinstance(self.sae, KSparse) and self.updates > self.schedule.threshold_start:
            sample = passed.smallest_kept
            assert sample is not None
            if self.config.reference:  # a batch in which nothing fires counts as a smallest of 0
                sample = torch.where(sample.isfinite(), sample, 0)
            update_threshold_(self.sae.threshold, sample, self.schedule.threshold_beta)
        self.dead.update_(passed.fired_S, n_tokens)
        if self.resampler is not None:
            self.resampler.observe_(passed.fired_S)

    def _auxiliary_loss(self, residual_BD: Tensor, passed: TrainingPass) -> Tensor:
        if not isinstance(self.sae, KSparse) or self.config.auxk_coefficient == 0:
            return residual_BD.new_zeros(())
        # No latent can be dead before that many tokens, which spares a GPU the whole computation;
        # a CPU looks at the counters, which may have been set by hand.
        tokens_seen = (self.updates + 1) * len(residual_BD) * self.group.world_size
        if residual_BD.device.type != "cpu" and tokens_seen < self.dead.dead_after_tokens:
            return residual_BD.new_zeros(())
        k_aux = self.config.k_aux or max(self.sae.d_in // 2, 1)
        with self._low_precision_products():
            return auxk_loss(self.sae, passed, residual_BD, self.dead.mask(), k_aux)

    def _remember_bad(self, loss: Tensor) -> None:
        bad = torch.where(loss.isfinite(), NEVER, self.updates)
        self.first_bad_step = torch.minimum(self.first_bad_step, bad)

    def _update(self, loss: Tensor, x_BD: Tensor) -> Tensor:
        """Backward, project, clip, Adam, k, unit rows, resampling; in the reference's order."""
        epsilon = self.config.recipe.norm_epsilon
        self.sae.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._bucket is not None:
            self.group.mean_gradients_(self._bucket)
        if self.sae.has_unit_rows:
            project_gradient_(self.sae.W_dec, epsilon)
        grad_norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        w_enc_grad = self.sae.W_enc.grad
        self._stepped["W_enc"].grad = None if w_enc_grad is None else w_enc_grad.T
        self.optimizer.step()
        if isinstance(self.sae, KSparse) and self.config.k_anneal_steps is not None:
            self.sae.train_k = annealed_k(
                self.updates,
                k=self.sae.k,
                k_start=min(self.sae.d_in, self.sae.d_sae),
                anneal_steps=self.config.k_anneal_steps,
            )
        if self.sae.has_unit_rows:
            normalise_rows_(self.sae.W_dec, epsilon)
        if self.resampler is not None:
            self._forget(self.resampler.after_step_(self.updates, x_BD))
        self.updates += 1
        return grad_norm

    def _forget(self, latent_N: Tensor) -> None:
        """Adam starts anew with latents that were resampled."""
        for name in ("W_enc", "W_dec", "b_enc") if len(latent_N) else ():
            for key in _MOMENTS.values():
                self.optimizer.state[self._stepped[name]][key].index_fill_(0, latent_N, 0)

    def _clip(self) -> Tensor:
        """The total norm of the gradients, which are scaled down to grad_clip where it is more."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        limit = self.schedule.grad_clip
        # A CPU is asked whether there is anything to scale; a GPU scales by 1 instead.
        if limit and (norm.device.type != "cpu" or bool(norm + 1e-6 > limit)):
            torch.nn.utils.clip_grads_with_norm_(self.sae.parameters(), limit, norm)
        return norm

    def _learn_from(self, passed: TrainingPass) -> None:
        """What the next pass does otherwise because of this one."""
        if self.sparsity is None:
            return
        step = self.updates - 1
        self.sparsity.observe_(step, passed.l0)
        if self.annealing is not None:
            self.annealing.observe(step, passed.parts, self.sparsity)

    @property
    def _parts(self) -> list[Any]:
        """What has a state of its own, in a fixed order."""
        parts = (self.sparsity, self.annealing, self.resampler)
        return [part for part in parts if part is not None]

    def state_dict(self) -> dict[str, Tensor]:
        """Every number that the next step depends on, as a flat dict of tensors."""
        state = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, stepped in self._stepped.items():
            moments = self.optimizer.state.get(stepped, {})
            for moment, key in _MOMENTS.items():
                value = moments.get(key, torch.zeros_like(stepped))
                state[f"{moment}.{name}"] = value.T if name == "W_enc" else value
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
        if isinstance(self.sae, KSparse):
            self.sae.train_k = int(state["k"])
        for part in self._parts:
            part.load_state_dict(saved)
        self.dead.tokens_since_fired_S = saved["tokens_since_fired"].clone()
        self.first_bad_step = saved["first_bad_step"].clone()
        # lr follows from the number of updates; a saved one only documents it.
        for name, stepped in self._stepped.items():
            moments = {key: saved[f"{moment}.{name}"] for moment, key in _MOMENTS.items()}
            self.optimizer.state[stepped] = {
                "step": torch.tensor(float(self.updates), device=self._adam_step_device),
                **{
                    key: torch.empty_like(stepped).copy_(value.T if name == "W_enc" else value)
                    for key, value in moments.items()
                },
            }

    @property
    def _adam_step_device(self) -> torch.device:
        fused = self.optimizer.defaults["fused"]
        return self.device if fused else torch.device("cpu")


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
