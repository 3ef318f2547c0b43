"""Our step is the textbook step, and the reference trainers', for 100 consecutive updates.

SAE_PIPE_GOLDEN: a folder of traces recorded from the reference trainers, CASE.npz for each case of
parity_cases.py; without it the tests that need them skip.
"""

# B rows, D d_in, S d_sae

import json
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_pipe.stages.fit import build_trainer
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.stages.trainer import Trainer

from .parity_cases import CASES, D_IN, D_SAE, Case, disagreement
from .textbook import TOPK_FAMILY, Textbook

TOLERANCE = 1e-9
REPORTED = ("loss", "l2", "l0", "grad_norm")
REPORTED_BY_TOPK = (*REPORTED, "aux", "dead", "threshold")

GOLDEN = Path(os.environ.get("SAE_PIPE_GOLDEN", "golden traces are not here"))
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="SAE_PIPE_GOLDEN names no folder of the reference trainers' traces"
)


def ours(case: Case, **changes: Any) -> Trainer:
    """Our trainer of a case, at its start. Skips what this version does not know."""
    options = case.fit_options | changes
    unknown = sorted(set(options) - {field.name for field in fields(FitConfig)})
    if case.arch not in ARCHITECTURES or unknown:
        pytest.skip(f"not in this version: {', '.join(unknown) or case.arch}")
    trainer = build_trainer(FitConfig(**options), D_IN)
    start = case.start()
    with torch.no_grad():
        for name, parameter in trainer.sae.named_parameters():
            parameter.copy_(start.pop(name))
    assert not start
    return trainer


def textbook(case: Case, **changes: Any) -> Textbook:
    return Textbook(replace(case.recipe, **changes), case.start())


