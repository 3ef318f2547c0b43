"""What rounding and the compact codec cost an SAE: FVU on exact held-out rows, over seeds.

One recipe is harvested once for each way to store its rows: float32 as the model computed them,
bfloat16, and compact with several steps. From each store an SAE of the same recipe is fitted with
several seeds, and all are judged on the same float32 held-out rows. The codec costs nothing that
counts when its FVU lies within the spread between seeds on exact rows.

    python tests/benchmarks/codec_study.py
    python tests/benchmarks/codec_study.py --model DIR --dataset FILE --layer 3 --tokens 2000000
"""

import argparse
import datetime
import importlib.metadata
import statistics
import tempfile
from pathlib import Path

from sae_pipe.pipeline.cli_demo import MODEL, TEXT
from sae_pipe.pipeline.tables import table
from sae_pipe.stages.fit import fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.metrics import evaluate
from sae_pipe.stages.sae import ARCHITECTURES, load_sae
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.layout import VALUE_BYTES
from sae_pipe.storage.provenance import hardware

STORED = (
    ("float32", "lossless", "float32"),
    ("bfloat16", "lossless", "bfloat16"),
    ("compact", "compact:0.25", "bfloat16"),
    ("compact:0.5", "compact:0.5", "bfloat16"),
    ("compact:1", "compact:1", "bfloat16"),
)


def size_ratio(store: ActivationStore) -> float:
    """How many times smaller than raw bfloat16 the training rows are."""
    shards = store.manifest["train"]["shards"]
    stored = sum(int(shard["files"]["activations"]["bytes"]) for shard in shards)
    return store.n_rows * store.d_in * VALUE_BYTES / stored


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--dataset", type=Path, default=TEXT)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--mask-p", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=800_000)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="topk")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--l0", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, exact = Path(name), None
        for label, codec, dtype in STORED:
            config = HarvestConfig(
                model=str(arguments.model),
                layers=(arguments.layer,),
                mask_p=(arguments.mask_p,),
                out=folder / f"{label.replace(':', '-')}.zarr",
                text=TextConfig(dataset=str(arguments.dataset)),
                tokens=arguments.tokens,
                heldout_tokens=20_000,
                codec=codec,
                store_dtype=dtype,
            )
            store = open_store(harvest(config, say=lambda _: None, show_progress=False)[0])
            exact = exact or store
            found = fvu_over_seeds(store, exact, folder / label.replace(":", "-"), arguments)
            error = store.manifest["encoding"].get("error", {})
            rows.append(
                [
                    label,
                    f"{size_ratio(store):.3f}",
                    f"{error.get('relative', 0.0):.5f}",
                    f"{error.get('per_dimension_max', 0.0):.5f}",
                    f"{statistics.mean(found):.5f}",
                    f"{min(found):.5f}",
                    f"{max(found):.5f}",
                ]
            )
            print(" ".join(rows[-1]), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("sae-pipe", "torch", "numpy")}
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {hardware()['processor']}")
    print(f"versions  {versions}")
    print(f"config    {vars(arguments)}")
    header = ["stored as", "times smaller", "error", "worst dimension", "FVU", "lowest", "highest"]
    print(table(header, rows))


def fvu_over_seeds(
    store: ActivationStore, exact: ActivationStore, out: Path, arguments: argparse.Namespace
) -> list[float]:
    """FVU on the exact held-out rows of an SAE fitted from `store`, for each seed."""
    found = []
    for seed in range(arguments.seeds):
        config = FitConfig(
            arch=arguments.arch,
            k=arguments.l0,
            d_sae=arguments.d_sae,
            tokens=arguments.steps * 2048,
            seed=seed,
        )
        run = out / f"seed{seed}"
        fit(store, config, run, show_progress=False)
        heldout = exact.heldout
        batches = (
            heldout.read(i, min(i + 2048, heldout.n_rows)) for i in range(0, heldout.n_rows, 2048)
        )
        found.append(float(evaluate(load_sae(run), batches, ("fvu",))["fvu"]))
    return found


if __name__ == "__main__":
    main()
