"""SAELens 6: cfg.json and sae_weights.safetensors (github.com/decoderesearch/SAELens).

# D d_in, S d_sae

Its architectures are standard, gated, topk and jumprelu; x_hat and latents are computed as here. It
has no BatchTopK or Matryoshka at inference: both are jumprelu with the same threshold for all latents,
k and the groups' ends in `metadata.training_architecture_details`, where SAELens itself puts them.

Read as well: configs from before version 6, TopK with `rescale_acts_by_decoder_norm` (norms are folded
into the encoder, by which latents and reconstructions stay), and half precision (as float32). Not read:
input normalisation at run time, hook_z reshaping, transcoders.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...storage.errors import InputError
from ...storage.files import write_json, write_whole
from ..sae.base import Sae
from ..sae.batch_topk import BatchTopK
from ..sae.gated import Gated
from ..sae.jumprelu import JumpRelu
from ..sae.matryoshka import Matryoshka
from ..sae.topk import TopK
from ..sae.weights import describe_sae, rebuild_sae
from ..taps import HOOKS
from .base import (
    SECTION,
    Layout,
    Place,
    SaeFormat,
    decoder_norm_of,
    fill,
    from_section,
    is_constant,
    our_section,
    their_shapes,
    to_theirs,
)
from .facts import Facts, Json, number, section, text, truth
from .files import agree, check_length, read_json, read_safetensors, whole_number

SAE_LENS_VERSION = "6.54.12"  # whose loader reads what is written here, by test
_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_([a-z_]+)")
_SHARED = {"W_enc": Place("W_enc"), "W_dec": Place("W_dec"), "b_dec": Place("b_dec")}
_WITH_BIAS: Layout = _SHARED | {"b_enc": Place("b_enc")}
_GATED: Layout = _SHARED | {name: Place(name) for name in ("b_gate", "b_mag", "r_mag")}
_TRAINED_AS = {"batch_topk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
_CHECKED = ("architecture", "d_in", "d_sae", "apply_b_dec_to_input", "k")


class SaeLens(SaeFormat):
    """The folder that SAE.load_from_disk takes."""

    name = "saelens"
    tool = "SAELens"
    config_file = "cfg.json"
    weights_file = "sae_weights.safetensors"

    def check(self, sae: Sae, facts: Facts) -> None:
        """Everything that a fit can make is held."""

    def write(self, sae: Sae, facts: Facts, folder: Path) -> Path:
        write_whole(
            folder / self.weights_file, save(to_theirs(sae, _layout(sae)), {"format": "pt"})
        )
        write_json(folder / self.config_file, _fields(sae) | {"metadata": _metadata(sae, facts)})
        return folder

    def loading(self, *, sae: Sae, facts: Facts, repo: str, folder: str) -> str:
        return f"from sae_lens import SAE\n\nsae = SAE.from_pretrained({repo!r}, {folder!r})"

    def sizes(self, folder: Path) -> tuple[int, int]:
        config = read_json(folder / self.config_file)
        return tuple(  # type: ignore[return-value]
            whole_number(config, name, folder / self.config_file) for name in ("d_in", "d_sae")
        )

    def read(self, folder: Path) -> tuple[Sae, Facts]:
        file = folder / self.config_file
        found = _Found.of(read_json(file), file)
        weights = folder / self.weights_file
        check_length(weights, found.d_in, found.d_sae)
        known = from_section(found.metadata.get(SECTION), file)
        if known is None:
            tensors = read_safetensors(weights, their_shapes(found.sae(), _layout(found.sae())))
            sae, tensors = _foreign(found, tensors)
            return fill(sae, tensors, _layout(sae)), found.facts()
        sae, facts, threshold = known
        agree(found.fields, _fields(sae), _CHECKED, file)
        tensors = read_safetensors(weights, their_shapes(sae, _layout(sae)))
        if isinstance(sae, BatchTopK) and not is_constant(tensors["threshold"]):
            raise InputError(
                f"{weights} has a threshold for each latent, but {file} calls it a "
                f"{describe_sae(sae)['architecture']} SAE, which has one for all. Remove its "
                f"section {SECTION} to read it as jumprelu."
            )
        others = {"threshold": threshold} if isinstance(sae, TopK) and threshold is not None else {}
        return fill(sae, tensors, _layout(sae), **others), facts


# --- out ---


def _layout(sae: Sae) -> Layout:
    """Which of our tensors is which of SAELens."""
    if isinstance(sae, Gated):
        return _GATED
    if isinstance(sae, JumpRelu | BatchTopK):
        return {**_WITH_BIAS, "threshold": Place("threshold", spread=isinstance(sae, BatchTopK))}
    return _WITH_BIAS


def _fields(sae: Sae) -> Json:
    """cfg.json without its metadata."""
    kinds = ((Gated, "gated"), (TopK, "topk"), (JumpRelu, "jumprelu"), (BatchTopK, "jumprelu"))
    architecture = next((name for kind, name in kinds if isinstance(sae, kind)), "standard")
    fields: Json = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtracts_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if isinstance(sae, TopK):
        fields |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return fields


def _metadata(sae: Sae, facts: Facts) -> Json:
    trained: Json = {}
    name = _TRAINED_AS.get(describe_sae(sae)["architecture"])
    if name is not None:
        details: Json = {"k": sae.k, "rescale_acts_by_decoder_norm": False}
        if isinstance(sae, Matryoshka):
            details["matryoshka_widths"] = list(itertools.accumulate(sae.group_sizes))
        trained = {"training_architecture": name, "training_architecture_details": details}
    has_place = facts.layer is not None and facts.hook is not None
    return {
        "sae_lens_version": SAE_LENS_VERSION,
        "model_name": facts.model,
        "hook_name": f"blocks.{facts.layer}.hook_{facts.hook}" if has_place else None,
        "hook_head_index": None,
        "context_size": facts.context_size,
        "prepend_bos": facts.prepends_bos,
        **trained,
        SECTION: our_section(sae, facts),
    }


# --- in ---


@dataclass(frozen=True)
class _Found:
    """What a cfg.json says. fields: as version 6 has them; metadata: where it came from."""

    fields: Json
    metadata: Json
    file: Path

    @classmethod
    def of(cls, config: Json, file: Path) -> _Found:
        """Checked to be an SAE that can be held. Raises InputError that names what cannot."""
        fields = _as_version_6(config)
        metadata = section(config, "metadata") or config
        found = cls(fields, metadata, file)
        known = ("standard", "gated", "topk", "jumprelu")
        if fields["architecture"] not in known:
            raise found._unheld(
                f"architecture {str(fields['architecture'])[:100]!r}; {', '.join(known)} are read"
            )
        for name in ("normalize_activations", "reshape_activations"):
            if fields[name] != "none":
                raise found._unheld(f"{name} {str(fields[name])[:100]!r} at run time")
        if fields["activation_fn"] not in ("relu", "topk"):
            raise found._unheld(f"activation_fn {str(fields['activation_fn'])[:100]!r}")
        if fields["finetuning_scaling_factor"] not in (False, None):
            raise found._unheld("a finetuning_scaling_factor")
        if type(fields["apply_b_dec_to_input"]) is not bool:
            raise found._unheld("apply_b_dec_to_input that is neither true nor false")
        if fields["architecture"] in ("gated", "topk") and not fields["apply_b_dec_to_input"]:
            raise found._unheld(
                f"apply_b_dec_to_input false; {fields['architecture']} SAEs subtract b_dec here"
            )
        for name in ("d_in", "d_sae", *(["k"] if fields["architecture"] == "topk" else [])):
            whole_number(fields, name, file)
        return found

    def _unheld(self, what: str) -> InputError:
        return InputError(f"{self.file} is of an SAE that sae-pipe cannot hold: it has {what}.")

    @property
    def d_in(self) -> int:
        return int(self.fields["d_in"])

    @property
    def d_sae(self) -> int:
        return int(self.fields["d_sae"])

    def sae(self, **changes: Any) -> Sae:
        """The SAE without storage, of the architecture that its tensors are read as."""
        subtract = {"subtract_b_dec": self.fields["apply_b_dec_to_input"]}
        options = {
            "standard": {"architecture": "relu", **subtract},
            "gated": {"architecture": "gated"},
            "topk": {"architecture": "topk"},
            "jumprelu": {"architecture": "jumprelu", **subtract},
        }[self.fields["architecture"]]
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae, "k": self.fields["k"]}
        try:
            return rebuild_sae(sizes | options | changes)
        except ValueError as error:
            raise self._unheld(f"a config that describes no SAE ({str(error)[:200]})") from error

    def facts(self) -> Facts:
        hook_name = text(self.metadata, "hook_name") or text(self.metadata, "hook_point") or ""
        place = _HOOK.fullmatch(hook_name)
        hook = place[2] if place is not None and place[2] in HOOKS else None
        return Facts(
            model=text(self.metadata, "model_name"),
            layer=int(place[1]) if place is not None else number(self.metadata, "hook_layer"),
            hook=hook,
            context_size=number(self.metadata, "context_size"),
            prepends_bos=truth(self.metadata, "prepend_bos"),
            imported={"format": SaeLens.name, "hook_name": hook_name or None},
        )


def _as_version_6(config: Json) -> Json:
    """The fields of any version, with what an older one leaves out."""
    kwargs = section(config, "activation_fn_kwargs")
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    is_topk = config.get("architecture", "standard") == "topk" or activation == "topk"
    architecture = "topk" if is_topk else config.get("architecture", "standard")
    normalised = config.get("normalize_activations")
    if isinstance(normalised, bool) or normalised is None:  # of version 3
        normalised = "expected_average_only_in" if normalised else "none"
    return {
        "architecture": architecture,
        "d_in": config.get("d_in"),
        "d_sae": config.get("d_sae"),
        "apply_b_dec_to_input": config.get("apply_b_dec_to_input", True),
        "normalize_activations": normalised,
        "reshape_activations": config.get("reshape_activations") or "none",
        "activation_fn": activation,
        "finetuning_scaling_factor": config.get("finetuning_scaling_factor"),
        "rescale_acts_by_decoder_norm": config.get("rescale_acts_by_decoder_norm") is True,
        "k": config.get("k", kwargs.get("k")) if architecture == "topk" else None,
    }


def _foreign(found: _Found, tensors: dict[str, Tensor]) -> tuple[Sae, dict[str, Tensor]]:
    """The architecture of ours that these tensors are, and the tensors with norms folded."""
    architecture = found.fields["architecture"]
    if architecture == "standard":
        return found.sae(decoder_norm=decoder_norm_of(tensors["W_dec"].double())), tensors
    if architecture == "topk" and found.fields["rescale_acts_by_decoder_norm"]:
        return found.sae(), _fold_norms(tensors)
    if architecture == "jumprelu":
        options = _batch_wise(found.metadata, found.d_sae)
        subtracts = found.fields["apply_b_dec_to_input"]
        if options and subtracts and is_constant(tensors["threshold"]):
            sizes = {"d_in": found.d_in, "d_sae": found.d_sae}
            return rebuild_sae(sizes | options), tensors
    return found.sae(), tensors


def _batch_wise(metadata: Mapping[str, Any], d_sae: int) -> Json:
    """Our section of a BatchTopK or Matryoshka SAE that is kept as jumprelu; empty if it is none."""
    details = section(metadata, "training_architecture_details")
    trained_as, k = metadata.get("training_architecture"), details.get("k")
    if isinstance(k, float) and k.is_integer():  # SAELens allows fractions
        k = int(k)
    if type(k) is not int or not 0 < k <= d_sae:
        return {}
    if trained_as == "batchtopk":
        return {"architecture": "batch_topk", "k": k}
    widths = details.get("matryoshka_widths")
    if trained_as != "matryoshka_batchtopk" or not isinstance(widths, list) or not widths:
        return {}
    if any(type(width) is not int for width in widths):
        return {}
    ends = [0, *widths] if widths[-1] == d_sae else [0, *widths, d_sae]
    sizes = [end - start for start, end in itertools.pairwise(ends)]
    if min(sizes) < 1:
        return {}
    return {"architecture": "matryoshka", "k": k, "group_sizes": sizes}


def _fold_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decoder rows to norm 1, the encoder times the norms: SAELens selects by, and gives out,
    pre-activations times the norm, and divides by it again before decoding."""
    W_dec_SD = tensors["W_dec"].double()
    norm_S = W_dec_SD.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return tensors | {
        "W_enc": (tensors["W_enc"].double() * norm_S).float(),
        "b_enc": (tensors["b_enc"].double() * norm_S).float(),
        "W_dec": (W_dec_SD / norm_S[:, None]).float(),
    }
