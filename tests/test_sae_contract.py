"""What every architecture of the registry promises, and how a damaged run folder is refused.

# B rows, D d_in, S d_sae
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_pipe.stages.fit import build_trainer
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.sae import ARCHITECTURES, get_architecture, load_sae
from sae_pipe.stages.sae.auxk import (
    auxk_loss,
    by_entries,
    by_matrices,
    normalised_error,
    of_the_dead,
)
from sae_pipe.stages.sae.base import Sae
from sae_pipe.stages.sae.groups import group_sizes
from sae_pipe.stages.sae.initialise import geometric_median
from sae_pipe.stages.sae.ksparse import KSparse
from sae_pipe.stages.sae.schedule import annealed_k
from sae_pipe.stages.sae.weights import save_sae
from sae_pipe.stages.trainer import Trainer
from sae_pipe.storage import InputError, StoreError

D_IN, D_SAE, K = 12, 64, 4
K_SPARSE = [name for name, each in ARCHITECTURES.items() if each.recipe.keeps_k]
LED_TO_L0 = [name for name in ARCHITECTURES if name not in K_SPARSE]


def config_of(arch: str, **changes: Any) -> FitConfig:
    fields: dict[str, Any] = {
        "arch": arch,
        "k": K,
        "d_sae": D_SAE,
        "tokens": 60 * 128,
        "batch_size": 128,
        "lr": 3e-3,
        "threshold_beta": 0.8,
        "device": "cpu",
    }
    return FitConfig(**fields | changes)


def some_rows(n_rows: int, seed: int) -> Tensor:
    """Sparse sums of 30 directions around a mean that is not 0, of mean squared norm about 1."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(30, D_IN, generator=torch.Generator().manual_seed(99))
    active = torch.rand(n_rows, 30, generator=generator) < 0.1
    return (active * torch.rand(n_rows, 30, generator=generator) @ directions + 0.8) / 4


def trained(arch: str, steps: int = 60, **changes: Any) -> Trainer:
    trainer = build_trainer(config_of(arch, **changes), D_IN)
    for step in range(steps):
        trainer.step(some_rows(128, step))
    return trainer


