"""The real packages, in an environment of their own (build_env.sh): what they make of our folders, and
folders of theirs for us to read.

    python check.py versions
    python check.py load FOLDER    cases.json of FOLDER -> results.json
    python check.py make FOLDER    SAEs that the packages themselves save, with what they compute
    python check.py card FILE      runs the Python of a model card, block by block -> what each loads

Knows nothing of sae-pipe. A case is {"name", "format", "path", "expected"}; `expected` is a safetensors
file with x (B, D), latents (B, S), x_hat (B, D), and row_norms (S) of the decoder.
"""

import contextlib
import io
import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
PACKAGES = ("torch", "sae-lens", "dictionary-learning", "eai-sparsify", "sae-bench", "safetensors")
D_IN, D_SAE, K = 12, 48, 5


# --- their loaders: a path -> encode and decode ---


def load_saelens(path: Path) -> Any:
    from sae_lens import SAE

    sae = SAE.load_from_disk(path)
    return sae.encode, sae.decode, False


def load_dictionary_learning(path: Path) -> Any:
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(path), "cpu")
    scales = type(dictionary).__name__ == "AutoEncoder"  # its rows to norm 1, unless told not to
    return dictionary.encode, dictionary.decode, scales


def load_sparsify(path: Path) -> Any:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(path)

    def decode(latents: torch.Tensor) -> Any:
        top = latents.topk(coder.cfg.k, dim=1)
        return coder.decode(top.values, top.indices)

    return encoder_of(coder), decode, False


def encoder_of(coder: Any) -> Any:
    """sparsify gives the k latents of a row and their indices; here are all of them."""

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = coder.encode(x)
        dense = torch.zeros(len(x), coder.num_latents, dtype=x.dtype)
        return dense.scatter(1, found.top_indices, found.top_acts)

    return encode


def load_saebench(path: Path) -> Any:
    from sae_bench.custom_saes import batch_topk_sae, gated_sae, jumprelu_sae, relu_sae, topk_sae

    loaders = {
        "MatryoshkaBatchTopKTrainer": (
            batch_topk_sae.load_dictionary_learning_matryoshka_batch_topk_sae
        ),
        "BatchTopKTrainer": batch_topk_sae.load_dictionary_learning_batch_topk_sae,
        "TopKTrainer": topk_sae.load_dictionary_learning_topk_sae,
        "StandardTrainerAprilUpdate": relu_sae.load_dictionary_learning_relu_sae,
        "StandardTrainer": relu_sae.load_dictionary_learning_relu_sae,
        "PAnnealTrainer": relu_sae.load_dictionary_learning_relu_sae,
        "JumpReluTrainer": jumprelu_sae.load_dictionary_learning_jump_relu_sae,
        "GatedSAETrainer": gated_sae.load_dictionary_learning_gated_sae,
    }
    trainer = json.loads((path / "config.json").read_text())["trainer"]
    sae = loaders[trainer["trainer_class"]](
        repo_id="nobody/nothing",  # offline: the files that are in local_dir are taken
        filename=f"{path.name}/ae.pt",
        model_name=trainer["lm_name"].split("/")[-1],
        device="cpu",
        dtype=torch.float32,
        layer=trainer["layer"],
        local_dir=str(path.parent),
    )
    return sae.encode, sae.decode, "Standard" in trainer["trainer_class"]


def load_safetensors(path: Path) -> Any:
    """numpy, from the formulas."""
    file = path / "sae.safetensors"
    with safe_open(file, "np") as opened:
        section = json.loads(opened.metadata()["sae_pipe"])["config"]["sae"]
        w = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    architecture = section["architecture"]
    subtracts = section.get("subtract_b_dec", architecture != "jumprelu")

    def encode(x: torch.Tensor) -> torch.Tensor:
        pre = (x.numpy() - w["b_dec"] * subtracts) @ w["W_enc"]
        if architecture == "gated":
            size = np.maximum(np.exp(w["r_mag"]) * pre + w["b_mag"], 0)
            return torch.from_numpy(size * (pre + w["b_gate"] > 0))
        pre = pre + w["b_enc"]
        latents = np.maximum(pre, 0)
        if architecture in ("batch_topk", "matryoshka", "jumprelu"):
            latents = latents * (pre > w["threshold"])
        if architecture == "topk":
            kept = np.sort(latents, axis=1)[:, -section["k"], None]
            latents = latents * (latents >= kept)
        return torch.from_numpy(latents)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(latents.numpy() @ w["W_dec"] + w["b_dec"])

    return encode, decode, False