@pytest.fixture(autouse=True)
def _float64_by_default() -> Iterator[None]:
    """Means of p_anneal's queue have torch's default type, as in the reference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def capture_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """A dict that each backward pass fills with gradients, before anything changes them."""
    caught: dict[str, Tensor] = {}
    for name, parameter in trainer.sae.named_parameters():

        def keep(leaf: Tensor, name: str = name) -> None:
            assert leaf.grad is not None
            caught[name] = leaf.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]
    return caught


def test_every_architecture_has_a_case() -> None:
    assert set(ARCHITECTURES) <= {case.arch for case in CASES.values()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hundred_updates_agree_with_the_textbook(case: Case) -> None:
    trainer, expected = ours(case), textbook(case)
    gradients = capture_gradients(trainer)
    reported = REPORTED_BY_TOPK if case.arch in TOPK_FAMILY else REPORTED
    for step, batch_BD in enumerate(case.batches()):
        values = trainer.step(batch_BD)
        their_values, their_gradients = expected.step(batch_BD)
        for name in reported:
            # The threshold is kept in float32.
            tolerance = 1e-6 if name == "threshold" else TOLERANCE
            assert disagreement(float(values[name]), their_values[name]) < tolerance, (step, name)
        for name, gradient in their_gradients.items():
            assert disagreement(gradients[name], gradient) < TOLERANCE, (step, name)
    state = trainer.state_dict()
    for name, parameter in trainer.sae.named_parameters():
        assert disagreement(parameter.detach(), expected.parameters[name]) < TOLERANCE, name
        for moment, theirs in zip("mv", expected.moments[name], strict=True):
            found = disagreement(state[f"adam_{moment}.{name}"], theirs)
            # Squared gradients are heavy-tailed: their largest entries carry most of the rounding.
            assert found < 10 * TOLERANCE, (name, moment)
    if case.arch in TOPK_FAMILY:
        assert torch.equal(state["tokens_since_fired"], expected.tokens_since_fired)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_goes_through_everything_that_its_recipe_has(case: Case) -> None:
    """What the textbook meets on the way; without it an agreement would mean little."""
    expected, recipe = textbook(case), case.recipe
    seen: dict[str, list[float]] = {}
    slopes = 0.0
    for batch_BD in case.batches():
        values, gradients = expected.step(batch_BD)
        for name, value in values.items():
            seen.setdefault(name, []).append(value)
        if "threshold" in gradients:
            slopes = max(slopes, float((gradients["threshold"] != 0).double().mean()))
    if recipe.grad_clip < float("inf"):
        assert max(seen["grad_norm"]) > recipe.grad_clip > min(seen["grad_norm"])
    if case.arch in TOPK_FAMILY:
        assert max(seen["dead"]) > 0 == min(seen["dead"])
        assert max(seen["aux"]) > 0
        assert -1 < float(expected.threshold) > 0
    if case.arch == "topk" and recipe.reference:
        assert min(seen["l0"]) < (recipe.k or 0), "no zero was kept"
    elif case.arch in TOPK_FAMILY:
        assert max(seen["dead"]) > recipe.k_aux or case.arch != "topk"  # more dead than k_aux
    else:
        assert len(set(seen["l0"])) > 50
    if case.arch == "p_anneal":
        assert expected.p == recipe.p_end
        assert expected.coefficient < recipe.sparsity / 1.5
    if case.arch == "jumprelu":
        assert slopes > 0.5
        below_half = case.start()["threshold"] < recipe.bandwidth / 2
        assert 0 < float(below_half.double().mean()) < 1


OPTIMISER = {
    "lr": 3.03e-3,
    "warmup_steps": 11,
    "decay_start": 0.81,
    "betas": (0.89, 0.999),
    "eps": 1e-6,
}
TOPK_CHANGES = {
    **OPTIMISER,
    "k": 4,
    "grad_clip": 0.9,
    "auxk_coefficient": 1 / 33,
    "k_aux": 7,
    "dead_after_tokens": 97,
    "threshold_start": 16,
    "threshold_beta": 0.91,
    "projection_eps": 0.0,
    "median_iterations": 2,
    "median_tolerance": 1e-2,
}
PENALTY_CHANGES = {**OPTIMISER, "sparsity": 0.101, "sparsity_warmup_steps": 21}
CHANGES: dict[str, dict[str, Any]] = {
    "topk": TOPK_CHANGES,
    "topk reference": {"reference": False},
    "batch_topk": TOPK_CHANGES | {"k_aux": 3},
    "matryoshka": TOPK_CHANGES | {"k_aux": 3, "group_weights": (0.21, 0.19, 0.2, 0.2, 0.2)},
    "matryoshka weights": {"group_weights": (0.5, 0.3, 0.2), "group_sizes": (6, 20, 38)},
    "relu unit": PENALTY_CHANGES | {"decoder_norm": "free", "grad_clip": 1.0},
    "relu resampled": {"resample_steps": 50, "warmup_steps": 6},
    "relu free": PENALTY_CHANGES
    | {"decoder_norm": "unit", "grad_clip": 1.1, "l1_norm_power": 2, "reference": True},
    "p_anneal": PENALTY_CHANGES
    | {
        "p_start": 0.99,
        "p_end": 0.69,
        "anneal_start": 26,
        "anneal_end": 88,
        "sparsity_updates": 6,
        "sparsity_queue": 9,
        "sparsity_norm": "lp_p",
    },
    "p_anneal lp_p": {"sparsity_queue": 9, "sparsity_norm": "lp"},
    "gated": PENALTY_CHANGES | {"betas": (0.01, 0.999), "grad_clip": 1.0},
    "jumprelu": PENALTY_CHANGES
    | {"k": 7, "bandwidth": 0.101, "grad_clip": 0.9, "projection_eps": 0.0, "reference": True},
    "jumprelu reference": {"bandwidth": 0.101, "reference": False},
}


@cache
def finished(name: str) -> Textbook:
    state = textbook(CASES[name])
    for batch_BD in CASES[name].batches():
        state.step(batch_BD)
    return state


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(name, *change) for name, changes in CHANGES.items() for change in changes.items()],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_case_notices_a_changed_constant(name: str, field: str, value: object) -> None:
    """So whoever agrees with the textbook has this constant, and uses it where the textbook does."""
    right, wrong = finished(name), textbook(CASES[name], **{field: value})
    for batch_BD in CASES[name].batches():
        wrong.step(batch_BD)
    found = [disagreement(wrong.threshold, right.threshold) / 1e3]  # float32
    found += [disagreement(wrong.parameters[n], value) for n, value in right.parameters.items()]
    assert max(found) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["relu unit", "p_anneal", "gated"])
def test_reference_changes_nothing_where_the_recipe_does_not_deviate(name: str) -> None:
    plain, reference = ours(CASES[name]), ours(CASES[name], reference=True)
    for batch_BD in CASES[name].batches()[:30]:
        plain.step(batch_BD)
        reference.step(batch_BD)
    for (parameter, value), theirs in zip(
        plain.sae.state_dict().items(), reference.sae.state_dict().values(), strict=True
    ):
        assert torch.equal(value, theirs), parameter


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_a_batch_without_firing_is_taken_as_the_recipe_says(name: str, reference: bool) -> None:
    case = CASES[name]
    trainer = ours(case, **({"reference": True} if reference else {}))
    expected = textbook(case, reference=reference)
    thresholds = []
    for step, batch_BD in enumerate(case.batches()[:60]):
        before = expected.parameters["b_enc"]
        if step == 50:
            with torch.no_grad():
                trainer.sae.b_enc.fill_(-100)
            expected.parameters["b_enc"] = torch.full_like(before, -100)
        values = trainer.step(batch_BD)
        theirs, _ = expected.step(batch_BD)
        thresholds.append(float(values["threshold"]))
        for key in REPORTED_BY_TOPK:
            assert disagreement(float(values[key]), theirs[key]) < 1e-6, (step, key)
        if step == 50:
            with torch.no_grad():
                trainer.sae.b_enc.copy_(before)
            expected.parameters["b_enc"] = before
    change = thresholds[50] / thresholds[49]
    assert change == pytest.approx(case.recipe.threshold_beta if reference else 1, abs=1e-6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parameters_start_as_the_recipe_says(arch: str) -> None:
    case = next(case for case in CASES.values() if case.arch == arch)
    trainer = build_trainer(FitConfig(**case.fit_options), D_IN)
    found = {name: value.detach() for name, value in trainer.sae.named_parameters()}
    w_enc, w_dec = found.pop("W_enc"), found.pop("W_dec")
    norm = 0.1 if arch in ("relu", "p_anneal") else 1.0
    torch.testing.assert_close(w_dec.norm(dim=1), torch.full_like(w_dec[:, 0], norm))
    assert torch.equal(w_enc, w_dec.T)
    assert w_dec.std() > 0.5 * norm / D_IN**0.5
    for name, value in found.items():
        assert value.shape == case.start()[name].shape
        start = 0.001 if name == "threshold" else 0.0
        torch.testing.assert_close(value, torch.full_like(value, start), msg=name)
    assert w_dec.shape == (D_SAE, D_IN)


@needs_golden
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hundred_updates_agree_with_the_golden_traces(
    case: Case, request: pytest.FixtureRequest
) -> None:
    file = GOLDEN / f"{request.node.callspec.id.replace(' ', '_')}.npz"
    if not file.is_file():
        pytest.skip(f"{file.name} was not recorded")
    trainer, golden = ours(case), np.load(file)
    assert json.loads(str(golden["fit_config"])) == json.loads(json.dumps(case.fit_options))
    losses, found = [], {}
    for step, batch_BD in enumerate(golden["batches"], start=1):
        losses.append(float(trainer.step(torch.from_numpy(batch_BD))["loss"]))
        if step in (1, 10, 100):
            for name, parameter in trainer.sae.named_parameters():
                key = f"step{step}/{name}"
                found[key] = disagreement(parameter.detach(), golden[key])
    found["loss"] = disagreement(losses, golden["losses"])
    assert {name: value for name, value in found.items() if not value < TOLERANCE} == {}
