"""One training step of every architecture, written out plainly: dense, float64, plain autograd.

What the fast implementation is judged by. Nothing here is shared with it, nothing is fast, and
every formula stands beside its source:

    topk          Gao et al. 2024, arXiv 2406.04093: eq. 1 (encoder), section 2.3 (TopK), appendix A
                  (training), A.2 (AuxK)
    batch_topk    Bussmann et al. 2024, arXiv 2412.06410: section 3 (selection, threshold)
    matryoshka    Bussmann et al. 2025, arXiv 2503.17547: section 3 (nested prefixes)
    relu, unit    Bricken et al. 2023, "Towards Monosemanticity", appendix "Autoencoder training"
    relu, free    Anthropic, "Circuits updates - April 2024", "Training SAEs"
    gated         Rajamanoharan et al. 2024, arXiv 2404.16014: eq. 6 (encoder), eq. 8 (loss)
    jumprelu      Rajamanoharan et al. 2024, arXiv 2407.14435: eq. 3 (activation), 11 and 12
                  (pseudo-derivatives); the loss with a target L0 is a variation of theirs
    p_anneal      Karvonen et al. 2024, arXiv 2408.00113: section 4 (Lp norm, coefficient)

Numbers of sections and equations are from memory. Constants and the order of operations are those of
the public dictionary_learning trainers (docs/recipes.md), which this file was checked against for 100
updates. `reference` asks for what those trainers do where the recipe deviates from them.
"""

# B rows, D d_in, S d_sae, K kept

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Tensor]

TOPK_FAMILY = ("topk", "batch_topk", "matryoshka")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every constant of a step. Names are FitConfig's where it has them, and mean the same."""

    arch: str
    steps: int
    lr: float
    k: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = math.inf
    warmup_steps: int = 0
    decay_start: float = 1.0

    # topk, batch_topk, matryoshka
    auxk_coefficient: float = 1 / 32
    k_aux: int = 0
    dead_after_tokens: int = 10_000_000
    threshold_start: int = 1000
    threshold_beta: float = 0.999
    group_sizes: tuple[int, ...] = ()
    group_weights: tuple[float, ...] = ()

    # relu, gated, p_anneal, jumprelu
    sparsity: float = 0.0
    sparsity_warmup_steps: int = 0
    decoder_norm: str = "unit"
    resample_steps: int | None = None
    bandwidth: float = 0.001
    p_start: float = 1.0
    p_end: float = 0.2
    anneal_start: int = 0
    anneal_end: int = 0
    sparsity_updates: int = 10
    sparsity_queue: int = 10
    sparsity_norm: str = "lp"

    reference: bool = False
    l1_norm_power: int = 1  # 2: what dictionary_learning's AutoEncoderNew makes of the free variant

    # not options of FitConfig
    projection_eps: float = 1e-6
    median_iterations: int = 100
    median_tolerance: float = 1e-5


