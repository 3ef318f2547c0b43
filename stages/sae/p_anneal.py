"""p-anneal SAE: ReLU with an Lp penalty whose p falls (Karvonen et al. 2024, arXiv 2408.00113).

# B rows, D d_in, S d_sae, V values

L = ||x - x_hat||^2 + c P_p(f), with P_p the mean over rows of sum_s f_s^p ("lp_p") or of its p-th root
("lp"). p goes from 1 (L1) towards p_end in a few updates; at each, c is rescaled by the ratio of the
recent means of P at the present and the next p, so that the penalty stays as strong as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .recipe import SPARSITY_NORMS
from .relu import Relu
from .support import Support

if TYPE_CHECKING:
    from ..fitconfig import FitConfig, Schedule
    from .sparsity import Sparsity


class PAnneal(Relu):
    """p: of the next pass; next_p: what comes after it, None before annealing begins."""

    def __init__(self, *, d_in: int, d_sae: int, k: int | None = None) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, k=k)
        self.p: float = 1.0
        self.next_p: float | None = None
        self.sparsity_norm = SPARSITY_NORMS[0]

    @classmethod
    def options_from(cls, config: FitConfig) -> dict[str, Any]:
        return {}

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def prepare(self, config: FitConfig, schedule: Schedule) -> PAnnealing:
        """Set what the fit starts with; what changes it from step to step."""
        self.p, self.sparsity_norm = config.p_start, config.sparsity_norm
        return PAnnealing(self, config, schedule)

    def penalty(self, latents_V: Tensor, support: Support) -> Tensor:
        return self.p_norm(latents_V, support, self.p)

    def p_norm(self, latents_V: Tensor, support: Support, p: float) -> Tensor:
        """P_p of a batch."""
        sums_B = support.row_sums(latents_V.pow(p))
        return (sums_B if self.sparsity_norm == "lp_p" else sums_B.pow(1 / p)).mean()

    def more_parts(self, latents_V: Tensor, support: Support) -> dict[str, Tensor]:
        if self.next_p is None:
            return {}
        return {"next_sparsity": self.p_norm(latents_V, support, self.next_p)}


class PAnnealing:
    """When p falls, and to what; the queue of recent penalties that c is rescaled by."""

    def __init__(self, sae: PAnneal, config: FitConfig, schedule: Schedule) -> None:
        self._sae, self._length, self._end = sae, config.sparsity_queue, config.p_end
        updates = config.sparsity_updates
        start, end = schedule.anneal_start, schedule.anneal_end
        # torch's own spacing and default type, as the reference has them, to the last bit.
        self._update_steps = torch.linspace(start, end, updates, dtype=torch.int64).tolist()
        self._p_values = torch.linspace(config.p_start, config.p_end, updates).tolist()
        self.done = 0
        self.queue: list[tuple[Tensor, Tensor]] = []

    def observe(self, step: int, values: Mapping[str, Any], sparsity: Sparsity) -> None:
        """Count one step; the next pass uses what this decides. values: of a pass, its parts."""
        sae = self._sae
        if sae.next_p is not None:
            now, after = (values[key].to(sae.W_dec.dtype) for key in ("sparsity", "next_sparsity"))
            self.queue.append((now, after))
            self.queue = self.queue[-self._length :]
        if self.done >= len(self._update_steps) or step != self._update_steps[self.done]:
            return
        if sae.next_p is not None:
            now, after = (
                torch.stack(values).to(torch.get_default_dtype()).mean()
                for values in zip(*self.queue, strict=True)
            )
            sparsity.scale_(now / after)
        self._turn_to(self.done)
        # Steps that fall together are one update.
        self.done += 1
        while self.done < len(self._update_steps) and self._update_steps[self.done] == step:
            self.done += 1

    def _turn_to(self, number: int) -> None:
        after = number + 1
        self._sae.p = self._p_values[number]
        self._sae.next_p = self._p_values[after] if after < len(self._p_values) else self._end

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next update depends on."""
        device = self._sae.W_dec.device
        queue = torch.zeros(self._length, 2, dtype=torch.float64, device=device)
        for place, pair in enumerate(self.queue):
            queue[place] = torch.stack(pair).to(queue)
        p, next_p = self._sae.p, self._sae.next_p
        return {
            "p": torch.tensor([p, -1.0 if next_p is None else next_p], dtype=torch.float64),
            "p_updates": torch.tensor([self.done, len(self.queue)]),
            "p_queue": queue,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up another's state."""
        p, next_p = state["p"].tolist()
        self._sae.p, self._sae.next_p = p, None if next_p < 0 else next_p
        self.done, length = (int(number) for number in state["p_updates"])
        queue = state["p_queue"].to(self._sae.W_dec)
        self.queue = [(pair[0], pair[1]) for pair in queue[:length]]
