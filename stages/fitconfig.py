"""What a fit is told (FitConfig) and what follows from it for one run (Schedule).

Imports no torch, so that the command line can show the defaults. The defaults are the reference
trainers' recipe for the TopK family.
"""

import math
from dataclasses import dataclass

from ..storage.errors import InputError
from .loggers import check_loggers
from .sae import ARCHITECTURES
from .sae.groups import group_sizes
from .sae.recipe import DECODER_NORMS, SPARSITY_NORMS, Recipe

_TINY = 5e-324  # the smallest number above 0
_TOO_LARGE = 2**63  # for counts: torch has int64
DTYPES = ("float32", "tf32", "bfloat16", "float64")
SELECTIONS = ("exact", "bf16")
OPTIMIZER_STATES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that decides the weights of a fit, given a store.

    What to fit:
        arch: a name of ARCHITECTURES; k: the L0 to reach (--l0); d_sae: number of latents.
        group_fractions, group_weights: Matryoshka's groups as shares of d_sae, and the weight of
            each prefix's loss (None: 1 / number of groups). multi_topk: TopK's weight of L(4k).
        decoder_norm: of relu, "unit" or "free" (the variant of April 2024).
        bandwidth, start_threshold: of jumprelu, the kernel's width and theta at first.
    How long:
        tokens, epochs: rows to train on, or passes over the store; one of them, or neither for one
            pass. batch_size: rows a step. Rows repeat in another order when the store is used up.
    Optimiser:
        lr: None is the architecture's. betas, eps: Adam's. grad_clip: largest total norm (0: no
            clipping). Of these None is the architecture's, too.
        warmup_steps, decay_start: the learning rate rises from 0 for that many steps, and falls to
            0 from that share of the steps on.
        k_anneal_steps: steps over which k falls from d_in to k; None keeps k.
    Sparsity, of the architectures that do not fix k:
        sparsity: coefficient of the sparsity term. Given, it stays, and k is not aimed at (jumprelu
            has k as its target either way). None begins with the architecture's and leads to k.
        sparsity_warmup_steps: steps over which its weight rises from 0.
        p_start, p_end, sparsity_updates, sparsity_queue, sparsity_norm, anneal_start, anneal_end: of
            p_anneal; how p falls in that many updates between those steps, how many recent
            penalties the coefficient is rescaled by, and "lp_p" or "lp".
        resample_steps: of relu, steps between resamplings of dead latents; None never does.
    Dead latents and inference:
        auxk_coefficient: weight of the auxiliary loss, k_aux: latents a row in it (None: half of
            d_in). dead_after_tokens: tokens without firing after which a latent is dead.
        threshold_start, threshold_beta: the first step after which the inference threshold is
            estimated, and how much of it each step keeps.
    Numbers:
        normalise: divide rows by the root of the store's mean squared norm; the factor is folded
            into the saved weights. seed: of the initial weights; order_seed: of the order of rows,
            which SAEs of several seeds share.
        device: auto, cpu, cuda, cuda:N, mps. dtype: float32; tf32 and bfloat16 for the products
            only, with float32 weights; float64 for checks. threads: torch's in a step on a CPU,
            which sums may depend on; None is all, or what the run was
            begun with.
        selection: "exact", or "bf16" to choose latents by bfloat16 products and compute the chosen
            ones in float32; dtype bfloat16 does that and its other products in bfloat16.
        optimizer_state: of Adam's two moments, float32 (with dtype float64: float64), or bfloat16 with
            stochastic rounding, which is half the memory.
        capture: on a CUDA device, record a step once and replay it; it changes no number.
        reference: do as the reference trainers do where we differ on purpose (docs/recipes.md).
    Bookkeeping (changes no weight):
        log_every: steps between lines of metrics.jsonl; None is about a thousand lines a run.
        heldout_every: steps between held-out evaluations; None is ten a run. heldout_rows: how many
            rows each of them uses (the summary uses all).
        checkpoint_minutes, checkpoint_steps: how often to checkpoint; steps, if given, in addition.
        keep_checkpoints: how many of the last. log_to: names of LOGGERS, beside metrics.jsonl.

    None for warmup_steps, threshold_start, threshold_beta, dead_after_tokens, sparsity_warmup_steps
    and anneal_start is the reference value (1000 steps, 1000 steps, 0.999, 10,000,000 tokens, 2000
    and 10,000 steps), made smaller for runs too short for it: at most 5 % of the steps, half of the
    steps, an average over a tenth of the steps, a fifth of the tokens, 10 % and 25 % of the steps. A
    run that stopped before its threshold was estimated would fire on everything, one whose
    threshold still remembers the beginning would miss the L0, and one shorter than
    dead_after_tokens would never revive a latent. What was resolved is in the run's config.json
    under `resolved`.
    """

    arch: str
    k: int | None = None
    d_sae: int = 4096
    group_fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    group_weights: tuple[float, ...] | None = None
    multi_topk: float = 0.0
    decoder_norm: str = "unit"
    bandwidth: float = 0.001
    start_threshold: float = 0.001

    tokens: int | None = None
    epochs: float | None = None
    batch_size: int = 2048

    lr: float | None = None
    betas: tuple[float, float] | None = None
    eps: float = 1e-8
    grad_clip: float | None = None
    warmup_steps: int | None = None
    decay_start: float = 0.8
    k_anneal_steps: int | None = None

    sparsity: float | None = None
    sparsity_warmup_steps: int | None = None
    p_start: float = 1.0
    p_end: float = 0.2
    sparsity_updates: int = 10
    sparsity_queue: int = 10
    sparsity_norm: str = "lp_p"
    anneal_start: int | None = None
    anneal_end: int | None = None
    resample_steps: int | None = None

    auxk_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int | None = None
    threshold_start: int | None = None
    threshold_beta: float | None = None

    normalise: bool = True
    seed: int = 0
    order_seed: int = 0
    threads: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    selection: str = "exact"
    optimizer_state: str = "float32"
    capture: bool = True
    reference: bool = False

    log_every: int | None = None
    heldout_every: int | None = None
    heldout_rows: int = 4096
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 1
    log_to: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The constants of the architecture."""
        return ARCHITECTURES[self.arch].recipe

    def __post_init__(self) -> None:
        """Raises InputError for values that can never work, whatever the store."""
        if self.arch not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise InputError(f"Unknown architecture {self.arch!r}: choose one of {known}.")
        for what, name, names in (
            ("dtype", self.dtype, DTYPES),
            ("selection", self.selection, SELECTIONS),
            ("optimizer state", self.optimizer_state, OPTIMIZER_STATES),
            ("decoder norm", self.decoder_norm, DECODER_NORMS),
            ("sparsity norm", self.sparsity_norm, SPARSITY_NORMS),
        ):
            if name not in names:
                raise InputError(
                    f"Unknown {what} {name!r} for a fit: choose one of {', '.join(names)}."
                )
        for flag, value, least in (
            ("--d-sae", self.d_sae, 1),
            ("--l0", self.k, 1),
            ("--batch-size", self.batch_size, 1),
            ("--tokens", self.tokens, 1),
            ("--warmup-steps", self.warmup_steps, 0),
            ("--threshold-start", self.threshold_start, 0),
            ("--dead-after-tokens", self.dead_after_tokens, 1),
            ("--k-anneal-steps", self.k_anneal_steps, 1),
            ("--log-every", self.log_every, 1),
            ("--heldout-every", self.heldout_every, 1),
            ("--heldout-rows", self.heldout_rows, 0),
            ("--checkpoint-steps", self.checkpoint_steps, 1),
            ("--sparsity-warmup-steps", self.sparsity_warmup_steps, 0),
            ("--sparsity-updates", self.sparsity_updates, 1),
            ("--sparsity-queue", self.sparsity_queue, 1),
            ("--anneal-start", self.anneal_start, 0),
            ("--anneal-end", self.anneal_end, 1),
            ("--resample-steps", self.resample_steps, 1),
            ("--k-aux", self.k_aux, 1),
            ("--threads", self.threads, 1),
            ("--keep-checkpoints", self.keep_checkpoints, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{flag} must be at least {least}, not {value}.")
            if value is not None and value >= _TOO_LARGE:
                raise InputError(f"{flag} must be below 2**63, not {value}.")
        for flag, seed in (("--seed", self.seed), ("--order-seed", self.order_seed)):
            if not 0 <= seed < _TOO_LARGE:
                raise InputError(f"{flag} is {seed}, and has to be from 0 to 2**63 - 1.")
        self._check_sparsity()
        if self.k is not None and self.k >= self.d_sae:
            raise InputError(
                f"--l0 {self.k} must be smaller than --d-sae {self.d_sae}: an SAE that keeps "
                "every latent is not sparse. Pass a smaller --l0."
            )
        self._check_floats()
        check_loggers(self.log_to)
        if self.arch == "matryoshka":
            group_sizes(self.group_fractions, self.d_sae)
            if self.group_weights is not None and len(self.group_weights) != len(
                self.group_fractions
            ):
                raise InputError(
                    f"There are {len(self.group_fractions)} groups, but "
                    f"{len(self.group_weights)} group weights. Pass one weight for each group."
                )
        if self.optimizer_state == "bfloat16" and self.dtype == "float64":
            raise InputError(
                "--optimizer-state bfloat16 saves memory, and --dtype float64 is for checks. "
                "Leave out one of them."
            )
        if self.tokens is not None and self.epochs is not None:
            raise InputError("--tokens and --epochs both say how long to train. Pass one of them.")

    def _check_floats(self) -> None:
        over_0, open_end = "above 0", math.inf
        for flag, value, least, below, range_ in (
            ("--lr", self.lr, _TINY, open_end, over_0),
            ("--epochs", self.epochs, _TINY, 1e18, "above 0 and below 1e18"),
            ("--grad-clip", self.grad_clip, 0, open_end, "0 or more"),
            ("--checkpoint-minutes", self.checkpoint_minutes, _TINY, open_end, over_0),
            ("--auxk-coefficient", self.auxk_coefficient, 0, open_end, "0 or more"),
            ("--decay-start", self.decay_start, 0, 1 + 1e-9, "between 0 and 1"),
            ("--threshold-beta", self.threshold_beta, 0, 1, "at least 0 and below 1"),
            ("--sparsity", self.sparsity, 0, open_end, "0 or more"),
            ("--multi-topk", self.multi_topk, 0, open_end, "0 or more"),
            ("--bandwidth", self.bandwidth, _TINY, open_end, over_0),
            ("--start-threshold", self.start_threshold, 0, open_end, "0 or more"),
            ("--p-start", self.p_start, _TINY, open_end, over_0),
            ("--p-end", self.p_end, 0, open_end, "0 or more"),
        ):
            if value is not None and not least <= value < below:
                raise InputError(f"{flag} must be {range_}, not {value:g}.")

    def _check_sparsity(self) -> None:
        """InputError for what this architecture has no use for, or lacks."""
        keeps_k = self.recipe.keeps_k
        if self.sparsity is not None and keeps_k:
            raise InputError(
                f"--sparsity {self.sparsity:g} was given, but {self.arch} fixes the number of "
                "active latents and has no sparsity term. Leave it out."
            )
        if self.k is None and (keeps_k or self.arch == "jumprelu" or self.sparsity is None):
            also = (
                "" if keeps_k or self.arch == "jumprelu" else ", or a coefficient with --sparsity"
            )
            raise InputError(f"{self.arch} needs to know the L0 to reach: pass --l0{also}.")
        for flag, value, arch in (
            ("--resample-steps", self.resample_steps, "relu"),
            ("--k-anneal-steps", self.k_anneal_steps, None),
        ):
            if value is not None and (self.arch != arch if arch else not keeps_k):
                users = (
                    [arch] if arch else [n for n, a in ARCHITECTURES.items() if a.recipe.keeps_k]
                )
                raise InputError(
                    f"{flag} is for {', '.join(users)}, and this is {self.arch}. Leave it out."
                )
        if self.decoder_norm == "free" and self.resample_steps is not None:
            raise InputError(
                "--resample-steps is for decoder rows of unit norm. Leave out --decoder-norm free."
            )

    def schedule(self, n_rows: int | None = None) -> "Schedule":
        """What follows for a store of n_rows rows. Raises InputError when nothing can be trained.

        n_rows may be left out when `tokens` is given.
        """
        tokens = self.tokens
        if tokens is None:
            if n_rows is None:
                raise InputError("Without a store, the config must say how many tokens to train.")
            tokens = int((1 if self.epochs is None else self.epochs) * n_rows)
        steps = tokens // self.batch_size
        if steps < 1:
            raise InputError(
                f"A run of {tokens} tokens is less than one batch of {self.batch_size}. "
                "Pass more --tokens or a smaller --batch-size."
            )
        schedule = Schedule(
            steps=steps,
            tokens=steps * self.batch_size,
            lr=self.recipe.learning_rate(self.d_sae, steps, reference=self.reference)
            if self.lr is None
            else self.lr,
            betas=self.recipe.betas if self.betas is None else self.betas,
            grad_clip=self.recipe.grad_clip_of(self.decoder_norm)
            if self.grad_clip is None
            else self.grad_clip,
            warmup_steps=_given_or(self.warmup_steps, min(1000, steps // 20)),
            # A hair is added because 0.29 * 100 is 28.999999999999996.
            decay_start_step=int(self.decay_start * steps + 1e-9),
            threshold_start=_given_or(self.threshold_start, min(1000, steps // 2 - 1)),
            dead_after_tokens=_given_or(
                self.dead_after_tokens, max(1, min(10_000_000, tokens // 5))
            ),
            threshold_beta=min(0.999, max(0.0, 1 - 10 / steps))
            if self.threshold_beta is None
            else self.threshold_beta,
            sparsity=self.recipe.sparsity if self.sparsity is None else self.sparsity,
            sparsity_warmup_steps=_given_or(self.sparsity_warmup_steps, min(2000, steps // 10)),
            anneal_start=_given_or(self.anneal_start, min(10_000, steps // 4)),
            anneal_end=_given_or(self.anneal_end, steps),
            log_every=_given_or(self.log_every, max(1, steps // 1000)),
            heldout_every=_given_or(self.heldout_every, max(1, steps // 10)),
        )
        schedule.check()
        return schedule


def default_lr_in_words(config: FitConfig, plan: "Schedule") -> str:
    """Where the learning rate comes from: lr 4e-4 = 2e-4 / sqrt(d_sae / 2^14), d_sae 4096."""
    mantissa, exponent = f"{plan.lr:.2e}".split("e")
    value, of_recipe = f"lr {float(mantissa):g}e{int(exponent)}", config.recipe.lr
    if of_recipe is None:
        return f"{value} = 2e-4 / sqrt(d_sae / 2^14), d_sae {config.d_sae}"
    if plan.lr == of_recipe:
        return f"{value}, the default of {config.arch}"
    return f"{value}: that of {config.arch}, {of_recipe:g}, raised for a run of {plan.steps} steps"


def _given_or(value: int | None, default: int) -> int:
    return default if value is None else value


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """FitConfig's open values, decided for one run. Steps count updates from 0."""

    steps: int
    tokens: int
    lr: float
    betas: tuple[float, float]
    grad_clip: float
    warmup_steps: int
    decay_start_step: int
    threshold_start: int
    threshold_beta: float
    dead_after_tokens: int
    sparsity: float | None
    sparsity_warmup_steps: int
    anneal_start: int
    anneal_end: int
    log_every: int
    heldout_every: int

    def check(self) -> None:
        """InputError when given values contradict the length of the run."""
        if self.warmup_steps > self.decay_start_step:
            raise InputError(
                f"--warmup-steps {self.warmup_steps} ends after the learning rate begins to fall, "
                f"at step {self.decay_start_step} of {self.steps}. "
                "Pass fewer --warmup-steps or more --tokens."
            )
        if self.threshold_start >= self.steps - 1:
            raise InputError(
                f"--threshold-start {self.threshold_start} leaves no step of {self.steps} to "
                "estimate the inference threshold in, and the SAE would fire on everything. "
                "Pass a smaller --threshold-start or more --tokens."
            )