@dataclass
class Textbook:
    """Parameters and all other state of a fit; `step` makes one update."""

    recipe: Recipe
    parameters: Parameters
    steps: int = 0
    threshold: Tensor = field(default_factory=lambda: torch.tensor(-1.0, dtype=torch.float32))
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tokens_since_fired: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    steps_since_fired: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    p: float = 0.0
    next_p: float | None = None
    coefficient: float = 0.0
    updates_of_p: int = 0
    norms: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        d_sae = self.parameters["W_dec"].shape[0]
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.steps_since_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.p, self.coefficient = self.recipe.p_start, self.recipe.sparsity

    def step(self, x_BD: Tensor) -> tuple[dict[str, float], Parameters]:
        """One update; the step's values, and the gradients as backward left them."""
        recipe = self.recipe
        if self.steps == 0 and recipe.arch in TOPK_FAMILY:
            self.parameters["b_dec"] = geometric_median(x_BD, recipe)
        leaves = {n: v.detach().clone().requires_grad_() for n, v in self.parameters.items()}
        loss, values = LOSSES[recipe.arch](self, x_BD, leaves)
        raw = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

        gradients = dict(raw)
        unit_rows = recipe.decoder_norm == "unit"
        # Two families of trainers: one guards its divisions by a row's norm, one does not.
        guarded = recipe.arch in (*TOPK_FAMILY, "jumprelu")
        if unit_rows:
            eps = recipe.projection_eps if guarded else 0.0
            gradients["W_dec"] = without_parallel_part(raw["W_dec"], self.parameters["W_dec"], eps)
        norm = total_norm(gradients.values())
        shrink = min(1.0, recipe.grad_clip / (norm + 1e-6))
        for name, gradient in gradients.items():
            self.adam(name, shrink * gradient)
        if unit_rows:
            eps = torch.finfo(x_BD.dtype).eps if guarded else 0.0
            norms_S = self.parameters["W_dec"].norm(dim=1, keepdim=True)
            self.parameters["W_dec"] = self.parameters["W_dec"] / (norms_S + eps)
        if recipe.resample_steps is not None and self.steps % recipe.resample_steps == 0:
            self.resample(x_BD, self.steps_since_fired > recipe.resample_steps / 2)
        self.steps += 1
        values |= {"loss": loss, "grad_norm": norm, "threshold": self.threshold}
        return {name: number(value) for name, value in values.items()}, raw

    def adam(self, name: str, gradient: Tensor) -> None:
        """Kingma and Ba 2015, arXiv 1412.6980, algorithm 1."""
        (beta1, beta2), t = self.recipe.betas, self.steps + 1
        m, v = self.moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        self.moments[name] = m, v
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + self.recipe.eps)
        self.parameters[name] = self.parameters[name] - self.lr() * update

    def lr(self) -> float:
        """step / warm-up up to 1, constant, then to 0 from decay_start; from 0 after resampling."""
        recipe, step = self.recipe, self.steps
        if recipe.resample_steps is not None:
            return recipe.lr * min(step % recipe.resample_steps / recipe.warmup_steps, 1)
        decay = int(recipe.decay_start * recipe.steps)
        if step < recipe.warmup_steps:
            return recipe.lr * step / recipe.warmup_steps
        if step >= decay:
            return recipe.lr * (recipe.steps - step) / (recipe.steps - decay)
        return recipe.lr

    def sparsity_scale(self) -> float:
        warmup = self.recipe.sparsity_warmup_steps
        return min(self.steps / warmup, 1.0) if warmup else 1.0

    def observe(self, f_BS: Tensor, fired_S: Tensor, sample: Tensor) -> None:
        """Threshold and dead counters, from this batch, before the auxiliary loss."""
        recipe = self.recipe
        if self.steps > recipe.threshold_start and sample.isfinite():
            beta, old = recipe.threshold_beta, self.threshold
            self.threshold = sample if old < 0 else beta * old + (1 - beta) * sample
        self.count(fired_S, len(f_BS))

    def count(self, fired_S: Tensor, n_tokens: int) -> None:
        self.tokens_since_fired = torch.where(fired_S, 0, self.tokens_since_fired + n_tokens)
        self.steps_since_fired = torch.where(fired_S, 0, self.steps_since_fired + 1)

    def auxk(self, residual_BD: Tensor, acts_BS: Tensor, w_dec_SD: Tensor) -> tuple[Tensor, int]:
        """Gao et al., A.2: e_hat = W_dec z of the k_aux largest dead latents, ||e - e_hat||^2.

        Over the variance of e around its batch mean, which is the reference's normalisation.
        """
        dead = (self.tokens_since_fired >= self.recipe.dead_after_tokens).nonzero()[:, 0]
        if len(dead) == 0:
            return residual_BD.new_zeros(()), 0
        z_BK, index_BK = acts_BS[:, dead].topk(min(self.recipe.k_aux, len(dead)), dim=1)
        e_hat_BD = (z_BK[:, :, None] * w_dec_SD[dead][index_BK]).sum(dim=1)
        variance = squared_error(residual_BD, residual_BD.mean(dim=0))
        return squared_error(residual_BD, e_hat_BD) / variance, len(dead)

    def resample(self, x_BD: Tensor, dead_S: Tensor) -> None:
        """Bricken et al., "Neuron resampling": dead latents start again from badly explained rows.

        Which rows is drawn with probability proportional to the reconstruction error; here no draw
        is needed, as the batches of the tests consist of one row repeated where this happens.
        """
        assert (x_BD == x_BD[0]).all() or not dead_S.any(), "which rows are drawn must not matter"
        chosen = dead_S.nonzero()[: len(x_BD), 0]
        alive_norm = self.parameters["W_enc"][:, ~dead_S].norm(dim=0).mean()
        new = {name: value.clone() for name, value in self.parameters.items()}
        new["W_enc"][:, chosen] = (x_BD[0] * alive_norm * 0.2)[:, None]
        new["W_dec"][chosen] = x_BD[0] / x_BD[0].norm()
        new["b_enc"][chosen] = 0
        self.parameters = new
        for name, latents in (
            ("W_enc", (slice(None), chosen)),
            ("W_dec", chosen),
            ("b_enc", chosen),
        ):
            for moment in self.moments[name]:
                moment[latents] = 0


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """||x - x_hat||^2, summed over D and averaged over B."""
    return (x_BD - x_hat_BD).square().sum(dim=1).mean()


