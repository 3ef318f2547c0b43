"""Adam's moments in bfloat16: rounding without bias, bits that only seed, step and place decide."""

# S d_sae, D d_in

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from sae_pipe.stages.adam import Bfloat16Adam, FusedAdam
from sae_pipe.stages.fit import build_trainer, fit
from sae_pipe.stages.fit_memory import needed_bytes
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.rounding import BLOCK, CountedBits, as_int32, round_into
from sae_pipe.stages.rundir import RunFolder
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.stages.trainer import Trainer
from sae_pipe.storage import ActivationStore, InputError

from .parity_cases import CASES, D_IN, D_SAE, Case

CPU = torch.device("cpu")
FIRST_OF_ARCH = {case.arch: case for case in reversed(CASES.values())}


def bits(first: int, count: int, key: int, n_elements: int) -> Tensor:
    counted = CountedBits(n_elements, CPU)
    counted.key.fill_(as_int32(key))
    counted.start()
    found = torch.empty(count, dtype=torch.int32)
    counted.of(first, found, torch.empty_like(found))
    return found


def lowbias32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def test_bits_are_the_formula_of_the_module() -> None:
    n_elements, key, golden = 3 * BLOCK + 7, 0xDEADBEEF, np.uint32(0x9E3779B9)
    element = np.arange(n_elements, dtype=np.uint32)
    block, place = element // np.uint32(BLOCK), element % np.uint32(BLOCK)
    expected = lowbias32(lowbias32(np.uint32(key) + golden * block) + golden * place)
    np.testing.assert_array_equal(bits(0, n_elements, key, n_elements).view(torch.uint32), expected)
    from_second = bits(BLOCK, n_elements - BLOCK, key, n_elements)  # another slab, the same bits
    np.testing.assert_array_equal(from_second.view(torch.uint32), expected[BLOCK:])
    one = bits(0, 1, key, 1)
    np.testing.assert_array_equal(one.view(torch.uint32), expected[:1])


def test_bits_are_uniform_and_independent_of_place_and_step() -> None:
    n = 4 * BLOCK
    first, second = bits(0, n, 1, n), bits(0, n, 2, n)
    halves = [first & 0xFFFF, (first >> 16) & 0xFFFF, second & 0xFFFF]
    for half in halves:
        counts = np.bincount(half.numpy() >> 8, minlength=256)
        chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)
    numbers = [half.double() - 32767.5 for half in halves]
    shifted = [(numbers[0][:-1], numbers[0][1:]), (numbers[0][:-BLOCK], numbers[0][BLOCK:])]
    for one, other in [*shifted, (numbers[0], numbers[1]), (numbers[0], numbers[2])]:
        correlation = (one * other).mean() / (one.std() * other.std())
        assert abs(float(correlation)) < 5 / math.sqrt(n)


def rounded(values: Tensor, random16: Tensor) -> Tensor:
    target = torch.empty_like(values, dtype=torch.bfloat16)
    round_into(target, values.clone(), random16.clone())
    return target


@given(
    st.floats(allow_nan=False, width=32),
    st.integers(0, 0xFFFF),
)
def test_a_value_becomes_one_of_its_two_neighbours(value: float, random16: int) -> None:
    exact = torch.tensor([value])
    found = float(rounded(exact, torch.tensor([random16], dtype=torch.int32)))
    low = int(exact.view(torch.int32)) & ~0xFFFF  # towards 0
    towards_0 = float(torch.tensor([as_int32(low)], dtype=torch.int32).view(torch.float32))
    away = float(torch.tensor([as_int32(low + 0x10000)], dtype=torch.int32).view(torch.float32))
    assert found in ((value,) if value == towards_0 else (towards_0, away))
    # With all 65,536 numbers: away from 0 as often as the value lies towards it.
    share = (int(exact.view(torch.int32)) & 0xFFFF) / 0x10000
    everything = torch.arange(0x10000, dtype=torch.int32)
    ups = rounded(exact.expand(0x10000), everything) != towards_0
    assert float(ups.double().mean()) == share


def test_nan_stays_nan_and_zero_zero() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    found = rounded(values, torch.full((5,), 0xFFFF, dtype=torch.int32))
    assert found[0].isnan()
    assert torch.equal(found[1:], values[1:].bfloat16())


