"""Our step is the textbook step, and the reference trainer's, for 100 consecutive updates.

# B rows, D d_in, S d_sae
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_pipe.stages.fit import build_trainer
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.stages.trainer import Trainer

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
TRACES = {"topk": "topk.f64.npz", "matryoshka": "matryoshka_nodead.f64.npz"}

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the recorded traces of the reference trainers are not here"
)


def disagreement(ours: Any, theirs: Any) -> float:
    """max |difference| over the root mean square of what is expected."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    scale = np.sqrt((theirs**2).mean())
    return float(np.abs(ours - theirs).max() / (scale if scale > 0 else 1))


def golden_config(meta: dict[str, Any], arch: str, dtype: str) -> FitConfig:
    arguments = meta["kwargs"]
    return FitConfig(
        arch=arch,
        k=arguments["k"],
        d_sae=arguments["dict_size"],
        tokens=arguments["steps"] * 256,
        batch_size=256,
        lr=arguments["lr"],
        warmup_steps=arguments["warmup_steps"],
        decay_start=arguments["decay_start"] / arguments["steps"],
        auxk_coefficient=arguments["auxk_alpha"],
        threshold_start=arguments["threshold_start_step"],
        threshold_beta=arguments["threshold_beta"],
        dead_after_tokens=meta["overrides"].get("dead_feature_threshold", 10_000_000),
        device="cpu",
        dtype=dtype,
    )


@needs_golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("arch", TRACES)
def test_a_hundred_updates_agree_with_the_reference_trainer(arch: str, dtype: str) -> None:
    golden = np.load(GOLDEN / TRACES[arch])
    batches = np.load(GOLDEN / "batches.npy")
    torch_dtype = getattr(torch, dtype)
    trainer = build_trainer(golden_config(json.loads(str(golden["meta"])), arch, dtype), 32)
    start = {name: torch.from_numpy(golden[f"init/{name}"]).to(torch_dtype) for name in PARAMETERS}
    trainer.sae.load_state_dict(start)

    found: dict[str, float] = {}
    values = []
    for i, batch in enumerate(batches, start=1):
        step = trainer.step(torch.from_numpy(batch).to(torch_dtype))
        values.append({name: float(value) for name, value in step.items()})
        if i in (1, 10, 100):
            for name, value in trainer.sae.state_dict().items():
                found[f"s{i:04d}/{name}"] = disagreement(value, golden[f"s{i:04d}/{name}"])
    theirs = {"grad_norm": "gradnorm", "threshold": "thr", "dead": "n_dead"}
    for name in ("loss", "aux", "l0", "k", "lr", *theirs):
        found[name] = disagreement([v[name] for v in values], golden[theirs.get(name, name)])
    with torch.no_grad():
        latents = trainer.sae.encode(torch.from_numpy(golden["probe/x"]).to(torch_dtype))
        found["probe/f"] = disagreement(latents, golden["probe/f"])
        found["probe/xhat"] = disagreement(trainer.sae.decode(latents), golden["probe/xhat"])
    tolerance = 1e-9 if dtype == "float64" else 1e-5
    assert {name: value for name, value in found.items() if not value < tolerance} == {}

    state = trainer.state_dict()
    moments = {
        f"adam_{moment}.{name}": disagreement(
            state[f"adam_{moment}.{name}"], golden[f"s0100/adam_{moment}.{name}"]
        )
        for moment in "mv"
        for name in PARAMETERS
    }
    # Squared gradients are heavy-tailed: an entry of 100 rms carries 100 times the rounding.
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    assert {name: value for name, value in moments.items() if not value < tolerance} == {}


