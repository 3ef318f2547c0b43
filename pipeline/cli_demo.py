"""sae-pipe demo: the main job, small enough to watch."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .errors import told_to_the_user
from .say import say

DATA = Path(__file__).parent / "demo_data"
MODEL, TEXT = DATA / "neox-pd", DATA / "text.jsonl.zst"

LAYER, MASK_P, L0, D_SAE = 3, (0.0, 0.3), 20, 1024
TOKENS, HELDOUT_TOKENS, EPOCHS = 400_000, 20_000, 2
LATENTS, EXAMPLES = 3, 3


@told_to_the_user
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the stores and runs.")] = Path(
        "sae-pipe-demo"
    ),
) -> None:
    """Harvest a small model that ships with sae-pipe at p = 0 and 0.3, fit, and compare.

    Needs no network: a GPT-NeoX of 2.2 million parameters and 8 MB of public-domain text are part
    of the package.
    """
    from ..stages.fit import fit
    from ..stages.fitconfig import FitConfig
    from ..stages.harvest import harvest
    from ..stages.harvest_config import HarvestConfig
    from ..stages.latents import top_activations
    from ..stages.sae import load_sae
    from ..stages.sources import TextConfig
    from ..storage import open_store
    from .show import show_latents
    from .tables import run_table

    begun = time.monotonic()
    say(
        f"Harvesting layer {LAYER} of a small GPT-NeoX over novels, speeches, Shakespeare and the "
        "King James Bible, with and without masking.\n"
    )
    config = HarvestConfig(
        model=str(MODEL),
        layers=(LAYER,),
        mask_p=MASK_P,
        out=out / "acts.zarr",
        text=TextConfig(dataset=str(TEXT)),
        tokens=TOKENS,
        heldout_tokens=HELDOUT_TOKENS,
    )
    stores = [open_store(path) for path in harvest(config, say=say)]
    say(f"\nFitting a Matryoshka SAE of {D_SAE} latents from each store.\n")
    runs = []
    for store in stores:
        folder = out / "runs" / f"{store.name}-matryoshka-l0_{L0}"
        fit_config = FitConfig(arch="matryoshka", k=L0, d_sae=D_SAE, epochs=EPOCHS)
        runs.append((folder, fit(store, fit_config, folder)))
    say(
        f"On {runs[0][1].heldout_rows:,} held-out rows, harvested without masking, from documents "
        "that neither store holds:\n"
    )
    say(run_table([(folder.name, summary) for folder, summary in runs]))
    say(about_l0(*(summary.l0 for _, summary in runs)), nl=False)
    for (folder, _), store in zip(runs, stores, strict=True):
        say(f"\nSome latents of {folder.name} and where they fire most:\n")
        found = top_activations(load_sae(folder), store, count=LATENTS, examples=EXAMPLES)
        say(show_latents(found))
    say(f"\nDone in {time.monotonic() - begun:.0f} s. {_next_steps(out)}")


def about_l0(unmasked: float | None, masked: float | None) -> str:
    """What to keep in mind about a table whose L0 differ; nothing when they are close."""
    if unmasked is None or masked is None:
        return ""
    low, high = sorted((unmasked, masked))
    if high <= 1.2 * low:
        return ""
    return (
        f"\nBoth were fitted for L0 {L0}, the second on masked rows but judged here on unmasked "
        f"ones, where its threshold lets {'more' if masked > unmasked else 'fewer'} latents "
        "through than the first's; explained variance at different L0 is not a like-for-like "
        "comparison.\n"
    )


def _next_steps(out: Path) -> str:
    return (
        f"Stores and runs are in {out}.\n"
        "\nNext, on a real model (with a GPU and network):\n"
        "  sae-pipe harvest --model pythia-160m --layer 8 --mask-p 0.3\n"
        "  sae-pipe fit --store acts.zarr --arch matryoshka --l0 20"
    )