@pytest.fixture(params=ARCHITECTURES, scope="module")
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=K_SPARSE, scope="module")
def k_sparse(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sae(arch: str) -> Sae:
    return trained(arch).sae.requires_grad_(False)


def of_topk_family(trainer: Trainer) -> KSparse:
    assert isinstance(trainer.sae, KSparse)
    return trainer.sae


def test_listing_the_architectures_does_not_import_torch() -> None:
    code = (
        "import sys; from sae_pipe.stages.sae import ARCHITECTURES; "
        "from sae_pipe.stages.metrics import METRICS; "
        "from sae_pipe.stages.fitconfig import FitConfig; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    message = f"Unknown architecture 'gru': choose one of {', '.join(sorted(ARCHITECTURES))}."
    with pytest.raises(InputError, match=re.escape(message)):
        get_architecture("gru")
    with pytest.raises(InputError, match=re.escape(message)):
        config_of("gru")


def test_encode_and_decode_have_the_promised_shapes(sae: Sae) -> None:
    x_BD = some_rows(10, 5)
    latents_BS = sae.encode(x_BD)
    assert latents_BS.shape == (10, D_SAE)
    assert sae.decode(latents_BS).shape == (10, D_IN)
    assert torch.equal(sae(x_BD), sae.decode(sae.encode(x_BD)))
    assert torch.equal(sae.encode(x_BD.view(2, 5, D_IN)), latents_BS.view(2, 5, D_SAE))
    shapes = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    assert shapes == dict(sae.parameter_shapes())
    expected = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    assert expected.items() <= shapes.items()
    assert (latents_BS >= 0).all()


def test_a_row_is_encoded_alike_alone_and_in_a_batch(sae: Sae) -> None:
    x_BD = some_rows(64, 6)
    together = sae.encode(x_BD)
    alone = torch.cat([sae.encode(row[None]) for row in x_BD])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_l0_is_what_was_asked_for(k_sparse: str) -> None:
    sae = trained(k_sparse).sae.requires_grad_(False)
    active_B = (sae.encode(some_rows(4096, 7)) > 0).sum(dim=1)
    # Per-row selection keeps k where k are positive; a threshold learnt in 30 steps comes near.
    tolerance = 0.01 if k_sparse == "topk" else 0.15
    assert float(active_B.float().mean()) == pytest.approx(K, rel=tolerance)
    assert k_sparse != "topk" or int(active_B.max()) == K


def test_training_keeps_k_latents_a_row_over_the_batch(k_sparse: str) -> None:
    trainer = build_trainer(config_of(k_sparse), D_IN)
    assert float(trainer.step(some_rows(128, 0))["l0"]) == K


@pytest.mark.parametrize("name", LED_TO_L0)
def test_the_coefficient_leads_to_the_l0_asked_for(name: str) -> None:
    """On rows that it was not fitted on, within 5 %."""
    n_steps = 1500
    # theta moves by steps of the learning rate, and the kernel sees what is as near as that.
    kernel = {"bandwidth": 0.03} if name == "jumprelu" else {}
    config = config_of(name, tokens=n_steps * 128, lr=3e-3, **kernel)
    trainer = build_trainer(config, D_IN)
    coefficients = [trainer.step(some_rows(128, step))["coefficient"] for step in range(n_steps)]
    active_B = (trainer.sae.encode(some_rows(20_000, 10**6)) > 0).sum(dim=1)
    assert float(active_B.float().mean()) == pytest.approx(K, rel=0.05)
    assert float(coefficients[-1]) != float(coefficients[n_steps // 5])


@pytest.mark.parametrize("name", LED_TO_L0)
def test_a_coefficient_that_is_given_stays(name: str) -> None:
    trainer = build_trainer(config_of(name, sparsity=0.07, sparsity_warmup_steps=4), D_IN)
    weights = [float(trainer.step(some_rows(128, step))["coefficient"]) for step in range(7)]
    assert weights == pytest.approx([0, 0.0175, 0.035, 0.0525, 0.07, 0.07, 0.07])


def test_other_widths_are_refused(sae: Sae) -> None:
    message = (
        "Activations have d_in=13, but the SAE expects 12. "
        "Pass activations of the model and layer that it was fitted on."
    )
    with pytest.raises(InputError, match=re.escape(message)):
        sae.encode(torch.zeros(2, 13))


def test_saving_and_loading_changes_nothing(sae: Sae, arch: str, tmp_path: Path) -> None:
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path, device="cpu")
    assert type(loaded) is get_architecture(arch)
    assert (loaded.k, loaded.options) == (sae.k, sae.options)
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x_BD = some_rows(50, 8)
    assert torch.equal(loaded.encode(x_BD), sae.encode(x_BD))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "sae.safetensors"]


def test_a_folded_sae_takes_raw_rows(arch: str) -> None:
    """With a factor that is a power of two, scaling is exact, so equality is."""
    sae, x_BD = trained(arch).sae.requires_grad_(False), some_rows(50, 9)
    latents_BS, x_hat_BD = sae.encode(x_BD), sae(x_BD)
    sae.fold_norm_factor_(8.0)
    assert torch.equal(sae.encode(8 * x_BD), 8 * latents_BS)
    assert torch.equal(sae(8 * x_BD), 8 * x_hat_BD)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_a_threshold_that_was_never_estimated_stays_recognisable_when_folded(
    k_sparse: str,
) -> None:
    sae = of_topk_family(build_trainer(config_of(k_sparse), D_IN))
    sae.fold_norm_factor_(8.0)
    assert float(sae.threshold) == -1


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_batchwise_architectures_cut_at_the_threshold(name: str) -> None:
    trainer = trained(name)
    sae, x_BD = of_topk_family(trainer).requires_grad_(False), some_rows(2000, 10)
    assert sae.is_ready
    latents_BS = sae.encode(x_BD)
    assert float(latents_BS[latents_BS > 0].min()) > float(sae.threshold) > 0
    candidates_BS = torch.relu((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc)
    smallest = float(candidates_BS[candidates_BS > 0].min())
    assert smallest < float(sae.threshold), "the cut was never tested"


def test_float64_is_float64_throughout(arch: str) -> None:
    sae = trained(arch, steps=3, dtype="float64").sae
    latents_BS = sae.encode(some_rows(4, 11))
    assert latents_BS.dtype == sae(some_rows(4, 11)).dtype == torch.float64


def test_the_callers_batch_is_left_alone(arch: str) -> None:
    trainer, batch = build_trainer(config_of(arch), D_IN), some_rows(128, 12)
    before = batch.clone()
    trainer.step(batch)
    assert torch.equal(batch, before)


def test_a_batch_in_which_nothing_fires_changes_neither_threshold_nor_sanity(
    k_sparse: str,
) -> None:
    trainer = trained(k_sparse, steps=45, threshold_start=20)
    sae = of_topk_family(trainer)
    threshold, b_enc = float(sae.threshold), sae.b_enc.detach().clone()
    assert threshold > 0
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    values = trainer.step(some_rows(128, 13))
    assert float(values["l0"]) == 0
    assert float(values["threshold"]) == threshold
    with torch.no_grad():
        sae.b_enc.copy_(b_enc)
    values = trainer.step(some_rows(128, 14))
    assert float(values["l0"]) == pytest.approx(K, rel=0.01)
    assert 0 < float(values["threshold"]) != threshold
    assert all(value.isfinite().all() for value in sae.state_dict().values())


def test_nothing_ever_firing_breaks_no_architecture(arch: str) -> None:
    trainer = build_trainer(config_of(arch, threshold_start=0), D_IN)
    bias = trainer.sae.b_gate if arch == "gated" else trainer.sae.b_enc
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.fill_(-100)
    for step in range(5):
        values = trainer.step(some_rows(128, step))
        assert float(values["l0"]) == 0
    assert all(value.isfinite().all() for value in trainer.state_dict().values())
    if isinstance(trainer.sae, KSparse):
        assert float(trainer.sae.threshold) == -1


def test_a_pass_that_is_only_looked_at_advances_nothing(arch: str) -> None:
    trainer = trained(arch, steps=45, threshold_start=20)
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    trainer.sae.training_pass(some_rows(128, 15))
    trainer.sae.encode(some_rows(128, 15))
    assert all(torch.equal(before[name], value) for name, value in trainer.state_dict().items())


def test_a_restored_trainer_goes_on_bit_for_bit(arch: str) -> None:
    changes: dict[str, Any] = {"dead_after_tokens": 256, "threshold_start": 20}
    straight = trained(arch, steps=60, **changes)
    first = trained(arch, steps=40, **changes)
    second = build_trainer(config_of(arch, seed=1, **changes), D_IN)
    second.load_state_dict(first.state_dict())
    for step in range(40, 60):
        second.step(some_rows(128, step))
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_restored_trainer_shares_no_memory_with_what_it_came_from(arch: str) -> None:
    state = trained(arch, steps=5).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    second = build_trainer(config_of(arch), D_IN)
    second.load_state_dict(state)
    second.step(some_rows(128, 5))
    assert all(torch.equal(before[name], value) for name, value in state.items())


def test_a_checkpoint_of_another_width_is_refused(arch: str) -> None:
    state = build_trainer(config_of(arch), D_IN).state_dict()
    message = (
        "The checkpoint has d_in=12, but the activations have 16. "
        "Pass the store that it was made from."
    )
    with pytest.raises(InputError, match=re.escape(message)):
        build_trainer(config_of(arch), 16).load_state_dict(state)


def test_low_precision_products_keep_float32_weights(arch: str) -> None:
    exact, rounded = trained(arch), trained(arch, dtype="bfloat16")
    assert rounded.sae.W_dec.dtype == torch.float32
    losses = [float(t.step(some_rows(128, 60))["l2"]) for t in (exact, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert not torch.equal(exact.sae.W_dec, rounded.sae.W_dec)


def test_k_is_annealed_from_d_in_after_the_first_update(k_sparse: str) -> None:
    trainer = build_trainer(config_of(k_sparse, k_anneal_steps=8), D_IN)
    kept = [trainer.step(some_rows(128, step))["k"] for step in range(11)]
    assert kept == [K, 12, 11, 10, 9, 8, 7, 6, 5, 4, 4]
    assert annealed_k(3, k=4, k_start=12, anneal_steps=8) == 9


@pytest.mark.parametrize("n_dead", [1, 5, 6, 7, 40, D_SAE])
@pytest.mark.parametrize("bias", [0.0, -1.5])  # many and few candidates: dense and sparse products
def test_auxk_on_the_dead_only_is_auxk_behind_a_mask(n_dead: int, bias: float) -> None:
    """A CPU takes the first way, a GPU the second or the third; k_aux is 6 here."""
    trainer = build_trainer(config_of("topk", dtype="float64"), D_IN)
    sae, random = trainer.sae, torch.Generator().manual_seed(n_dead)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(D_SAE, generator=random) * 0.3 + bias)
    x_BD = torch.randn(9, D_IN, generator=random).double() + 1
    dead_S = torch.randperm(D_SAE, generator=random) < n_dead
    passed, residual_BD = sae.training_pass(x_BD), torch.randn(9, D_IN, generator=random).double()
    results = []
    for x_hat_BD in (
        of_the_dead(sae, passed, dead_S.nonzero().squeeze(1), 6),
        by_entries(sae, passed, dead_S, 6),
        by_matrices(sae, passed, dead_S, 6),
    ):
        sae.zero_grad()
        loss = normalised_error(residual_BD, x_hat_BD, dead_S.any())
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
        results.append([loss.detach(), *(torch.zeros(1) if g is None else g for g in gradients)])
    for own, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, own, rtol=1e-12, atol=1e-15)
    assert results[0][0] > 0
    # The whole sum of kept candidates, written out.
    candidates_BS = torch.relu((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc).masked_fill(~dead_S, 0)
    top = candidates_BS.topk(6, dim=1)
    kept_BS = torch.zeros_like(candidates_BS).scatter(1, top.indices, top.values)
    error = (residual_BD - kept_BS @ sae.W_dec).square().sum(1).mean()
    variance = (residual_BD - residual_BD.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(results[0][0], (error / variance).detach())


def test_auxk_is_zero_without_dead_latents_or_without_variance() -> None:
    sae, x_BD = build_trainer(config_of("topk"), D_IN).sae, some_rows(6, 1)
    passed, residual_BD = sae.training_pass(x_BD), torch.randn(6, D_IN)
    dead_S = torch.ones(D_SAE, dtype=torch.bool)
    assert auxk_loss(sae, passed, residual_BD, ~dead_S, 6) == 0
    loss = auxk_loss(sae, passed, residual_BD[:1].expand(6, D_IN), dead_S, 6)
    assert loss == 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.isfinite().all()


def test_the_geometric_median_survives_rows_that_are_the_guess() -> None:
    same = torch.full((9, 3), 2.0)
    assert torch.equal(geometric_median(same), same[0])
    outlier = torch.cat([same, torch.tensor([[1e4, 0.0, 0.0]])])
    assert (geometric_median(outlier) - same[0]).norm() < 1e-3


def test_group_sizes_are_the_reference_ones() -> None:
    fractions = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    assert group_sizes(fractions, 4096) == (128, 256, 512, 1024, 2176)
    assert group_sizes((0.3, 0.3, 0.4), 11) == (3, 3, 5)


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        (
            (0.5, 0.4),
            (
                "The group fractions (0.5, 0.4) must be positive and add up to 1, not 0.9. "
                "Pass one share of the latents for each group."
            ),
        ),
        (
            (0.01, 0.99),
            (
                "The group fractions (0.01, 0.99) leave group 1 without a latent at --d-sae 64. "
                "Pass a larger --d-sae or fewer groups."
            ),
        ),
    ],
)
def test_wrong_group_fractions_are_refused(fractions: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        config_of("matryoshka", group_fractions=fractions)


def damaged_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_damaged_runs_are_refused_in_one_sentence(tmp_path: Path) -> None:
    run, weights = tmp_path / "run", tmp_path / "run" / "sae.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(StoreError, match=re.escape(message)) as caught:
            load_sae(run)
        assert "\n" not in str(caught.value)

    refused(f"There is no run at {run}: it has no config.json. Pass the folder that `sae-pipe fit")
    sae = build_trainer(config_of("topk"), D_IN).sae
    run.mkdir()
    save_sae(sae, run)
    good = load_file(weights)

    save_file({**good, "W_enc": good["W_enc"].T.contiguous()}, weights)
    refused(f"{weights} holds W_enc as torch.float32 (64, 12), but config.json asks for float32")
    save_file({**good, "b_dec": good["b_dec"].half()}, weights)
    refused(f"{weights} holds b_dec as torch.float16 (12,), but config.json asks for float32 (12,)")
    save_file({**good, "b_dec": good["b_dec"] / 0}, weights)
    refused(f"{weights} holds NaN or Inf in b_dec. Fit the run again.")
    save_file({name: good[name] for name in good if name != "b_enc"}, weights)
    refused(f"{weights} does not hold the tensors of its architecture: b_enc should not be there")
    weights.write_bytes(weights.read_bytes()[:100])
    refused(f"{weights} is damaged: it is not a safetensors file")
    weights.unlink()
    refused(f"Run {run} has no weights: the fit is not finished.")

    save_sae(sae, run)
    section = json.loads((run / "config.json").read_text())["sae"]
    damaged_config(run, sae=section | {"architecture": "gru"})
    refused(f"Run {run} cannot be loaded: config.json describes no SAE (Unknown architecture 'gru'")
    damaged_config(run, sae=section | {"d_sae": 10**18})
    refused(f"Run {run} cannot be loaded: config.json describes no SAE (sizes [")
    damaged_config(run, sae=section | {"d_sae": 10**9})  # refused before memory is taken
    refused(f"{weights} holds W_enc as torch.float32 (12, 64)")
    damaged_config(run, sae=section | {"d_sae": "64"})
    refused(f"Run {run} cannot be loaded: config.json describes no SAE (sizes [12, '64', 4])")
    damaged_config(run, format_version=2)
    refused(f"Run {run} has format version 2, and this sae-pipe reads up to 1. Upgrade it")
    damaged_config(run, format="other")
    refused(f"{run} is not a run: config.json does not name the format 'sae-pipe run'.")
    (run / "config.json").write_text("{")
    refused(f"{run / 'config.json'} is damaged: it is not JSON")