@dataclass
class Textbook:
    """The recipe written out once more: dense float64, plain autograd, Adam by its formulas."""

    config: FitConfig
    parameters: dict[str, Tensor]
    group_sizes: tuple[int, ...]
    steps: int = 0
    threshold: float = -1.0
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    since_fired: Tensor = field(default_factory=lambda: torch.zeros(0))

    def loss(self, x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Loss, l2, aux and the number of dead latents; advances threshold and counters."""
        config, n_rows = self.config, len(x)
        acts = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        if config.arch == "topk":
            limit = acts.detach().sort(dim=1, descending=True).values[:, config.k - 1 : config.k]
        else:
            limit = acts.detach().flatten().sort(descending=True).values[config.k * n_rows - 1]
        f = torch.where(acts >= limit, acts, torch.zeros_like(acts))
        if config.arch == "matryoshka":
            ends = np.cumsum(self.group_sizes)
            prefixes = [p["b_dec"] + f[:, :end] @ p["W_dec"][:end] for end in ends]
            errors = [((x - prefix) ** 2).sum(1).mean() for prefix in prefixes]
            l2, x_hat = sum(errors, x.new_zeros(())) / len(ends) ** 2, prefixes[-1]
        else:
            x_hat = p["b_dec"] + f @ p["W_dec"]
            l2 = ((x - x_hat) ** 2).sum(1).mean()
        self._observe(f.detach())
        dead = (self.since_fired >= (config.dead_after_tokens or 0)).nonzero()[:, 0].tolist()
        aux = self._aux((x - x_hat).detach(), acts, dead, p["W_dec"])
        return l2 + config.auxk_coefficient * aux, l2, aux, len(dead)

    def _observe(self, f: Tensor) -> None:
        smallest = f.masked_fill(f <= 0, torch.inf)
        if self.config.arch == "topk":
            sample = smallest.min(dim=1).values.float().mean()
        else:
            sample = smallest.min().float()
        beta = self.config.threshold_beta or 0
        if self.steps > (self.config.threshold_start or 0):
            old = torch.tensor(self.threshold, dtype=torch.float32)
            self.threshold = float(sample if old < 0 else beta * old + (1 - beta) * sample)
        self.since_fired = torch.where((f > 0).any(0), 0, self.since_fired + len(f))

    def _aux(self, residual: Tensor, acts: Tensor, dead: list[int], w_dec: Tensor) -> Tensor:
        if not dead:
            return residual.new_zeros(())
        k_aux = min(residual.shape[1] // 2, len(dead))
        of_dead = acts[:, dead]
        order = of_dead.detach().argsort(dim=1, descending=True)[:, :k_aux]
        kept = torch.zeros_like(of_dead).scatter(1, order, of_dead.gather(1, order))
        error = ((residual - kept @ w_dec[dead]) ** 2).sum(1).mean()
        return error / ((residual - residual.mean(0)) ** 2).sum(1).mean()

    def step(self, x: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One update; the step's values, and the gradients before projection and clipping."""
        if self.steps == 0:
            self.parameters["b_dec"] = weiszfeld(x)
        leaves = {n: v.clone().requires_grad_() for n, v in self.parameters.items()}
        loss, l2, aux, n_dead = self.loss(x, leaves)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        raw = {name: value.clone() for name, value in gradients.items()}
        rows = self.parameters["W_dec"] / (self.parameters["W_dec"].norm(dim=1)[:, None] + 1e-6)
        along = (gradients["W_dec"] * rows).sum(1)[:, None]
        gradients["W_dec"] = gradients["W_dec"] - along * rows
        norm = sum((g**2).sum() for g in gradients.values()) ** 0.5
        for name, gradient in gradients.items():
            self._adam(name, gradient * min(1.0, self.config.grad_clip / (float(norm) + 1e-6)))
        w_dec = self.parameters["W_dec"]
        self.parameters["W_dec"] = w_dec / (w_dec.norm(dim=1)[:, None] + 2.0**-52)
        self.steps += 1
        losses = {"loss": loss.detach(), "l2": l2.detach(), "aux": aux.detach()}
        return losses | {"dead": n_dead, "grad_norm": norm, "threshold": self.threshold}, raw

    def _adam(self, name: str, gradient: Tensor) -> None:
        (beta1, beta2), t = self.config.betas, self.steps + 1
        m, v = self.moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        self.moments[name] = m, v
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + self.config.eps)
        self.parameters[name] = self.parameters[name] - self._lr() * update

    def _lr(self) -> float:
        warmup, steps, lr = self.config.warmup_steps or 0, 100, self.config.lr or 0
        decay = int(self.config.decay_start * steps)
        if self.steps < warmup:
            return lr * self.steps / warmup
        return lr * ((steps - self.steps) / (steps - decay) if self.steps >= decay else 1)