def of(parameters: dict[str, Parameter], seed: int, beta2: float = 0.999) -> Bfloat16Adam:
    return Bfloat16Adam(parameters, betas=(0.9, beta2), eps=1e-8, seed=seed)


def parameters_with_gradients(seed: int = 0) -> dict[str, Parameter]:
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"w": (70, 1000), "b": (70,)}
    parameters = {n: Parameter(torch.randn(s, generator=random)) for n, s in shapes.items()}
    for parameter in parameters.values():
        parameter.grad = 0.3 + torch.randn(parameter.shape, generator=random)
    return parameters


def test_the_mean_over_seeds_of_a_moment_approaches_its_exact_value() -> None:
    parameters, n_seeds = parameters_with_gradients(), 400
    sums = {moment: torch.zeros(70, 1000, dtype=torch.float64) for moment in Bfloat16Adam.MOMENTS}
    for seed in range(n_seeds):
        adam = of(parameters, seed)
        adam.plan(0.0, 0)
        adam.step()
        for moment, value in adam.moments("w").items():
            sums[moment] += value.double()
    gradient = parameters["w"].grad
    assert gradient is not None
    exact = {"m": 0.1 * gradient.double(), "v": 0.001 * gradient.double().square()}
    for moment, total in sums.items():
        unit = 2.0 ** (exact[moment].abs().log2().floor() - 7)  # in the last place of a bfloat16
        error = (total / n_seeds - exact[moment]) / unit
        # A draw has a deviation of at most half a unit; nearest rounding would be 0.29 off.
        assert float(error.abs().max()) < 6 * 0.5 / math.sqrt(n_seeds)
        assert abs(float(error.mean())) < 6 * 0.5 / math.sqrt(n_seeds * error.numel())


def test_v_moves_where_rounding_to_the_nearest_would_leave_it() -> None:
    parameter = Parameter(torch.zeros(1000))
    parameter.grad = torch.ones(1000)
    adam, nearest = of({"w": parameter}, 0), torch.tensor(0.0, dtype=torch.bfloat16)
    for step in range(3000):
        adam.plan(0.0, step)
        adam.step()
        nearest = (0.999 * nearest.float() + 0.001).bfloat16()
    exact = 1 - 0.999**3000
    assert float(adam.moments("w")["v"].double().mean()) == pytest.approx(exact, abs=2e-3)
    assert float(nearest) < 0.6 * exact


def test_an_update_is_that_of_full_moments_up_to_their_rounding() -> None:
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    low, full = of(ours, 3), FusedAdam(theirs, betas=(0.9, 0.999), eps=1e-8)
    before = ours["w"].detach().clone()
    for step in range(20):
        for adam in (low, full):
            adam.plan(1e-3, step)
            adam.step()
        for name, value in ours.items():
            # The first is exact: a moment is rounded after it is used.
            tolerance = 1e-7 if step == 0 else 1e-3 * 2**-6 * step
            torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=tolerance)
    assert float((ours["w"].detach() - before).abs().min()) > 0.015


def test_a_row_is_forgotten() -> None:
    adam = of(parameters_with_gradients(), 0)
    adam.plan(1e-3, 0)
    adam.step()
    adam.forget_("w", torch.tensor([3, 5]))
    for moment in adam.moments("w").values():
        assert torch.equal((moment == 0).all(dim=1).nonzero().squeeze(1), torch.tensor([3, 5]))


def trainer_of(case: Case, **changes: Any) -> Trainer:
    options = case.fit_options | {"dtype": "float32", "optimizer_state": "bfloat16"} | changes
    return build_trainer(FitConfig(**options), D_IN)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_run_that_was_taken_up_again_has_the_same_bits(arch: str) -> None:
    case = FIRST_OF_ARCH[arch]
    through, before = trainer_of(case), trainer_of(case)
    for step, batch_BD in enumerate(case.batches()[:60]):
        through.step(batch_BD)
        if step < 30:
            before.step(batch_BD)
    saved = {name: value.clone() for name, value in before.state_dict().items()}
    after = trainer_of(case, seed=0)
    after.load_state_dict(saved)
    for batch_BD in case.batches()[30:60]:
        after.step(batch_BD)
    for name, value in through.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name
        assert (value.dtype == torch.bfloat16) == name.startswith("adam_"), name


