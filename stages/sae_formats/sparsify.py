"""sparsify: a folder for each hook point with cfg.json and sae.safetensors
(github.com/EleutherAI/sparsify, on PyPI eai-sparsify).

# D d_in, S d_sae

It has TopK SAEs only. A hook point is the name of a module of the model without head, whose output is
meant: `layers.8` is the residual stream after block 8 (`h.8` of GPT-2).
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save

from ...storage.errors import InputError
from ...storage.files import write_json, write_whole
from ..sae.base import Sae
from ..sae.topk import TopK
from ..sae.weights import rebuild_sae
from .base import (
    SECTION,
    Layout,
    Place,
    SaeFormat,
    fill,
    from_section,
    our_section,
    refuse,
    their_shapes,
    to_theirs,
)
from .facts import Facts, Json
from .files import agree, check_length, read_json, read_safetensors, whole_number

_LAYOUT: Layout = {
    "encoder.weight": Place("W_enc", transposed=True),
    "encoder.bias": Place("b_enc"),
    "W_dec": Place("W_dec"),
    "b_dec": Place("b_dec"),
}
_BLOCKS = {"gpt2": "h"}  # what the list of blocks is called; elsewhere `layers`
_PLACE = re.compile(r"(?:layers|h)\.(\d{1,4})")
_CHECKED = ("d_in", "k", "num_latents", "activation", "multi_topk")
_MULTI_TOPK = 1 / 8  # its weight of the loss with 4 k latents


class Sparsify(SaeFormat):
    """The folder that SparseCoder.load_from_disk takes, inside the one that load_many takes."""

    name = "sparsify"
    tool = "sparsify"
    config_file = "cfg.json"
    weights_file = "sae.safetensors"

    def check(self, sae: Sae, facts: Facts) -> None:
        if not isinstance(sae, TopK):
            raise refuse(
                self.name,
                sae,
                "it has TopK SAEs only, which keep k latents a row and have no threshold",
                "--format saelens or safetensors",
            )
        if facts.layer is None:
            raise InputError(
                f"{self.name} names a folder after the layer, which the run does not say. "
                "Pass --layer."
            )
        if facts.hook not in ("resid_post", None):
            raise refuse(
                self.name,
                sae,
                f"it was fitted on {facts.hook}, and sparsify has the outputs of modules, of which "
                "only whole blocks are written here",
                "--format saelens or safetensors",
            )

    def write(self, sae: Sae, facts: Facts, folder: Path) -> Path:
        inside = folder / f"{_BLOCKS.get(facts.family or '', 'layers')}.{facts.layer}"
        inside.mkdir()
        write_whole(inside / self.weights_file, save(to_theirs(sae, _LAYOUT), {"format": "pt"}))
        write_json(inside / self.config_file, _fields(sae) | {SECTION: our_section(sae, facts)})
        return inside

    def loading(self, *, sae: Sae, facts: Facts, repo: str, folder: str) -> str:
        return (
            "from sparsify import SparseCoder\n\n"
            f"coder = SparseCoder.load_from_hub({repo!r}, hookpoint={folder!r})"
        )

    def sizes(self, folder: Path) -> tuple[int, int]:
        file = folder / self.config_file
        return _sizes(read_json(file), file)

    def read(self, folder: Path) -> tuple[Sae, Facts]:
        file, weights = folder / self.config_file, folder / self.weights_file
        config = read_json(file)
        _check_held(config, file)
        d_in, d_sae = _sizes(config, file)
        check_length(weights, d_in, d_sae)
        known = from_section(config.get(SECTION), file)
        if known is None:
            tensors = read_safetensors(weights, their_shapes(_foreign(config, file), _LAYOUT))
            return fill(_foreign(config, file), tensors, _LAYOUT), _facts(folder)
        sae, facts, threshold = known
        if not isinstance(sae, TopK) or threshold is None:
            raise InputError(
                f"{file} contradicts itself: sparsify has TopK SAEs, and its section {SECTION} "
                "describes another. Remove that section to believe the rest."
            )
        agree(config, _fields(sae), _CHECKED, file)
        tensors = read_safetensors(weights, their_shapes(sae, _LAYOUT))
        return fill(sae, tensors, _LAYOUT, threshold=threshold), facts


def _fields(sae: Sae) -> Json:
    return {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),  # num_latents counts
        "normalize_decoder": sae.has_unit_rows,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": isinstance(sae, TopK) and sae.multi_topk > 0,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }


def _check_held(config: Json, file: Path) -> None:
    """InputError that names what cannot be held."""
    others = {"activation": "topk", "skip_connection": False, "transcode": False, "signed": False}
    for name, expected in others.items():
        found = config.get(name, expected)
        if found != expected:
            raise InputError(
                f"{file} is of an SAE that sae-pipe cannot hold: it has {name} "
                f"{str(found)[:100]!r}."
            )


def _sizes(config: Json, file: Path) -> tuple[int, int]:
    d_in = whole_number(config, "d_in", file)
    if config.get("num_latents"):
        return d_in, whole_number(config, "num_latents", file)
    return d_in, whole_number(
        {"d_sae": d_in * whole_number(config, "expansion_factor", file)}, "d_sae", file
    )


def _foreign(config: Json, file: Path) -> Sae:
    d_in, d_sae = _sizes(config, file)
    k = whole_number(config, "k", file)
    multi_topk = _MULTI_TOPK if config.get("multi_topk") is True else 0.0
    return rebuild_sae(
        {"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": k, "multi_topk": multi_topk}
    )


def _facts(folder: Path) -> Facts:
    """All that the folder's name says."""
    name = folder.resolve().name
    place = _PLACE.fullmatch(name)
    return Facts(
        layer=int(place[1]) if place else None,
        hook="resid_post" if place else None,
        imported={"format": Sparsify.name, "hookpoint": name[:200]},
    )