LOADERS = {
    "saelens": load_saelens,
    "dictionary_learning": load_dictionary_learning,
    "sparsify": load_sparsify,
    "safetensors": load_safetensors,
    "saebench": load_saebench,
}


def check(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The largest differences of one case; `error` when the package does not load it."""
    expected = load_file(folder / case["expected"])
    try:
        encode, decode, scales = LOADERS[case["format"]](folder / case["path"])
        with torch.no_grad():
            latents, x_hat = encode(expected["x"].clone()), decode(expected["latents"].clone())
            both = decode(latents)
    except Exception as error:  # noqa: BLE001  # whatever a package raises is the result
        return case | {"error": f"{type(error).__name__}: {error}"}
    norms = expected["row_norms"]
    if scales and not torch.allclose(norms, torch.ones_like(norms)):
        latents, x_hat = latents / norms, both
    return case | {
        "rescaled": bool(scales and not torch.allclose(norms, torch.ones_like(norms))),
        "encode": float((latents - expected["latents"]).abs().max()),
        "decode": float((x_hat - expected["x_hat"]).abs().max()),
        "both": float((both - expected["x_hat"]).abs().max()),
        "largest": float(expected["latents"].abs().max()),
        "active": float((expected["latents"] > 0).float().sum(dim=1).mean()),
    }


def load(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    results = []
    for case in cases:
        with contextlib.redirect_stdout(io.StringIO()):
            results.append(check(case, folder))
    (folder / "results.json").write_text(json.dumps({"versions": versions(), "cases": results}))


def card(text: str, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of latents, for each tool whose lines in a card load the SAE."""
    found = {}
    for tool, code in re.findall(
        r"^With (\S+):\n\n```python\n(.*?)```", text, re.DOTALL | re.MULTILINE
    ):
        if tool in ("sae-pipe", "safetensors"):
            continue
        names: dict[str, Any] = {}
        exec(code, names)  # noqa: S102  # of the card that the test has generated
        sae = next(names[name] for name in ("sae", "dictionary", "coder") if name in names)
        encode = encoder_of(sae) if tool == "sparsify" else sae.encode
        with torch.no_grad():
            latents = encode(expected["x"].clone())
        found[tool] = float((latents - expected["latents"]).abs().max())
    return found


# --- their writers ---


def make(folder: Path) -> None:
    torch.manual_seed(0)
    made = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for group in (make_saelens, make_dictionary_learning, make_sparsify):
            for name, (format, encode, decode) in group(folder).items():
                x = torch.randn(40, D_IN) + 0.7
                with torch.no_grad():
                    latents = encode(x.clone())
                    x_hat = decode(latents.clone())
                save_file(
                    {"x": x, "latents": latents.contiguous(), "x_hat": x_hat.contiguous()},
                    folder / f"{name}.expected",
                )
                made[name] = format
    (folder / "made.json").write_text(json.dumps({"versions": versions(), "made": made}))


def randomise(module: Any, *, unit: bool = True) -> None:
    """Weights that are nowhere 0, so that every one of them counts."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn_like(value) * 0.3)
            if "threshold" in name:
                value.abs_()
        for name, value in module.named_parameters():
            if name in ("W_dec", "decoder.weight") and unit:
                along = 0 if name == "decoder.weight" else 1
                value.div_(value.norm(dim=along, keepdim=True))


def make_saelens(folder: Path) -> dict[str, Any]:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    sizes: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    where = {"model_name": "pythia-70m", "hook_name": "blocks.3.hook_resid_post"}
    kinds: dict[str, Any] = {
        "standard": StandardSAE(StandardSAEConfig(**sizes)),
        "standard_without_b_dec": StandardSAE(
            StandardSAEConfig(**sizes, apply_b_dec_to_input=False)
        ),
        "gated": GatedSAE(GatedSAEConfig(**sizes)),
        "topk": TopKSAE(TopKSAEConfig(**sizes, k=K)),
        "topk_rescaled": TopKSAE(TopKSAEConfig(**sizes, k=K, rescale_acts_by_decoder_norm=True)),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**sizes)),
        "jumprelu_without_b_dec": JumpReLUSAE(
            JumpReLUSAEConfig(**sizes, apply_b_dec_to_input=False)
        ),
    }
    found = {}
    for name, sae in kinds.items():
        randomise(sae, unit=False)
        sae.cfg.metadata = SAEMetadata(**where, context_size=128, prepend_bos=True)
        sae.save_model(folder / f"saelens_{name}")
        found[f"saelens_{name}"] = ("saelens", sae.encode, sae.decode)
    for name, training in {
        "batchtopk": BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(**sizes, k=K, rescale_acts_by_decoder_norm=False)
        ),
        "matryoshka": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                **sizes,
                k=K,
                rescale_acts_by_decoder_norm=False,
                matryoshka_widths=[8, 24, D_SAE],
            )
        ),
    }.items():
        randomise(training)
        for key, value in where.items():
            training.cfg.metadata[key] = value
        training.topk_threshold.fill_(0.4)
        training.save_inference_model(folder / f"saelens_{name}")
        from sae_lens import SAE

        sae = SAE.load_from_disk(folder / f"saelens_{name}")
        found[f"saelens_{name}"] = ("saelens", sae.encode, sae.decode)
    return found


def make_dictionary_learning(folder: Path) -> dict[str, Any]:
    from dictionary_learning.dictionary import (
        AutoEncoder,
        AutoEncoderNew,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
    )
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    kinds: dict[str, Any] = {
        "AutoEncoder": AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": AutoEncoderNew(D_IN, D_SAE),
        "GatedAutoEncoder": GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": JumpReluAutoEncoder(D_IN, D_SAE),
        "AutoEncoderTopK": AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [8, 16, 24]),
    }
    found = {}
    for name, dictionary in kinds.items():
        randomise(dictionary, unit=name != "AutoEncoderNew")
        if hasattr(dictionary, "k"):
            dictionary.threshold.fill_(0.4)
        inside = folder / f"dictionary_learning_{name}"
        inside.mkdir()
        torch.save(dictionary.state_dict(), inside / "ae.pt")
        trainer = {
            "trainer_class": f"{name}Trainer",
            "dict_class": name,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "layer": 3,
            "lm_name": "EleutherAI/pythia-70m",
            "submodule_name": "resid_post_layer_3",
        }
        if hasattr(dictionary, "k"):
            trainer["k"] = K
        if name.startswith("Matryoshka"):
            trainer["group_sizes"] = [8, 16, 24]
        (inside / "config.json").write_text(
            json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}})
        )
        found[inside.name] = ("dictionary_learning", dictionary.encode, dictionary.decode)
    return found


def make_sparsify(folder: Path) -> dict[str, Any]:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))
    randomise(coder)
    inside = folder / "sparsify_topk" / "layers.3"
    coder.save_to_disk(inside)
    encode, decode, _ = load_sparsify(inside)
    return {"sparsify_topk": ("sparsify", encode, decode)}


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def main() -> None:
    command, *rest = sys.argv[1:]
    if command == "versions":
        print(json.dumps(versions()))
    elif command == "card":
        with contextlib.redirect_stdout(io.StringIO()):
            found = card(Path(rest[0]).read_text(), load_file(rest[1]))
        print(json.dumps(found))
    else:
        {"load": load, "make": make}[command](Path(rest[0]))


if __name__ == "__main__":
    main()
