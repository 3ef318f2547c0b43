"""The table of docs/interop.md: the largest differences between the real packages and sae-pipe.

    SAE_PIPE_INTEROP_PYTHON=DIR/bin/python python -m tests.interop.table [RUN ...]

First every kind of SAE of tests/saes.py; then the SAE of each run folder, on 1,024 held-out rows of its
store. For each format: of latents, and of reconstructions from the package's own latents.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_pipe.stages.sae.base import Sae
from sae_pipe.stages.sae_export import load_with_facts, write_folder
from sae_pipe.stages.sae_formats import FORMATS
from sae_pipe.stages.sae_formats.facts import Facts
from sae_pipe.storage import InputError, open_store

from ..saes import FACTS, VARIANTS, make_sae, some_x

Case = tuple[str, Sae, Facts, Tensor]


def variants() -> Iterator[Case]:
    """Every kind there is, small."""
    for variant in VARIANTS:
        yield variant, make_sae(variant), FACTS, some_x()


def runs(folders: list[str]) -> Iterator[Case]:
    """SAEs that were fitted, on rows of their stores."""
    for folder in folders:
        sae, facts = load_with_facts(Path(folder))
        store = open_store(json.loads((Path(folder) / "config.json").read_text())["store"]["path"])
        yield Path(folder).name, sae, facts, torch.from_numpy(store.heldout.read(0, 1024))


def export_all(cases: Iterator[Case], folder: Path) -> list[dict[str, Any]]:
    """Every SAE in every format that holds it, with what it computes; writes cases.json."""
    written = []
    for number, (name, sae, facts, x_BD) in enumerate(cases):
        expected, latents_BS = f"{number}.expected", sae.encode(x_BD)
        tensors = {"x": x_BD, "latents": latents_BS, "x_hat": sae.decode(latents_BS)}
        norms = {"row_norms": sae.W_dec.norm(dim=1)}
        save_file({k: v.contiguous() for k, v in (tensors | norms).items()}, folder / expected)
        for format in FORMATS:
            try:
                inside = write_folder(sae, facts, format, folder / f"{number}_{format}")
            except InputError:
                continue
            path = str(inside.relative_to(folder))
            written.append({"name": name, "format": format, "path": path, "expected": expected})
    (folder / "cases.json").write_text(json.dumps(written))
    return written


def markdown(results: dict[str, Any]) -> str:
    """A row for each SAE, a column for each format."""
    by_name: dict[str, dict[str, Any]] = {}
    for each in results["cases"]:
        by_name.setdefault(each["name"], {})[each["format"]] = each
    lines = [f"| | largest latent | {' | '.join(FORMATS)} |", "| --- " * (len(FORMATS) + 2) + "|"]
    for name, found in by_name.items():
        cells = [_cell(found.get(format)) for format in FORMATS]
        largest = f"{next(iter(found.values()))['largest']:.1f}"
        lines.append(f"| {name} | {largest} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([*lines, "", versions])


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not held"
    if "error" in found:
        return str(found["error"])
    star = "*" if found["rescaled"] else ""
    return f"{found['encode']:.1e}, {max(found['decode'], found['both']):.1e}{star}"


def main(run_check: Callable[[str, str], object]) -> None:
    """Print the table."""
    for cases in (variants(), runs(sys.argv[1:])):
        with tempfile.TemporaryDirectory() as scratch:
            if export_all(cases, Path(scratch)):
                run_check("load", scratch)
                print(markdown(json.loads((Path(scratch) / "results.json").read_text())), "\n")


if __name__ == "__main__":
    from ..test_interop import run_check

    main(run_check)
