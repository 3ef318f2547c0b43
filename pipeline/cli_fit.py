"""sae-pipe fit"""

from pathlib import Path
from typing import Annotated

import typer

from ..stages.fitconfig import DTYPES, OPTIMIZER_STATES, FitConfig
from ..stages.loggers import LOGGERS
from ..stages.sae import ARCHITECTURES
from ..stages.torchrun import find_seat
from ..storage.order import OPEN_SHARDS
from .cache_flags import CacheDir, CacheSize, use_cache
from .errors import told_once
from .fit_flags import RUNS, check_torchrun, check_workers, fit_configs, listed, paths

_SAE, _LENGTH, _RECIPE, _RUN = "The SAE", "How long", "Recipe", "How it runs"


@told_once
def fit(
    store: Annotated[
        list[str],
        typer.Option(
            help="The activation store to fit from, a folder or an address such as "
            "s3://bucket/acts.zarr; several times, or a list with commas, for SAEs from each.",
            rich_help_panel=_SAE,
        ),
    ],
    l0: Annotated[
        str | None,
        typer.Option(
            help="Active latents a row to aim at (k); a list such as 20,40,80 for an SAE each. "
            "Needed unless --sparsity is given.",
            rich_help_panel=_SAE,
        ),
    ] = None,
    arch: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(sorted(ARCHITECTURES))}; or a list.", rich_help_panel=_SAE
        ),
    ] = "matryoshka",
    d_sae: Annotated[
        str, typer.Option(help="Number of latents; or a list.", rich_help_panel=_SAE)
    ] = str(FitConfig.d_sae),
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder. Default: runs/STORE-ARCH-l0_L0-seedSEED. Of several SAEs: the "
            "folder of their run folders. Default: runs.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Rows to train on; they repeat when the store is used up. Default: one epoch.",
            rich_help_panel=_LENGTH,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the store, instead of --tokens.", rich_help_panel=_LENGTH),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            help="Rows a step, of all processes together under torchrun.", rich_help_panel=_LENGTH
        ),
    ] = FitConfig.batch_size,
    lr: Annotated[
        str,
        typer.Option(
            help="Peak learning rate; auto is the architecture's (docs/recipes.md).",
            rich_help_panel=_RECIPE,
        ),
    ] = "auto",
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of learning-rate warm-up. Default: 1000, or 5 % of the steps if fewer.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    auxk_coefficient: Annotated[
        float,
        typer.Option(
            help="Weight of the auxiliary loss for dead latents.", rich_help_panel=_RECIPE
        ),
    ] = FitConfig.auxk_coefficient,
    dead_after_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens without firing after which a latent counts as dead. Default: 10,000,000, "
            "or a fifth of the run if fewer.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    threshold_start: Annotated[
        int | None,
        typer.Option(
            help="Step after which the inference threshold is estimated. Default: 1000, or half "
            "of the steps if fewer.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    k_anneal_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps over which k falls from d_in to --l0. Default: none.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    decay_start: Annotated[
        float,
        typer.Option(
            help="Share of the steps from which the learning rate falls to 0.",
            rich_help_panel=_RECIPE,
        ),
    ] = FitConfig.decay_start,
    grad_clip: Annotated[
        float | None,
        typer.Option(
            help="Largest total norm of the gradient; 0 never clips. Default: the architecture's.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            "--l1",
            help="Coefficient of the sparsity term of relu, gated, p_anneal and jumprelu, which "
            "then stays. Default: it is led to --l0.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    sparsity_warmup_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps over which the sparsity term rises. Default: 2000, or a tenth of the steps "
            "if fewer.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    decoder_norm: Annotated[
        str,
        typer.Option(
            help="Of relu: unit, or free for the variant of April 2024.", rich_help_panel=_RECIPE
        ),
    ] = FitConfig.decoder_norm,
    resample_steps: Annotated[
        int | None,
        typer.Option(
            help="Of relu: steps between resamplings of dead latents. Default: never.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    multi_topk: Annotated[
        float,
        typer.Option(
            help="Of topk: weight of the loss with four times as many latents (the paper: 0.125).",
            rich_help_panel=_RECIPE,
        ),
    ] = FitConfig.multi_topk,
    bandwidth: Annotated[
        float,
        typer.Option(help="Of jumprelu: width of the kernel.", rich_help_panel=_RECIPE),
    ] = FitConfig.bandwidth,
    p_end: Annotated[
        float,
        typer.Option(help="Of p_anneal: where p falls to.", rich_help_panel=_RECIPE),
    ] = FitConfig.p_end,
    anneal_start: Annotated[
        int | None,
        typer.Option(
            help="Of p_anneal: the step at which p begins to fall. Default: 10,000, or a quarter of "
            "the steps if fewer.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            help="Do as the reference trainers do where we differ on purpose (docs/recipes.md).",
            rich_help_panel=_RECIPE,
        ),
    ] = False,
    threshold_beta: Annotated[
        float | None,
        typer.Option(
            help="How much of the inference threshold each step keeps. Default: 0.999, less in runs below 10,000 steps.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    seed: Annotated[
        str, typer.Option(help="Of initial weights; or a list.", rich_help_panel=_RUN)
    ] = str(FitConfig.seed),
    order_seed: Annotated[
        int,
        typer.Option(
            help="Of the order of rows, which SAEs that are fitted together share.",
            rich_help_panel=_RUN,
        ),
    ] = FitConfig.order_seed,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of a step. Default: all. With fewer, several SAEs step side by side.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.", rich_help_panel=_RUN)
    ] = FitConfig.device,
    dtype: Annotated[
        str, typer.Option(help=f"Of the products: {', '.join(DTYPES)}.", rich_help_panel=_RUN)
    ] = FitConfig.dtype,
    selection: Annotated[
        str,
        typer.Option(
            "--select",
            help="exact; or bf16: choose latents by bfloat16 products, compute them in float32.",
            rich_help_panel=_RUN,
        ),
    ] = FitConfig.selection,
    optimizer_state: Annotated[
        str,
        typer.Option(
            help=f"Of Adam's moments: {', '.join(OPTIMIZER_STATES)}; bfloat16 is half the memory.",
            rich_help_panel=_RUN,
        ),
    ] = FitConfig.optimizer_state,
    capture: Annotated[
        bool,
        typer.Option(
            "--capture/--no-capture",
            help="On a CUDA device, record a step once and replay it: the same numbers, sooner.",
            rich_help_panel=_RUN,
        ),
    ] = FitConfig.capture,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between checkpoints.", rich_help_panel=_RUN)
    ] = FitConfig.checkpoint_minutes,
    checkpoint_steps: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints, in addition.", rich_help_panel=_RUN),
    ] = None,
    keep_checkpoints: Annotated[
        int,
        typer.Option(
            help="How many of the last checkpoints to keep while it runs.", rich_help_panel=_RUN
        ),
    ] = FitConfig.keep_checkpoints,
    log_to: Annotated[
        str,
        typer.Option(
            help=f"Also send the lines of metrics.jsonl to: {', '.join(LOGGERS)}; or a list.",
            rich_help_panel=_RUN,
        ),
    ] = "",
    log_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between lines of metrics.jsonl. Default: about a thousand lines.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    heldout_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between held-out evaluations. Default: ten a run.", rich_help_panel=_RUN
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Fit from a store while it is written: all of its rows, in groups of "
            f"{OPEN_SHARDS} shards, each group as soon as it is sealed.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    heldout_rows: Annotated[
        int,
        typer.Option(
            help="Held-out rows of each of them; the summary uses all.", rich_help_panel=_RUN
        ),
    ] = FitConfig.heldout_rows,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Of several stores: processes that take one store each, on a GPU each where there "
            "are GPUs. Default: this process, store by store.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
) -> None:
    """Fit sparse autoencoders from a store: one, or every combination of lists.

    SAEs of one store are fitted together, from one stream of its rows. The same command goes on
    with what was interrupted, to the same weights. Of a store that is unfinished it takes the
    shards that are sealed now, and keeps to those. Started by torchrun, all processes fit each SAE
    together: `torchrun --nproc-per-node 2 --no-python sae-pipe fit ...`.
    """
    flags = dict(locals())
    use_cache(cache_dir, cache_size)
    # Torch takes seconds to import: a flag that cannot work is refused before that.
    for name in ("l0", "d_sae", "seed"):
        flags[name] = None if flags[name] is None else listed(name, flags[name], int)
    flags["arch"] = listed("arch", arch, str)
    flags["log_to"] = tuple(listed("log_to", log_to, str)) if log_to else ()
    stores, configs = paths(store), fit_configs(flags)
    check_workers(workers, len(stores))
    check_torchrun(find_seat(), follow=follow, workers=workers)
    if len(stores) * len(configs) > 1:
        from .fitting import fit_several

        fit_several(stores, configs, out or RUNS, follow=follow, workers=workers)
        return
    from .fitting import fit_one

    fit_one(stores[0], configs[0], out, follow=follow)
