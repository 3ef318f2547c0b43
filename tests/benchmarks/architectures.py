"""All architectures on one store at the same L0: the table of docs/results.md, by one command.

Fits every architecture of the registry at each L0 and judges it on the store's held-out rows.
Without --store the demo model is harvested over the demo text first. Runs that a folder given by
--runs already holds are taken as they are, so that a run that was stopped goes on.

    python tests/benchmarks/architectures.py
    python tests/benchmarks/architectures.py --store acts.zarr --d-sae 4096 --epochs 1 --runs runs/all
"""

import argparse
import datetime
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from sae_pipe.pipeline import cli_demo
from sae_pipe.stages.fit import Summary, fit
from sae_pipe.stages.fitconfig import OPTIMIZER_STATES, FitConfig
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import ActivationStore, InputError, open_store
from sae_pipe.storage.provenance import hardware, versions


def demo_store(folder: Path, tokens: int) -> ActivationStore:
    config = HarvestConfig(
        model=str(cli_demo.MODEL),
        layers=(cli_demo.LAYER,),
        out=folder / "acts.zarr",
        text=TextConfig(dataset=str(cli_demo.TEXT)),
        tokens=tokens,
        heldout_tokens=cli_demo.HELDOUT_TOKENS,
    )
    return open_store(harvest(config, say=lambda _: None)[0])


def line(arch: str, l0: int, summary: Summary) -> str:
    dead = None if summary.dead_fraction is None else summary.dead_fraction * summary.d_sae
    cells = [
        shown(summary.explained_variance, 4),
        shown(summary.l0, 1),
        shown(dead, 0),
        shown(summary.gamma, 4),
        shown(summary.seconds, 0),
    ]
    return f"| {arch} | {l0} | " + " | ".join(cells) + " |"


def shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(store: ActivationStore, runs: Path, arguments: argparse.Namespace) -> Iterator[str]:
    yield "| architecture | L0 asked for | explained variance | L0 | dead latents | gamma | s |"
    yield "|---|---|---|---|---|---|---|"
    for arch in arguments.arch:
        for l0 in arguments.l0:
            config = FitConfig(
                arch=arch,
                k=l0,
                d_sae=arguments.d_sae,
                epochs=arguments.epochs,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
                device=arguments.device,
                optimizer_state=arguments.optimizer_state,
            )
            folder = runs / f"{arch}-l0_{l0}-seed{arguments.seed}"
            try:
                yield line(arch, l0, fit(store, config, folder, show_progress=False))
            except InputError as error:  # an architecture that these options do not suit
                yield f"\n{arch} at L0 {l0}: {error}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--arch", nargs="+", choices=sorted(ARCHITECTURES), default=sorted(ARCHITECTURES)
    )
    parser.add_argument("--l0", nargs="+", type=int, default=[20, 40])
    parser.add_argument("--store", type=Path, help="default: the demo model over the demo text")
    parser.add_argument("--tokens", type=int, default=cli_demo.TOKENS, help="to harvest")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--d-sae", type=int, default=cli_demo.D_SAE)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--optimizer-state", choices=OPTIMIZER_STATES, default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = (
            open_store(arguments.store)
            if arguments.store
            else demo_store(Path(scratch), arguments.tokens)
        )
        rows = int(arguments.epochs * store.n_rows)
        print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
        print(f"hardware  {hardware()['processor']}, {torch.get_num_threads()} threads")
        print(f"versions  {versions()}")
        print(f"command   {' '.join(sys.argv)}")
        print(f"store     {store.n_rows:,} rows of d_in {store.d_in}, digest {store.digest}")
        print(
            f"fits      {rows // arguments.batch_size:,} steps of {arguments.batch_size}, d_sae "
            f"{arguments.d_sae}; judged on {store.heldout.n_rows:,} held-out rows\n"
        )
        for one in table(store, arguments.runs or Path(scratch) / "runs", arguments):
            print(one, flush=True)


if __name__ == "__main__":
    main()
