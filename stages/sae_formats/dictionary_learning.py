"""dictionary_learning: ae.pt, the state_dict as torch.save writes it, and config.json
(github.com/saprmarks/dictionary_learning).

# D d_in, S d_sae

config.json has `trainer` (dict_class decides what ae.pt is) and `buffer`. The pickle is written from a
plain dictionary of tensors and read with torch.load(weights_only=True) alone; see files.py.

Its loader keeps weights in float32, and scales the decoder rows of an AutoEncoder to norm 1 unless it
is told normalize_decoder=False: latents of `relu` SAEs with free rows are then larger by the norms.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from ...storage.errors import InputError
from ...storage.files import write_json, write_whole
from ..sae.base import Sae
from ..sae.jumprelu import JumpRelu
from ..sae.ksparse import KSparse
from ..sae.matryoshka import Matryoshka
from ..sae.weights import describe_sae, rebuild_sae
from .base import (
    SECTION,
    Layout,
    Place,
    SaeFormat,
    decoder_norm_of,
    fill,
    from_section,
    our_section,
    refuse,
    their_shapes,
    to_theirs,
)
from .facts import Facts, Json, number, real, section, text
from .files import agree, check_length, read_json, read_pt, whole_number

_ENCODER = {"encoder.weight": Place("W_enc", transposed=True), "encoder.bias": Place("b_enc")}
_DECODER = {"decoder.weight": Place("W_dec", transposed=True)}
_NAMED_AS_OURS = {name: Place(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
# What ae.pt holds, by dict_class.
_LAYOUTS: dict[str, Layout] = {
    "AutoEncoder": {"bias": Place("b_dec"), **_ENCODER, **_DECODER},
    "AutoEncoderNew": {**_ENCODER, **_DECODER, "decoder.bias": Place("b_dec")},
    "GatedAutoEncoder": {
        "decoder_bias": Place("b_dec"),
        "r_mag": Place("r_mag"),
        "gate_bias": Place("b_gate"),
        "mag_bias": Place("b_mag"),
        "encoder.weight": Place("W_enc", transposed=True),
        **_DECODER,
    },
    "JumpReluAutoEncoder": _NAMED_AS_OURS,
    "AutoEncoderTopK": {
        "b_dec": Place("b_dec"),
        **_DECODER,
        **_ENCODER,
        "threshold": Place("threshold"),
    },
    "MatryoshkaBatchTopKSAE": _NAMED_AS_OURS,
}
_LAYOUTS["BatchTopKSAE"] = _LAYOUTS["AutoEncoderTopK"]
# Architecture of ours -> dict_class and trainer_class. relu: see `_classes`.
_CLASSES = {
    "gated": ("GatedAutoEncoder", "GatedSAETrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batch_topk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "matryoshka": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    "p_anneal": ("AutoEncoder", "PAnnealTrainer"),
}
_APRIL = "StandardTrainerAprilUpdate"
_CHECKED = ("dict_class", "trainer_class", "activation_dim", "dict_size", "k")


class DictionaryLearning(SaeFormat):
    """The folder that utils.load_dictionary takes."""

    name = "dictionary_learning"
    tool = "dictionary_learning"
    config_file = "config.json"
    weights_file = "ae.pt"

    def check(self, sae: Sae, facts: Facts) -> None:
        if sae.W_dec.dtype != torch.float32:
            raise refuse(
                self.name,
                sae,
                f"its weights are {str(sae.W_dec.dtype).removeprefix('torch.')}, and the loader "
                "keeps float32",
                "--format saelens or safetensors",
            )
        if isinstance(sae, JumpRelu) and sae.subtracts_b_dec:
            raise refuse(
                self.name,
                sae,
                "its encoder sees x - b_dec, and there is no place to say so",
                "--format saelens or safetensors",
            )

    def write(self, sae: Sae, facts: Facts, folder: Path) -> Path:
        state = to_theirs(sae, _LAYOUTS[_classes(sae)[0]]) | _counts(sae)
        packed = io.BytesIO()
        torch.save(state, packed)
        write_whole(folder / self.weights_file, packed.getbuffer())
        config = {
            "trainer": _trainer(sae, facts),
            "buffer": {"d_submodule": sae.d_in, "ctx_len": facts.context_size},
            SECTION: our_section(sae, facts),
        }
        write_json(folder / self.config_file, config)
        return folder

    def loading(self, *, sae: Sae, facts: Facts, repo: str, folder: str) -> str:
        return (
            "from dictionary_learning.utils import load_dictionary\n"
            "from huggingface_hub import snapshot_download\n\n"
            f"place = snapshot_download({repo!r}, allow_patterns={folder + '/*'!r})\n"
            f'dictionary, config = load_dictionary(f"{{place}}/{folder}", "cpu")'
        )

    def sizes(self, folder: Path) -> tuple[int, int]:
        file = folder / self.config_file
        trainer = section(read_json(file), "trainer")
        return (
            whole_number(trainer, "activation_dim", file),
            whole_number(trainer, "dict_size", file),
        )

    def read(self, folder: Path) -> tuple[Sae, Facts]:
        file, weights = folder / self.config_file, folder / self.weights_file
        config = read_json(file)
        trainer = section(config, "trainer")
        dict_class = trainer.get("dict_class")
        if not isinstance(dict_class, str) or dict_class not in _LAYOUTS:
            raise InputError(
                f"{file} is of dict_class {str(dict_class)[:100]!r}, which sae-pipe does not read; "
                f"{', '.join(sorted(_LAYOUTS))} are read."
            )
        check_length(weights, *self.sizes(folder))
        known = from_section(config.get(SECTION), file)
        if known is None:
            sae, facts = _foreign(trainer, dict_class, file), _facts(trainer, config)
        else:
            sae, facts, _ = known
            agree(trainer, _trainer(sae, facts), _CHECKED, file)
        layout, counts = _LAYOUTS[dict_class], _counts_shapes(sae)
        tensors = read_pt(weights, their_shapes(sae, layout) | counts)
        if known is None:
            sae = _with_counts(sae, tensors, trainer, file)
        _check_counts(sae, tensors, weights)
        return fill(sae, {name: tensors[name] for name in layout}, layout), facts


def _classes(sae: Sae) -> tuple[str, str]:
    """dict_class and trainer_class."""
    description = describe_sae(sae)
    architecture = description["architecture"]
    if architecture in _CLASSES:
        return _CLASSES[architecture]
    if not sae.subtracts_b_dec:
        return "AutoEncoderNew", _APRIL
    return "AutoEncoder", "StandardTrainer" if sae.has_unit_rows else _APRIL


def _counts(sae: Sae) -> dict[str, Tensor]:
    """What a state_dict has beside weights, in the types that dictionary_learning gives them."""
    found: dict[str, Tensor] = {}
    if isinstance(sae, KSparse):
        found["k"] = torch.tensor(sae.k, dtype=torch.int32)
    if isinstance(sae, Matryoshka):
        found["group_sizes"] = torch.tensor(sae.group_sizes, dtype=torch.int64)
    return found


def _counts_shapes(sae: Sae) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in _counts(sae).items()}


def _check_counts(sae: Sae, tensors: dict[str, Tensor], file: Path) -> None:
    for name, expected in _counts(sae).items():
        if tensors[name].tolist() != expected.tolist():
            raise InputError(
                f"{file} has {name} {str(tensors[name].tolist())[:100]}, but its config says "
                f"{str(expected.tolist())[:100]}."
            )


def _trainer(sae: Sae, facts: Facts) -> Json:
    """The section `trainer` of config.json."""
    dict_class, trainer_class = _classes(sae)
    has_place = facts.layer is not None and facts.hook is not None
    fields: Json = {
        "trainer_class": trainer_class,
        "dict_class": dict_class,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lr": facts.lr,
        "steps": facts.steps,
        "seed": facts.seed,
        "device": "cpu",
        "layer": facts.layer,
        "lm_name": facts.model,
        "wandb_name": dict_class,
        "submodule_name": f"{facts.hook}_layer_{facts.layer}" if has_place else None,
    }
    if isinstance(sae, KSparse):
        fields["k"] = sae.k
    if isinstance(sae, Matryoshka):
        fields["group_fractions"] = [size / sae.d_sae for size in sae.group_sizes]
        fields["group_weights"] = list(sae.group_weights)
        fields["group_sizes"] = list(sae.group_sizes)
    return fields


def _foreign(trainer: Json, dict_class: str, file: Path) -> Sae:
    """The SAE without storage that dictionary_learning's own config describes."""
    options: Json = {"architecture": "relu", "k": None}
    if dict_class == "AutoEncoder" and trainer.get("trainer_class") == "PAnnealTrainer":
        options["architecture"] = "p_anneal"
    elif dict_class == "AutoEncoderNew":
        options |= {"subtract_b_dec": False, "decoder_norm": "free"}
    elif dict_class != "AutoEncoder":
        options["architecture"] = next(
            name for name, (known, _) in _CLASSES.items() if known == dict_class
        )
    if dict_class in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        options["k"] = whole_number(trainer, "k", file)
    sizes = [whole_number(trainer, name, file) for name in ("activation_dim", "dict_size")]
    options |= {"d_in": sizes[0], "d_sae": sizes[1]}
    if dict_class == "MatryoshkaBatchTopKSAE":
        options["group_sizes"] = _group_sizes(trainer, sizes[1], file)
        options["group_weights"] = _group_weights(trainer, options["group_sizes"])
    try:
        return rebuild_sae(options)
    except ValueError as error:
        raise InputError(f"{file} describes no SAE ({str(error)[:200]}).") from error


