"""One file, sae.safetensors: tensors under our names, and in its header what describes them.

The header's entry `sae_pipe` is JSON with `config`, a run's config.json as it may travel. Every
architecture is held, in its number format. `safetensors.safe_open(...).metadata()` shows it.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ...storage.errors import InputError
from ...storage.files import write_whole
from ..sae.base import Sae
from ..sae.weights import CONFIG_LIMIT_BYTES
from .base import SECTION, Place, SaeFormat, fill, from_section, our_section
from .facts import Facts
from .files import check_file, check_length, parse_json, read_safetensors


class Plain(SaeFormat):
    """A file on its own."""

    name = "safetensors"
    tool = "safetensors"
    config_file = ""
    weights_file = "sae.safetensors"

    def check(self, sae: Sae, facts: Facts) -> None:
        """Everything is held."""

    def write(self, sae: Sae, facts: Facts, folder: Path) -> Path:
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()
        }
        text = json.dumps(our_section(sae, facts), allow_nan=False)
        write_whole(folder / self.weights_file, save(tensors, {"format": "pt", SECTION: text}))
        return folder

    def loading(self, *, sae: Sae, facts: Facts, repo: str, folder: str) -> str:
        return (
            "from huggingface_hub import hf_hub_download\n"
            "from safetensors.torch import load_file\n\n"
            f"tensors = load_file(hf_hub_download({repo!r}, {f'{folder}/{self.weights_file}'!r}))"
        )

    def read(self, folder: Path) -> tuple[Sae, Facts]:
        file = folder / self.weights_file
        known = from_section(_header(file), file)
        if known is None:
            raise InputError(
                f"{file} holds tensors without saying what they are: its header has no entry "
                f"{SECTION}. Pass the folder of the tool that wrote it, with its config."
            )
        sae, facts, _ = known
        check_length(file, sae.d_in, sae.d_sae)
        shapes = dict(sae.parameter_shapes())
        tensors = read_safetensors(file, shapes)
        return fill(sae, tensors, {name: Place(name) for name in shapes}), facts

    def is_in(self, names: set[str]) -> bool:
        # With a config beside it, the file is of the tool that wrote the config.
        return self.weights_file in names and not {"cfg.json", "config.json"} & names


def _header(file: Path) -> object:
    """The JSON of our entry, None without one."""
    check_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(SECTION)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is damaged: it is not a safetensors file ({error}). Fetch it again."
        ) from error
    if text is None:
        return None
    if len(text) > CONFIG_LIMIT_BYTES:
        raise InputError(f"The header of {file} is larger than that of any SAE.")
    return parse_json(text, f"The header of {file}")
