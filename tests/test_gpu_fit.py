"""Fits on a GPU against their CPU twins. Only adds: test_gpu_path_on_cpu.py has the same without one."""

# B rows, D d_in, S d_sae

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_pipe.stages.fit import fit, fit_many
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.rounding import BLOCK, CountedBits, as_int32
from sae_pipe.stages.sae import load_sae
from sae_pipe.stages.trainer import Trainer
from sae_pipe.storage import ActivationStore

from .gpu_cases import ALL_CASES, FIRST_OF_ARCH, VARIANTS, trainer_of
from .parity_cases import BATCH, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
of_every_case = pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": "float32"}
STEPS = 60


def stepped(
    trainer: Trainer, batches: list[Tensor], *, waits_from: int | None = None
) -> list[float]:
    """The loss of each step. waits_from: the first step that may not wait for the device."""
    losses = []
    for step, batch_BD in enumerate(batches):
        moved_BD = batch_BD.to(trainer.device)
        watched = waits_from is not None and step >= waits_from
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            losses.append(trainer.step(moved_BD)["loss"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [float(loss) for loss in losses]


def assert_equal_states(one: Trainer, other: Trainer) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@of_every_case
def test_steps_never_wait_and_agree_with_the_cpu(case: Case) -> None:
    if case.options.get("resample_steps"):
        pytest.skip(
            "a resampling counts the dead, and draws rows by errors that differ in the last bit"
        )
    batches = case.batches()[:STEPS]
    on_cpu, on_gpu = trainer_of(case), trainer_of(case, device="cuda", capture=False)  # float64
    expected = stepped(on_cpu, batches)
    # The first makes what lasts: Adam's state, tables of the architecture. A GPU's Adam reads the
    # learning rate from a float32.
    assert stepped(on_gpu, batches, waits_from=1) == pytest.approx(expected, rel=1e-6)
    for name, value in on_cpu.state_dict().items():
        theirs = on_gpu.state_dict()[name].cpu()
        torch.testing.assert_close(theirs, value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("arch", FIRST_OF_ARCH)
def test_float32_steps_agree_with_those_of_the_cpu(arch: str) -> None:
    case = FIRST_OF_ARCH[arch]
    batches = case.batches()[
        :20
    ]  # before an entry that is kept here and not there has consequences
    expected = stepped(trainer_of(case, dtype="float32"), batches)
    assert stepped(trainer_of(case, **ON_GPU), batches) == pytest.approx(expected, rel=1e-3)


@of_every_case
def test_captured_steps_give_the_bits_of_eager_ones(case: Case) -> None:
    batches = case.batches()[:STEPS]
    eager, captured = trainer_of(case, **ON_GPU, capture=False), trainer_of(case, **ON_GPU)
    assert stepped(captured, batches) == stepped(eager, batches)
    assert_equal_states(captured, eager)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", FIRST_OF_ARCH)
def test_captured_steps_of_every_type_do_so_too(arch: str, variant: str) -> None:
    case = FIRST_OF_ARCH[arch]
    options = VARIANTS[variant] | {"device": "cuda"}
    eager, captured = trainer_of(case, **options, capture=False), trainer_of(case, **options)
    batches = case.batches()[:STEPS]
    assert stepped(captured, batches) == stepped(eager, batches)
    assert captured.captured is not None
    assert captured.captured.is_recorded or arch == "p_anneal"
    assert_equal_states(captured, eager)


def test_a_recorded_step_does_not_wait() -> None:
    case = FIRST_OF_ARCH["matryoshka"]
    trainer = trainer_of(case, **ON_GPU, threshold_start=0, dead_after_tokens=BATCH)
    stepped(trainer, case.batches()[:8])
    assert trainer.captured is not None
    assert trainer.captured.is_recorded
    stepped(trainer, case.batches()[8:30], waits_from=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", FIRST_OF_ARCH)
def test_a_run_that_was_taken_up_again_has_the_same_bits(arch: str, variant: str) -> None:
    case, options = FIRST_OF_ARCH[arch], VARIANTS[variant] | {"device": "cuda"}
    through, before, after = (trainer_of(case, **options) for _ in range(3))
    batches = case.batches()[:STEPS]
    stepped(through, batches)
    stepped(before, batches[:30])
    after.load_state_dict({name: value.cpu() for name, value in before.state_dict().items()})
    stepped(after, batches[30:])
    assert_equal_states(after, through)


@pytest.mark.parametrize("arch", FIRST_OF_ARCH)
def test_bfloat16_products_keep_float32_weights_and_nearly_the_loss(arch: str) -> None:
    case = FIRST_OF_ARCH[arch]
    batches = case.batches()[:STEPS]
    exact, low = trainer_of(case, **ON_GPU), trainer_of(case, device="cuda", dtype="bfloat16")
    losses = [stepped(trainer, batches) for trainer in (exact, low)]
    assert {value.dtype for value in low.sae.parameters()} == {torch.float32}
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.1)
    assert losses[0] != losses[1]


def test_random_bits_are_those_of_the_cpu() -> None:
    n_elements, found = 5 * BLOCK + 3, []
    for device in (torch.device("cpu"), torch.device("cuda")):
        counted = CountedBits(n_elements, device)
        counted.key.fill_(as_int32(0x12345678))
        counted.start()
        bits = torch.empty(n_elements, dtype=torch.int32, device=device)
        counted.of(0, bits, torch.empty_like(bits))
        found.append(bits.cpu())
    assert torch.equal(*found)


def test_steps_go_on_where_a_capture_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def look(leaf: Tensor) -> None:
        assert leaf.grad is not None
        assert not leaf.grad.isnan().any()  # asks, which no capture allows

    case = FIRST_OF_ARCH["topk"]
    eager, other = trainer_of(case, **ON_GPU, capture=False), trainer_of(case, **ON_GPU)
    for trainer in (eager, other):
        trainer.sae.b_dec.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    batches = case.batches()[:30]
    assert stepped(other, batches) == stepped(eager, batches)
    assert_equal_states(other, eager)
    assert capsys.readouterr().err.startswith("Steps are not captured, and so take longer: ")
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    # Another trainer's capture is none the worse for it.
    third = trainer_of(case, **ON_GPU)
    stepped(third, batches)
    assert third.captured is not None
    assert third.captured.is_recorded


def test_saes_fitted_together_have_the_weights_of_each_alone(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    configs = [
        FitConfig(arch=arch, k=3, d_sae=64, epochs=2, batch_size=128, device="cuda")
        for arch in FIRST_OF_ARCH
    ]
    together = [tmp_path / f"together-{config.arch}" for config in configs]
    outcomes = fit_many(small_store, configs, together, show_progress=False)
    assert [outcome.error for outcome in outcomes] == [None] * len(configs)
    for config, folder in zip(configs, together, strict=True):
        alone = tmp_path / f"alone-{config.arch}"
        fit(small_store, config, alone, show_progress=False)
        theirs = load_sae(alone).state_dict()
        for name, value in load_sae(folder).state_dict().items():
            assert torch.equal(value, theirs[name]), (config.arch, name)