def without_parallel_part(gradient_SD: Tensor, rows_SD: Tensor, eps: float) -> Tensor:
    """Each row's gradient without its component along the row."""
    units_SD: Tensor = rows_SD / (rows_SD.norm(dim=1, keepdim=True) + eps)
    return gradient_SD - (gradient_SD * units_SD).sum(dim=1, keepdim=True) * units_SD


def total_norm(gradients: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


def number(value: Tensor | float) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def geometric_median(x_BD: Tensor, recipe: Recipe) -> Tensor:
    """Weiszfeld's iteration."""
    guess_D = x_BD.mean(dim=0)
    for _ in range(recipe.median_iterations):
        weight_B = 1 / (x_BD - guess_D).norm(dim=1)
        before_D, guess_D = guess_D, (weight_B[:, None] * x_BD).sum(dim=0) / weight_B.sum()
        if (guess_D - before_D).norm() < recipe.median_tolerance:
            break
    return guess_D


# --- losses: (state, x, parameters) -> loss and the values to report ---------------------------

Loss = tuple[Tensor, dict[str, Any]]


def topk_loss(state: Textbook, x_BD: Tensor, p: Parameters) -> Loss:
    """f = TopK(relu((x - b_dec) W_enc + b_enc)) row by row."""
    acts_BS = torch.relu((x_BD - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    # sorted=False decides which of several zeros is kept, which the reference counts as firing.
    index_BK = acts_BS.detach().topk(state.recipe.k or 0, dim=1, sorted=False).indices
    kept_BS = torch.zeros_like(acts_BS, dtype=torch.bool).scatter(1, index_BK, True)
    f_BS = acts_BS * kept_BS
    counted_BS = kept_BS if state.recipe.reference else f_BS > 0
    smallest_B = f_BS.detach().masked_fill(f_BS <= 0, torch.inf).min(dim=1).values.to(torch.float32)
    # Rows in which nothing fires have no smallest; the reference's threshold becomes infinite.
    state.observe(f_BS, counted_BS.any(dim=0), smallest_B[smallest_B.isfinite()].mean())
    x_hat_BD = f_BS @ p["W_dec"] + p["b_dec"]
    return with_auxk(state, x_BD, p, acts_BS, f_BS, squared_error(x_BD, x_hat_BD), x_hat_BD)


def batch_topk_loss(state: Textbook, x_BD: Tensor, p: Parameters) -> Loss:
    """f keeps the k B largest of the batch; Matryoshka sums prefixes of it.

    Matryoshka: x_i = b_dec + the groups up to i, L = (1 / G) sum_i w_i ||x - x_i||^2.
    """
    acts_BS = torch.relu((x_BD - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    index = acts_BS.detach().flatten().topk((state.recipe.k or 0) * len(x_BD)).indices
    kept = torch.zeros(acts_BS.numel(), dtype=torch.bool).scatter(0, index, True)
    f_BS = acts_BS * kept.view_as(acts_BS)
    sample = f_BS.detach().masked_fill(f_BS <= 0, torch.inf).min().to(torch.float32)
    if state.recipe.reference and sample.isinf():
        sample = torch.zeros_like(sample)
    state.observe(f_BS, (f_BS > 0).any(dim=0), sample)
    if state.recipe.arch == "batch_topk":
        x_hat_BD = f_BS @ p["W_dec"] + p["b_dec"]
        error = squared_error(x_BD, x_hat_BD)
    else:
        ends = torch.tensor(state.recipe.group_sizes).cumsum(0).tolist()
        prefixes = [p["b_dec"] + f_BS[:, :end] @ p["W_dec"][:end] for end in ends]
        errors = torch.stack([squared_error(x_BD, prefix_BD) for prefix_BD in prefixes])
        error = (errors.new_tensor(state.recipe.group_weights) * errors).sum() / len(ends)
        x_hat_BD = prefixes[-1]
    return with_auxk(state, x_BD, p, acts_BS, f_BS, error, x_hat_BD)


def with_auxk(
    state: Textbook,
    x_BD: Tensor,
    p: Parameters,
    acts_BS: Tensor,
    f_BS: Tensor,
    error: Tensor,
    x_hat_BD: Tensor,
) -> Loss:
    aux, n_dead = state.auxk((x_BD - x_hat_BD).detach(), acts_BS, p["W_dec"])
    loss = error + state.recipe.auxk_coefficient * aux
    l0 = (f_BS > 0).sum(dim=1).double().mean()
    return loss, {"l2": error, "aux": aux, "dead": n_dead, "l0": l0}


def relu_loss(state: Textbook, x_BD: Tensor, p: Parameters) -> Loss:
    """||x - x_hat||^2 + lambda s sum_i f_i, and with free decoder norms f_i ||W_dec,i||.

    The free variant does not subtract b_dec before the encoder; the reference's does by default.
    """
    free = state.recipe.decoder_norm == "free"
    centred_BD = x_BD if free and not state.recipe.reference else x_BD - p["b_dec"]
    f_BS = torch.relu(centred_BD @ p["W_enc"] + p["b_enc"])
    x_hat_BD = f_BS @ p["W_dec"] + p["b_dec"]
    norms_S = p["W_dec"].norm(dim=1) ** state.recipe.l1_norm_power if free else 1.0
    penalty = (f_BS * norms_S).sum(dim=1).mean()
    state.count((f_BS > 0).any(dim=0), len(x_BD))
    return penalised(state, squared_error(x_BD, x_hat_BD), penalty, f_BS)


def p_anneal_loss(state: Textbook, x_BD: Tensor, p: Parameters) -> Loss:
    """||x - x_hat||^2 + alpha s ||f||_p, p falling from p_start to p_end.

    At each of the update steps, evenly spaced from anneal_start to anneal_end, alpha is multiplied
    by the mean ||f||_p over the mean ||f||_p' of the last batches, p' being the next p: then p
    becomes p'. Both hold from the step after on.
    """
    f_BS = torch.relu((x_BD - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    x_hat_BD = f_BS @ p["W_dec"] + p["b_dec"]
    penalty = lp_norm(f_BS, state.p, state.recipe)
    loss = penalised(state, squared_error(x_BD, x_hat_BD), penalty, f_BS)
    loss[1]["p"] = state.p
    if state.next_p is not None:
        next_penalty = lp_norm(f_BS.detach(), state.next_p, state.recipe)
        state.norms.append((float(penalty.detach()), float(next_penalty)))
        state.norms = state.norms[-state.recipe.sparsity_queue :]
    anneal(state)
    state.count((f_BS > 0).any(dim=0), len(x_BD))
    return loss


def anneal(state: Textbook) -> None:
    recipe, n = state.recipe, state.recipe.sparsity_updates
    span = recipe.anneal_end - recipe.anneal_start
    at = [int(recipe.anneal_start + i * span / (n - 1)) for i in range(n)]
    values = [recipe.p_start + i * (recipe.p_end - recipe.p_start) / (n - 1) for i in range(n)]
    if state.steps not in at:
        return
    if state.next_p is not None:
        now, then = (sum(column) for column in zip(*state.norms, strict=True))
        state.coefficient *= now / then
    state.p = values[state.updates_of_p]
    state.updates_of_p += 1
    state.next_p = values[min(state.updates_of_p, n - 1)]


def lp_norm(f_BS: Tensor, p: float, recipe: Recipe) -> Tensor:
    """(sum_i f_i^p)^(1/p), or without the root; mean over rows.

    Only positive entries are taken: the derivative of 0^p is infinite for p < 1, and relu's is 0.
    """
    powers_BS = torch.where(f_BS > 0, f_BS, 1.0) ** p * (f_BS > 0)
    sums_B = powers_BS.sum(dim=1)
    if recipe.sparsity_norm == "lp":
        fires_B = sums_B > 0
        sums_B = torch.where(fires_B, sums_B, 1.0) ** (1 / p) * fires_B
    return sums_B.mean()


def penalised(state: Textbook, error: Tensor, penalty: Tensor, f_BS: Tensor) -> Loss:
    loss = error + state.coefficient * state.sparsity_scale() * penalty
    l0 = (f_BS > 0).sum(dim=1).double().mean()
    values = {"l2": error, "penalty": penalty, "coefficient": state.coefficient, "l0": l0}
    return loss, values


def gated_loss(state: Textbook, x_BD: Tensor, p: Parameters) -> Loss:
    """Eq. 6: f = 1[pi > 0] relu(exp(r_mag) (x - b_dec) W_enc + b_mag), pi = (x - b_dec) W_enc + b_gate.

    Eq. 8: ||x - x_hat(f)||^2 + lambda s ||relu(pi)||_1 + ||x - x_hat_frozen(relu(pi))||^2.
    """
    product_BS = (x_BD - p["b_dec"]) @ p["W_enc"]
    pi_BS = product_BS + p["b_gate"]
    f_BS = (pi_BS > 0) * torch.relu(p["r_mag"].exp() * product_BS + p["b_mag"])
    gate_BS = torch.relu(pi_BS)
    x_hat_BD = f_BS @ p["W_dec"] + p["b_dec"]
    frozen_BD = gate_BS @ p["W_dec"].detach() + p["b_dec"].detach()
    error = squared_error(x_BD, x_hat_BD)
    state.count((f_BS > 0).any(dim=0), len(x_BD))
    loss, values = penalised(state, error, gate_BS.sum(dim=1).mean(), f_BS)
    aux = squared_error(x_BD, frozen_BD)
    return loss + aux, values | {"aux": aux}


def jumprelu_loss(state: Textbook, x_BD: Tensor, p: Parameters) -> Loss:
    """f = z 1[z > theta] with z = x W_enc + b_enc; ||x - x_hat||^2 + lambda s (L0 / k - 1)^2.

    Pseudo-derivatives, eq. 11 and 12, K = 1[|u| < 1/2] the rectangle kernel:
    df/dtheta = -(theta / bandwidth) K((z - theta) / bandwidth), dL0/dtheta = -(1 / bandwidth) K(...).
    The reference takes L0's of f instead of z: of the kernel only the half above theta is left (and
    all that is off counts once theta falls below half a bandwidth).
    """
    theta_S, bandwidth = p["threshold"], state.recipe.bandwidth
    z_BS = x_BD @ p["W_enc"] + p["b_enc"]
    zero_S = theta_S - theta_S.detach()  # no value, only a gradient
    slope_BS = (theta_S / bandwidth * kernel(z_BS, theta_S, bandwidth)).detach()
    f_BS = z_BS * (z_BS > theta_S) - slope_BS * zero_S
    seen_BS = (f_BS if state.recipe.reference else z_BS).detach()
    slope_BS = (kernel(seen_BS, theta_S, bandwidth) / bandwidth).detach()
    step_BS = (seen_BS > theta_S).to(x_BD.dtype) - slope_BS * zero_S
    l0 = step_BS.sum(dim=1).mean()
    error = squared_error(x_BD, f_BS @ p["W_dec"] + p["b_dec"])
    state.count((f_BS > 0).any(dim=0), len(x_BD))
    penalty = (l0 / (state.recipe.k or 0) - 1) ** 2
    return penalised(state, error, penalty, f_BS)


def kernel(z_BS: Tensor, theta_S: Tensor, bandwidth: float) -> Tensor:
    return (((z_BS - theta_S) / bandwidth).abs() < 0.5).to(z_BS.dtype)


LOSSES: dict[str, Callable[[Textbook, Tensor, Parameters], Loss]] = {
    "topk": topk_loss,
    "batch_topk": batch_topk_loss,
    "matryoshka": batch_topk_loss,
    "relu": relu_loss,
    "p_anneal": p_anneal_loss,
    "gated": gated_loss,
    "jumprelu": jumprelu_loss,
}