def test_threads_change_no_bit() -> None:
    parameters = [parameters_with_gradients(), parameters_with_gradients()]
    before = torch.get_num_threads()
    try:
        for threads, each in enumerate(parameters, start=1):
            torch.set_num_threads(threads)
            adam = of(each, 0)
            for step in range(3):
                adam.plan(1e-3, step)
                adam.step()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(parameters[0]["w"], parameters[1]["w"])


def test_another_seed_rounds_otherwise_and_float32_is_what_it_was() -> None:
    case = CASES["topk"]
    runs = [trainer_of(case), trainer_of(case, seed=1), trainer_of(case, optimizer_state="float32")]
    start = {name: value.clone() for name, value in runs[0].sae.state_dict().items()}
    for trainer in runs:
        trainer.sae.load_state_dict(start)
        for batch_BD in case.batches()[:10]:
            trainer.step(batch_BD)
    states = [trainer.state_dict() for trainer in runs]
    assert not torch.equal(states[0]["adam_v.W_dec"], states[1]["adam_v.W_dec"])
    assert states[2]["adam_v.W_dec"].dtype == torch.float32
    for state in states[:2]:
        torch.testing.assert_close(state["sae.W_dec"], states[2]["sae.W_dec"], rtol=0, atol=3e-3)


@pytest.mark.parametrize("arch", ["matryoshka", "gated"])
def test_it_explains_nearly_as_much_as_full_moments(
    small_store: ActivationStore, tmp_path: Path, arch: str
) -> None:
    found = {}
    for state in ("float32", "bfloat16"):
        config = FitConfig(
            arch=arch,
            k=3,
            d_sae=D_SAE,
            epochs=8,
            batch_size=128,
            lr=3e-3,
            device="cpu",
            optimizer_state=state,
        )
        found[state] = fit(small_store, config, tmp_path / state, show_progress=False)
    full, low = (found[state].explained_variance for state in ("float32", "bfloat16"))
    assert full is not None
    assert low is not None
    assert full > 0.3
    assert low == pytest.approx(full, abs=0.01)


def test_a_checkpoint_on_disk_has_bfloat16_moments(tmp_path: Path) -> None:
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        state = str(dtype).removeprefix("torch.")
        trainer, folder = (
            trainer_of(CASES["topk"], optimizer_state=state),
            RunFolder(tmp_path / state),
        )
        for batch_BD in CASES["topk"].batches()[:3]:
            trainer.step(batch_BD)
        folder.checkpoint_folder.mkdir(parents=True)
        folder.write_checkpoint(trainer.state_dict(), {"step": 3})
        saved = folder.read_checkpoint()
        assert saved is not None
        tensors = {n: value for n, value in saved[0].items() if n.startswith("adam_")}
        assert {value.dtype for value in tensors.values()} == {dtype}
        for name, value in tensors.items():
            assert torch.equal(value, trainer.state_dict()[name])
        sizes[state] = sum(value.nbytes for value in tensors.values())
    assert sizes["float32"] == 2 * sizes["bfloat16"]


def test_the_estimate_of_memory_counts_it() -> None:
    options: dict[str, Any] = {"arch": "topk", "k": 20, "d_sae": 65536, "tokens": 10**9}
    full = needed_bytes(FitConfig(**options), 768)
    low = needed_bytes(FitConfig(**options, optimizer_state="bfloat16"), 768)
    assert full - low == 2 * 2 * 2 * 768 * 65536


def test_it_is_refused_with_float64() -> None:
    with pytest.raises(
        InputError,
        match=r"^--optimizer-state bfloat16 saves memory, and --dtype float64 is for checks\. Leave "
        r"out one of them\.$",
    ):
        FitConfig(arch="topk", k=3, dtype="float64", optimizer_state="bfloat16")
    with pytest.raises(InputError, match=r"^Unknown optimizer state 'int8' for a fit: choose one"):
        FitConfig(arch="topk", k=3, optimizer_state="int8")