def _group_sizes(trainer: Json, d_sae: int, file: Path) -> list[int]:
    """As listed, or from the fractions: int(fraction * d_sae) each, the remainder to the last."""
    sizes, fractions = trainer.get("group_sizes"), trainer.get("group_fractions")
    if isinstance(sizes, list) and sizes and all(type(size) is int for size in sizes):
        return sizes
    if isinstance(fractions, list) and fractions and all(type(each) is float for each in fractions):
        found = [int(each * d_sae) for each in fractions[:-1]]
        return [*found, d_sae - sum(found)]
    raise InputError(f"{file} has no group_sizes, which a Matryoshka SAE needs.")


def _group_weights(trainer: Json, sizes: list[int]) -> list[float] | None:
    weights = trainer.get("group_weights")
    if not isinstance(weights, list) or len(weights) != len(sizes):
        return None
    return weights if all(type(each) is float for each in weights) else None


def _with_counts(sae: Sae, tensors: dict[str, Tensor], trainer: Json, file: Path) -> Sae:
    """The SAE with what only its weights tell: whether decoder rows are held at norm 1."""
    description = describe_sae(sae)
    if description["architecture"] != "relu" or not sae.subtracts_b_dec:
        return sae
    norm = decoder_norm_of(tensors["decoder.weight"].T.double())
    if trainer.get("trainer_class") == _APRIL:
        norm = "free"
    return rebuild_sae(description | {"decoder_norm": norm})


def _facts(trainer: Json, config: Json) -> Facts:
    """What dictionary_learning's config says of where the SAE comes from."""
    submodule = text(trainer, "submodule_name") or ""
    layer = number(trainer, "layer")
    return Facts(
        model=text(trainer, "lm_name"),
        layer=layer,
        hook="resid_post" if submodule == f"resid_post_layer_{layer}" else None,
        context_size=number(section(config, "buffer"), "ctx_len"),
        seed=number(trainer, "seed"),
        steps=number(trainer, "steps"),
        lr=real(trainer, "lr"),
        imported={
            "format": DictionaryLearning.name,
            "trainer_class": text(trainer, "trainer_class"),
            "submodule_name": submodule or None,
        },
    )
