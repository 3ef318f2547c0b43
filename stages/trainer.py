"""One training step, to the reference recipe, and all the state that it has.

# B rows, D d_in, S d_sae

A step never waits for the device: what it returns are tensors, to be read when a line is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..storage.errors import InputError
from .fitconfig import FitConfig, Schedule
from .sae.auxk import auxk_loss
from .sae.base import Sae, TrainingPass
from .sae.dead import DeadLatents
from .sae.decoder import normalise_rows_, project_gradient_
from .sae.initialise import geometric_median
from .sae.schedule import annealed_k, lr_factor
from .sae.threshold import update_threshold_

NEVER = torch.iinfo(torch.int64).max


class Trainer:
    """Steps one SAE by hand: `trainer.step(batch)` on rows already divided by the norm factor.

    `updates` is the number of steps done; `state_dict()` is everything that the next step depends
    on.
    """

    def __init__(
        self, sae: Sae, config: FitConfig, schedule: Schedule, device: torch.device
    ) -> None:
        self.config, self.schedule, self.device = config, schedule, device
        self.sae = sae.to(device)
        self.updates = 0
        self.dead = DeadLatents(sae.d_sae, schedule.dead_after_tokens, device)
        self.first_bad_step = torch.tensor(NEVER, device=device)
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(),
            lr=schedule.lr,
            betas=config.betas,
            eps=config.eps,
            fused=device.type != "mps",
        )

    def step(self, batch_BD: Tensor) -> dict[str, Tensor | float]:
        """One update. The batch is only read; values are tensors on the device or plain numbers.

        loss = l2 + coefficient * aux; l2 is the architecture's reconstruction term, and
        explained_variance that of the whole reconstruction, around this batch's mean. threshold,
        k and lr are those of this update.
        """
        x_BD = batch_BD.detach().to(device=self.device, dtype=self.sae.W_dec.dtype)
        if self.updates == 0:
            self._start_from(x_BD)
        with self._autocast():
            forward = self.sae.training_pass(x_BD)
            self._observe(forward, n_tokens=len(x_BD))
            residual_BD = (x_BD - forward.x_hat_BD).detach()
            aux = self._auxiliary_loss(residual_BD, forward)
        loss = forward.reconstruction + self.config.auxk_coefficient * aux
        self._remember_bad(loss)
        values: dict[str, Tensor | float] = {
            "loss": loss.detach(),
            "l2": forward.reconstruction.detach(),
            "aux": aux.detach(),
            "explained_variance": _explained_variance(x_BD, residual_BD),
            "l0": forward.l0,
            "dead": self.dead.mask().sum(),
            "threshold": self.sae.threshold.clone(),
            "k": self.sae.train_k,
            "lr": self.lr,
        }
        values["grad_norm"] = self._update(loss)
        return values

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        plan = self.schedule
        return plan.lr * lr_factor(
            self.updates,
            steps=plan.steps,
            warmup_steps=plan.warmup_steps,
            decay_start_step=plan.decay_start_step,
        )

    def _start_from(self, x_BD: Tensor) -> None:
        with torch.no_grad():
            self.sae.b_dec.copy_(geometric_median(x_BD))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.dtype == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _observe(self, forward: TrainingPass, *, n_tokens: int) -> None:
        """What a batch teaches beside gradients: exactly once a step, before the auxiliary loss."""
        if self.updates > self.schedule.threshold_start:
            update_threshold_(
                self.sae.threshold, forward.smallest_kept, self.schedule.threshold_beta
            )
        self.dead.update_(forward.fired_S, n_tokens)

    def _auxiliary_loss(self, residual_BD: Tensor, forward: TrainingPass) -> Tensor:
        # No latent can be dead before that many tokens, which spares a GPU the whole computation.
        tokens_seen = (self.updates + 1) * len(residual_BD)
        if self.config.auxk_coefficient == 0 or tokens_seen < self.dead.dead_after_tokens:
            return residual_BD.new_zeros(())
        return auxk_loss(residual_BD, forward.candidates_BS, self.dead.mask(), self.sae.W_dec)

    def _remember_bad(self, loss: Tensor) -> None:
        bad = torch.where(loss.detach().isfinite(), NEVER, self.updates)
        self.first_bad_step = torch.minimum(self.first_bad_step, bad)

    def _update(self, loss: Tensor) -> Tensor:
        """Backward, project, clip, Adam, k, unit rows; in the reference's order."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        project_gradient_(self.sae.W_dec)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        if self.config.k_anneal_steps is not None:
            self.sae.train_k = annealed_k(
                self.updates,
                k=self.sae.k,
                k_start=min(self.sae.d_in, self.sae.d_sae),
                anneal_steps=self.config.k_anneal_steps,
            )
        normalise_rows_(self.sae.W_dec)
        self.updates += 1
        return grad_norm

    def state_dict(self) -> dict[str, Tensor]:
        """Every number that the next step depends on, as a flat dict of tensors."""
        state = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            zero = torch.zeros_like(parameter)
            state[f"adam_m.{name}"] = moments.get("exp_avg", zero)
            state[f"adam_v.{name}"] = moments.get("exp_avg_sq", zero)
        state["tokens_since_fired"] = self.dead.tokens_since_fired_S
        state["first_bad_step"] = self.first_bad_step
        state["updates"] = torch.tensor(self.updates)
        state["k"] = torch.tensor(self.sae.train_k)
        state["lr"] = torch.tensor(self.lr, dtype=torch.float64)
        return {name: value.detach() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up another trainer's state. Raises InputError when names or shapes differ."""
        expected = self.state_dict()
        _check_alike(state, expected)
        # lr is float64, which MPS cannot hold, and it and the counts are read on the host anyway.
        of_host = ("updates", "k", "lr")
        saved = {n: value.to(self.device) for n, value in state.items() if n not in of_host}
        self.sae.load_state_dict({n[4:]: v for n, v in saved.items() if n.startswith("sae.")})
        self.updates = int(state["updates"])
        self.sae.train_k = int(state["k"])
        self.dead.tokens_since_fired_S = saved["tokens_since_fired"].clone()
        self.first_bad_step = saved["first_bad_step"].clone()
        # lr follows from the number of updates; a saved one only documents it.
        for name, parameter in self.sae.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.updates), device=self._adam_step_device),
                "exp_avg": saved[f"adam_m.{name}"].to(parameter.dtype, copy=True),
                "exp_avg_sq": saved[f"adam_v.{name}"].to(parameter.dtype, copy=True),
            }

    @property
    def _adam_step_device(self) -> torch.device:
        fused = self.optimizer.defaults["fused"]
        return self.device if fused else torch.device("cpu")


def _explained_variance(x_BD: Tensor, residual_BD: Tensor) -> Tensor:
    """1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, with the batch's mean."""
    return 1 - residual_BD.square().sum() / (x_BD - x_BD.mean(dim=0)).square().sum()


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
