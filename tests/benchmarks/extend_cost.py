"""What more rows of a store cost, beside a harvest of as many.

Harvests N rows of the demo's text with the demo's model, 2 N rows, and extends the first store to 2 N.
Processor seconds of this process, one torch thread, model loading and tokenising included.

    python tests/benchmarks/extend_cost.py                  # N = 150,000
    python tests/benchmarks/extend_cost.py --tokens 50000
"""

import argparse
import datetime
import importlib.metadata
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage.provenance import hardware

DEMO = Path(__file__).resolve().parents[2] / "pipeline/demo_data"


def cpu_seconds(config: HarvestConfig) -> float:
    """Of one harvest or extension."""
    begun = time.process_time()
    harvest(config, say=lambda line: None, show_progress=False)
    return round(time.process_time() - begun, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=150_000)
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        config = HarvestConfig(
            model=str(DEMO / "neox-pd"),
            layers=(3,),
            mask_p=(0.3,),
            text=TextConfig(dataset=str(DEMO / "text.jsonl.zst")),
            tokens=tokens,
            heldout_tokens=4000,
            batch_contexts=16,
            device="cpu",
            out=Path(name) / "small/acts.zarr",
        )
        cpu_seconds(replace(config, tokens=5000, out=Path(name) / "warm/acts.zarr"))
        large = replace(config, tokens=2 * tokens, out=Path(name) / "large/acts.zarr")
        found = {
            f"harvest of {tokens:,}": cpu_seconds(config),
            f"harvest of {2 * tokens:,}": cpu_seconds(large),
            "extension of the first to as many as the second": cpu_seconds(
                replace(config, tokens=2 * tokens, extend=True)
            ),
        }
    versions = {each: importlib.metadata.version(each) for each in ("torch", "zarr", "numcodecs")}
    print(json.dumps({"cpu_seconds": found}, indent=1))
    print(json.dumps({"date": str(datetime.date.today()), **hardware(), **versions}))


if __name__ == "__main__":
    main()
