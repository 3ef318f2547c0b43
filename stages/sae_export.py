"""A fitted SAE as a folder that another tool loads; the formats are in sae_formats/."""

from pathlib import Path

from ..storage.errors import InputError
from .sae.base import Sae
from .sae.hub import run_folder
from .sae.weights import read_config, read_sae
from .sae_formats import FORMATS, get_format
from .sae_formats.facts import Facts, facts_of
from .whole_folder import check_free, whole_folder


def export_sae(
    run: str | Path,
    format: str,
    out: Path,
    *,
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
) -> Path:
    """Write the SAE of a run (a folder or hf://USER/REPO) in a format; where its loader is to be
    pointed, which is `out` or a folder in it.

    model, layer, hook: of the activations, where the run does not say. Raises InputError that names
    what the format cannot hold, or when `out` exists; StoreError for an unfinished or damaged run.
    """
    if format not in FORMATS:
        raise InputError(f"Unknown --format {format!r}: choose one of {', '.join(FORMATS)}.")
    check_free(out)
    sae, facts = load_with_facts(run_folder(run))
    facts = facts.filled(model=model, layer=layer, hook=hook)
    return write_folder(sae, facts, format, out)


def load_with_facts(run: Path) -> tuple[Sae, Facts]:
    """The SAE of a run folder, on the CPU, and what is known of it. Raises StoreError."""
    from .devices import pick_device

    return read_sae(run, pick_device("cpu")), facts_of(read_config(run))


def write_folder(sae: Sae, facts: Facts, format: str, out: Path) -> Path:
    """The same for an SAE in memory that takes raw activations."""
    form = get_format(format)
    form.check(sae, facts)
    with whole_folder(out) as unfinished:
        inside = form.write(sae, facts, unfinished).relative_to(unfinished)
    return out / inside
