"""FitConfig: what can never work is refused, and what was left open is resolved once."""

import re
from dataclasses import replace
from typing import Any

import pytest

from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.storage import InputError

CONFIG = FitConfig(arch="matryoshka", k=3, d_sae=64, epochs=4, batch_size=128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k": 64},
            (
                "--l0 64 must be smaller than --d-sae 64: an SAE that keeps every latent is not "
                "sparse. Pass a smaller --l0."
            ),
        ),
        ({"k": 0}, "--l0 must be at least 1, not 0."),
        ({"d_sae": 0}, "--d-sae must be at least 1, not 0."),
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0."),
        ({"d_sae": 2**63}, f"--d-sae must be below 2**63, not {2**63}."),
        ({"seed": -1}, "--seed is -1, and has to be from 0 to 2**63 - 1."),
        ({"seed": 2**63}, f"--seed is {2**63}, and has to be from 0 to 2**63 - 1."),
        ({"epochs": 1e308}, "--epochs must be above 0 and below 1e18, not 1e+308."),
        ({"epochs": None, "tokens": 10**400}, "--tokens must be below 2**63, not 1000"),
        ({"lr": -1.0}, "--lr must be above 0, not -1."),
        ({"lr": float("nan")}, "--lr must be above 0, not nan."),
        ({"decay_start": 1.5}, "--decay-start must be between 0 and 1, not 1.5."),
        ({"dtype": "int8"}, "Unknown dtype 'int8' for a fit: choose one of float32, tf32, "),
        (
            {"tokens": 5000},
            "--tokens and --epochs both say how long to train. Pass one of them.",
        ),
    ],
)
def test_a_config_that_can_never_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        replace(CONFIG, **changes)


def test_constants_left_open_are_those_of_the_reference() -> None:
    """The comparisons of test_sae_parity.py take them from here, on both sides."""
    config = FitConfig(arch="matryoshka", k=20)
    plan = replace(config, tokens=10_000_000).schedule()
    assert (plan.betas, config.eps, plan.grad_clip) == ((0.9, 0.999), 1e-8, 1.0)
    assert (config.auxk_coefficient, config.decay_start) == (1 / 32, 0.8)
    assert config.group_fractions == (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    assert (config.group_weights, config.k_anneal_steps, config.batch_size) == (None, None, 2048)


def test_open_schedule_values_are_the_reference_ones_on_long_runs() -> None:
    plan = FitConfig(arch="topk", k=20, tokens=500_000_000).schedule()
    assert (plan.steps, plan.warmup_steps, plan.threshold_start) == (244_140, 1000, 1000)
    assert (plan.decay_start_step, plan.dead_after_tokens) == (195_312, 10_000_000)
    assert (plan.lr, plan.threshold_beta) == (4e-4, 0.999)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 128, 2000])
def test_open_schedule_values_shrink_with_short_runs(steps: int) -> None:
    plan = FitConfig(arch="topk", k=20, tokens=2048 * steps).schedule()
    assert plan.warmup_steps <= steps / 20
    assert plan.threshold_start < steps / 2
    assert plan.threshold_beta == pytest.approx(max(0, 1 - 10 / steps))
    assert plan.dead_after_tokens <= max(1, plan.tokens / 5)
