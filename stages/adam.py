"""Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), its moments in full or in half the memory.

# N elements of a parameter, C elements of a slab

What changes from step to step is told by `plan`, on the host; `step` only works on the device, with
numbers that lie there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from ..storage.counter import stream_key
from .rounding import BLOCK, CountedBits, as_int32, high_half, low_half, round_into

# Elements whose moments are float32 at the same time: on a CPU what stays in the cache.
_SLAB_BLOCKS = {"cpu": 1, "cuda": 16}


class Adam(ABC):
    """Updates parameters, given by name, from their gradients; parameters are contiguous.

    A state has two moments for each parameter, `m` and `v` by MOMENTS.
    """

    MOMENTS = ("m", "v")

    def __init__(
        self, parameters: Mapping[str, Parameter], *, betas: tuple[float, float], eps: float
    ) -> None:
        self.parameters, self.betas, self.eps = dict(parameters), betas, eps

    @abstractmethod
    def plan(self, lr: float, updates: int) -> None:
        """What the next step needs to know: its learning rate, and how many were done before."""

    @abstractmethod
    def step(self) -> None:
        """One update of every parameter that has a gradient."""

    @abstractmethod
    def moments(self, name: str) -> Mapping[str, Tensor]:
        """Both moments of a parameter; zeros before the first step."""

    @abstractmethod
    def load(self, moments: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        """Take up the moments of all parameters, and how many steps they come from."""

    def recorded(self) -> AbstractContextManager[None]:
        """To be entered while a step is recorded for a replay."""
        return nullcontext()

    @torch.no_grad()
    def forget_(self, name: str, row_N: Tensor) -> None:
        """Set the moments of some rows of a parameter to 0."""
        for moment in self.moments(name).values():
            moment.index_fill_(0, row_N, 0)


class FusedAdam(Adam):
    """Moments like the parameters, by torch's kernel."""

    _KEYS: Mapping[str, str] = {"m": "exp_avg", "v": "exp_avg_sq"}

    def __init__(
        self, parameters: Mapping[str, Parameter], *, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(parameters, betas=betas, eps=eps)
        self._device = next(iter(parameters.values())).device
        self._fused = self._device.type in ("cpu", "cuda")
        # The fused kernels read the rate from a tensor, of float32 on a GPU.
        on_cpu = self._device.type == "cpu"
        self._lr = torch.zeros(
            (), dtype=torch.float64 if on_cpu else torch.float32, device=self._device
        )
        lr = self._lr if self._fused else 0.0
        self._optimizer = torch.optim.Adam(
            self.parameters.values(), lr=lr, betas=betas, eps=eps, fused=self._fused
        )

    def plan(self, lr: float, updates: int) -> None:
        if self._fused:
            self._lr.fill_(lr)
        else:
            self._optimizer.param_groups[0]["lr"] = lr

    @contextmanager
    def recorded(self) -> Iterator[None]:
        group = self._optimizer.param_groups[0]
        group["capturable"] = True  # of eager steps torch would ask what it is for
        try:
            yield
        finally:
            group["capturable"] = False

    def step(self) -> None:
        self._optimizer.step()

    def moments(self, name: str) -> Mapping[str, Tensor]:
        parameter = self.parameters[name]
        state = self._optimizer.state.get(parameter, {})
        return {
            moment: state.get(key, torch.zeros_like(parameter))
            for moment, key in self._KEYS.items()
        }

    def load(self, moments: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        counter = self._device if self._fused else torch.device("cpu")
        for name, parameter in self.parameters.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=counter),
                **{
                    key: torch.empty_like(parameter).copy_(moments[name][moment])
                    for moment, key in self._KEYS.items()
                },
            }


class Bfloat16Adam(Adam):
    """Moments in bfloat16, rounded stochastically; parameters and arithmetic in float32.

    To the nearest bfloat16, v would stay where it is: with beta2 = 0.999 a step changes it by a
    thousandth, and half a unit in its last place is two to four. An update uses moments before they
    are rounded. They are float32 in slabs, never as a whole.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        seed: int,
    ) -> None:
        """seed: of the rounding."""
        super().__init__(parameters, betas=betas, eps=eps)
        values = list(self.parameters.values())
        assert all(value.dtype == torch.float32 and value.is_contiguous() for value in values)
        self._seed, device = seed, values[0].device
        self._moments = {
            name: {moment: torch.zeros_like(value, dtype=torch.bfloat16) for moment in self.MOMENTS}
            for name, value in self.parameters.items()
        }
        # Elements are counted through all parameters, each of which begins with a block of its own.
        self._first_element, n_elements = {}, 0
        for name, value in self.parameters.items():
            self._first_element[name] = n_elements
            n_elements += -(-value.numel() // BLOCK) * BLOCK
        self._bits = CountedBits(n_elements, device)
        largest = max(value.numel() for value in values)
        slab = min(_SLAB_BLOCKS.get(device.type, 1) * BLOCK, largest)
        self._floats = [torch.empty(slab, dtype=torch.float32, device=device) for _ in range(3)]
        self._ints = [torch.empty(slab, dtype=torch.int32, device=device) for _ in range(2)]
        # -lr / (1 - beta1^t), and 1 / sqrt(1 - beta2^t)
        self._minus_rate, self._v_scale = (
            torch.zeros((), dtype=torch.float32, device=device) for _ in range(2)
        )

    def plan(self, lr: float, updates: int) -> None:
        done = updates + 1
        self._minus_rate.fill_(-lr / (1 - self.betas[0] ** done))
        self._v_scale.fill_(1 / math.sqrt(1 - self.betas[1] ** done))
        self._bits.key.fill_(as_int32(stream_key(self._seed, "moments", updates)))

    @torch.no_grad()
    def step(self) -> None:
        self._bits.start()
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            moments = (self._moments[name][moment].view(-1) for moment in self.MOMENTS)
            flat = (parameter.view(-1), parameter.grad.reshape(-1), *moments)
            for start, slab in self._slabs(parameter.numel()):
                self._step_slab(
                    *(values[slab] for values in flat), first=self._first_element[name] + start
                )

    def _slabs(self, n_elements: int) -> Iterator[tuple[int, slice]]:
        size = len(self._floats[0])
        for start in range(0, n_elements, size):
            yield start, slice(start, min(start + size, n_elements))

    def _step_slab(
        self,
        parameter_C: Tensor,
        gradient_C: Tensor,
        m_store_C: Tensor,
        v_store_C: Tensor,
        *,
        first: int,
    ) -> None:
        """first: the number of the slab's first element, among those of all parameters."""
        size = len(parameter_C)
        m_C, v_C, work_C = (buffer[:size] for buffer in self._floats)
        bits_C, half_C = (buffer[:size] for buffer in self._ints)
        beta1, beta2 = self.betas
        m_C.copy_(m_store_C).lerp_(gradient_C, 1 - beta1)
        v_C.copy_(v_store_C).mul_(beta2).addcmul_(gradient_C, gradient_C, value=1 - beta2)
        torch.sqrt(v_C, out=work_C).mul_(self._v_scale).add_(self.eps)
        torch.div(m_C, work_C, out=work_C)
        parameter_C.add_(work_C.mul_(self._minus_rate))
        self._bits.of(first, bits_C, half_C)
        round_into(m_store_C, m_C, low_half(bits_C, half_C))
        round_into(v_store_C, v_C, high_half(bits_C, half_C))

    def moments(self, name: str) -> Mapping[str, Tensor]:
        return self._moments[name]

    def load(self, moments: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        for name, own in self._moments.items():
            for moment, value in own.items():
                value.copy_(moments[name][moment])
