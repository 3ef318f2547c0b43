"""sae-pipe fit"""

from pathlib import Path
from typing import Annotated

import typer

from ..stages.fitconfig import DTYPES, FitConfig
from ..stages.sae import ARCHITECTURES
from .errors import told_to_the_user

_SAE, _LENGTH, _RECIPE, _RUN = "The SAE", "How long", "Recipe", "How it runs"


@told_to_the_user
def fit(
    store: Annotated[
        Path, typer.Option(help="The activation store to fit from.", rich_help_panel=_SAE)
    ],
    l0: Annotated[
        int, typer.Option(help="Active latents a row to aim at (k).", rich_help_panel=_SAE)
    ],
    arch: Annotated[
        str, typer.Option(help=f"One of {', '.join(sorted(ARCHITECTURES))}.", rich_help_panel=_SAE)
    ] = "matryoshka",
    d_sae: Annotated[
        int, typer.Option(help="Number of latents.", rich_help_panel=_SAE)
    ] = FitConfig.d_sae,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder. Default: runs/STORE-ARCH-l0_L0-seedSEED.", rich_help_panel=_RUN
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
        int, typer.Option(help="Rows a step.", rich_help_panel=_LENGTH)
    ] = FitConfig.batch_size,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Default: 2e-4 / sqrt(d_sae / 2**14).", rich_help_panel=_RECIPE
        ),
    ] = None,
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
        float, typer.Option(help="Largest total norm of the gradient.", rich_help_panel=_RECIPE)
    ] = FitConfig.grad_clip,
    threshold_beta: Annotated[
        float | None,
        typer.Option(
            help="How much of the inference threshold each step keeps. Default: 0.999, less in runs below 10,000 steps.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of initial weights.", rich_help_panel=_RUN)
    ] = FitConfig.seed,
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
            help="CPU threads of a step. Default: all for one SAE; 1 for each of several, which "
            "step side by side.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.", rich_help_panel=_RUN)
    ] = FitConfig.device,
    dtype: Annotated[
        str, typer.Option(help=f"Of the products: {', '.join(DTYPES)}.", rich_help_panel=_RUN)
    ] = FitConfig.dtype,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between checkpoints.", rich_help_panel=_RUN)
    ] = FitConfig.checkpoint_minutes,
    checkpoint_steps: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints, in addition.", rich_help_panel=_RUN),
    ] = None,
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
            help="Fit from a store while it is written: all of its rows, each shard as soon as it "
            "is sealed.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    heldout_rows: Annotated[
        int,
        typer.Option(
            help="Held-out rows of each of them; the summary uses all.", rich_help_panel=_RUN
        ),
    ] = FitConfig.heldout_rows,
) -> None:
    """Fit a sparse autoencoder from a store.

    The same command goes on with a run that was interrupted, to the same weights. Of a store that
    is unfinished it takes the shards that are sealed now, and keeps to those.
    """
    # Torch takes seconds to import: a flag that cannot work is refused before that.
    config = FitConfig(
        arch=arch,
        k=l0,
        d_sae=d_sae,
        tokens=tokens,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        warmup_steps=warmup_steps,
        auxk_coefficient=auxk_coefficient,
        dead_after_tokens=dead_after_tokens,
        threshold_start=threshold_start,
        k_anneal_steps=k_anneal_steps,
        decay_start=decay_start,
        grad_clip=grad_clip,
        threshold_beta=threshold_beta,
        seed=seed,
        order_seed=order_seed,
        threads=threads,
        device=device,
        dtype=dtype,
        checkpoint_minutes=checkpoint_minutes,
        checkpoint_steps=checkpoint_steps,
        log_every=log_every,
        heldout_every=heldout_every,
        heldout_rows=heldout_rows,
    )
    from ..stages.fit import default_out
    from ..stages.fit import fit as run
    from ..stages.fit_source import open_to_fit

    folder = Path(default_out(store, config)) if out is None else out
    opened = open_to_fit(store, folder, follow=follow, say=lambda s: typer.echo(s, err=True))
    summary = run(opened, config, folder)
    from .tables import run_table

    typer.echo(run_table([(str(folder), summary)]))
    typer.echo(f"Weights, curve and metrics are in {folder}.")