def weiszfeld(x: Tensor) -> Tensor:
    guess = x.mean(0)
    for _ in range(100):
        weight = 1 / (x - guess).norm(dim=1)
        new = (weight[:, None] * x).sum(0) / weight.sum()
        moved, guess = float((new - guess).norm()), new
        if moved < 1e-5:
            break
    return guess


def textbook_pair(arch: str) -> tuple[Trainer, Textbook, Iterator[Tensor]]:
    """A trainer and the textbook, from the same weights, with latents that die and revive."""
    config = FitConfig(
        arch=arch,
        k=3,
        d_sae=64,
        tokens=100 * 48,
        batch_size=48,
        lr=3e-3,
        betas=(0.9, 0.999),
        warmup_steps=10,
        threshold_start=15,
        threshold_beta=0.9,
        dead_after_tokens=96,
        device="cpu",
        dtype="float64",
        grad_clip=0.15 if arch == "matryoshka" else 0.6,  # clips some steps and not others
    )
    trainer = build_trainer(config, 16)
    with torch.no_grad():
        trainer.sae.b_enc[40:] = -0.3
    start = {name: value.detach().clone() for name, value in trainer.sae.named_parameters()}
    sizes = getattr(trainer.sae, "group_sizes", ())
    textbook = Textbook(config, start, sizes, since_fired=torch.zeros(64))
    random = np.random.default_rng(1)

    def batches() -> Iterator[Tensor]:
        directions: NDArray[np.float64] = random.standard_normal((40, 16))
        while True:
            active = (random.random((48, 40)) < 0.1) * random.exponential(1, (48, 40))
            yield torch.from_numpy((active @ directions + 1.5) / 7)

    return trainer, textbook, batches()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_hundred_updates_agree_with_a_plain_dense_implementation(arch: str) -> None:
    trainer, textbook, batches = textbook_pair(arch)
    gradients = capture_gradients(trainer)
    seen: dict[str, list[float]] = {"dead": [], "aux": [], "grad_norm": []}
    for step, batch in zip(range(100), batches, strict=False):
        ours = trainer.step(batch)
        theirs, expected = textbook.step(batch)
        for name, value in theirs.items():
            tolerance = 1e-6 if name == "threshold" else 1e-9  # kept in float32
            assert disagreement(float(ours[name]), float(value)) < tolerance, (step, name)
        for name, value in expected.items():
            assert disagreement(gradients[name], value) < 1e-9, (step, name)
        for name, values in seen.items():
            values.append(float(ours[name]))
    for name, parameter in trainer.sae.named_parameters():
        assert disagreement(parameter.detach(), textbook.parameters[name]) < 1e-9, name
    # The comparison means something only if all of the recipe was exercised.
    assert max(seen["dead"]) > 8 > min(seen["dead"])  # more and fewer than k_aux = D / 2
    assert max(seen["aux"]) > 0
    assert max(seen["grad_norm"]) > textbook.config.grad_clip > min(seen["grad_norm"])


def capture_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """A dict that each backward pass fills with gradients, before anything changes them."""
    caught: dict[str, Tensor] = {}
    for name, parameter in trainer.sae.named_parameters():

        def keep(leaf: Tensor, name: str = name) -> None:
            assert leaf.grad is not None
            caught[name] = leaf.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]
    return caught


@pytest.mark.parametrize(
    "change",
    [{"auxk_coefficient": 0.0}, {"lr": 3.03e-3}, {"warmup_steps": 11}, {"decay_start": 0.25}],
    ids=str,
)
def test_the_comparison_notices_a_changed_constant(change: dict[str, Any]) -> None:
    trainer, textbook, batches = textbook_pair("matryoshka")
    textbook.config = replace(textbook.config, **change)
    for _, batch in zip(range(30), batches, strict=False):
        trainer.step(batch)
        textbook.step(batch)
    w_enc = trainer.sae.W_enc.detach()
    assert disagreement(w_enc, textbook.parameters["W_enc"]) > 1e-5
