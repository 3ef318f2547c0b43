"""A small harvest, and what is asked of its store: shared by the tests of harvest."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.sources import TextConfig

D_MODEL, CONTEXT = 32, 32
MASK_STRING = " the"


def config_for(lm: Path, text: Path, out: Path, **changes: Any) -> HarvestConfig:
    config = HarvestConfig(
        model=str(lm),
        layers=(1,),
        out=out,
        text=TextConfig(dataset=str(text)),
        tokens=6000,
        heldout_tokens=300,
        mask_string=MASK_STRING,
        mask_p=(0.3,),
        device="cpu",
        batch_contexts=8,
        shard_rows=512,
        block_bytes=1024 * D_MODEL * 2,  # two shards
    )
    return replace(config, **changes)


def quiet(config: HarvestConfig, **options: Any) -> list[Path]:
    return harvest(config, say=lambda line: None, show_progress=False, **options)


def content(store: Path) -> dict[str, bytes]:
    """Every file that must be the same whoever wrote it and however often it was stopped.

    Not .commits: a kill right after the store was declared complete leaves it, and nothing reads it.
    """
    files = {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file()
        and file.name not in (".lock", "manifest.json")
        and ".commits" not in file.relative_to(store).parts
    }
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("provenance")
    manifest["execution"].pop("tokens_per_s", None)
    files["manifest"] = json.dumps(manifest, sort_keys=True).encode()
    return files
