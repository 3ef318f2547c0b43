"""Every kind of SAE in every format: it comes back as it left, or is refused in a sentence; and what
other tools, older versions and strangers may have written.

# B rows, D d_in, S d_sae
"""

import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.sae import ARCHITECTURES, get_architecture, load_sae
from sae_pipe.stages.sae.base import Sae
from sae_pipe.stages.sae.weights import describe_sae, save_sae
from sae_pipe.stages.sae_export import export_sae, write_folder
from sae_pipe.stages.sae_formats import FORMATS, get_format
from sae_pipe.stages.sae_formats.facts import Facts, config_of, facts_of
from sae_pipe.stages.sae_import import import_sae, write_run
from sae_pipe.storage import InputError

from .saes import D_IN, D_SAE, FACTS, VARIANTS, K, make_sae, some_x

SPARSIFY = (
    "sparsify cannot hold this {arch} SAE: it has TopK SAEs only, which keep k latents a row and "
    "have no threshold. Export it with --format saelens or safetensors."
)
# What is not held, with the sentence; everything else comes back as it left.
REFUSED = {
    **{
        (variant, "sparsify"): SPARSIFY.format(arch=arch)
        for variant, (arch, _) in VARIANTS.items()
        if arch != "topk"
    },
    ("jumprelu of x - b_dec", "dictionary_learning"): (
        "dictionary_learning cannot hold this jumprelu SAE: its encoder sees x - b_dec, and there "
        "is no place to say so. Export it with --format saelens or safetensors."
    ),
    ("jumprelu of x - b_dec", "saebench"): (
        "saebench cannot hold this jumprelu SAE: its encoder sees x - b_dec, and there is no place "
        "to say so. Export it with --format saelens or safetensors."
    ),
    ("relu of April 2024", "saebench"): (
        "saebench cannot hold this relu SAE: its encoder sees x, and the loader's x - b_dec. Export "
        "it with --format saelens, which SAEBench takes as well."
    ),
}


def quiet(_: str) -> None: ...


def same(found: Sae, expected: Sae) -> bool:
    """Whether two SAEs are the same to the bit, and described alike."""
    ours, theirs = expected.state_dict(), found.state_dict()
    return describe_sae(found) == describe_sae(expected) and all(
        value.dtype == theirs[name].dtype and torch.equal(value, theirs[name])
        for name, value in ours.items()
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_sae_comes_back_as_it_left_or_is_refused_by_name(
    variant: str, format: str, tmp_path: Path
) -> None:
    sae, message = make_sae(variant), REFUSED.get((variant, format))
    if message is not None:
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            write_folder(sae, FACTS, format, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    folder = write_folder(sae, FACTS, format, tmp_path / "out")
    found, facts = get_format(format).read(folder)
    assert same(found, sae)
    assert facts == FACTS.__class__(**vars(FACTS) | {"run": facts.run})
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert torch.equal(found.encode(some_x()), sae.encode(some_x()))


@pytest.mark.parametrize("format", ["saelens", "safetensors"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_double_precision_is_kept(arch: str, format: str, tmp_path: Path) -> None:
    sae = make_sae(arch).double()
    found, _ = get_format(format).read(write_folder(sae, FACTS, format, tmp_path / "out"))
    assert same(found, sae)


@pytest.mark.parametrize("format", ["dictionary_learning", "saebench"])
def test_double_precision_is_refused_where_the_loader_would_round(
    format: str, tmp_path: Path
) -> None:
    message = (
        f"{format} cannot hold this gated SAE: its weights are float64, and the loader keeps "
        "float32. Export it with --format saelens or safetensors."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        write_folder(make_sae("gated").double(), FACTS, format, tmp_path / "out")


def test_listing_the_formats_does_not_import_torch() -> None:
    code = (
        "import sys; from sae_pipe.stages.sae_formats import FORMATS; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_registry_is_what_the_documentation_lists() -> None:
    text = (Path(__file__).parent.parent / "docs" / "interop.md").read_text()
    for format in FORMATS:
        assert f"`{format}`" in text


# --- what SAEBench's loader would not take ---


def unready(sae: Sae) -> None:
    torch.nn.init.constant_(sae.get_buffer("threshold"), -1.0)


def stretched(sae: Sae) -> None:
    sae.W_dec.mul_(1.001)


@pytest.mark.parametrize(
    ("arch", "facts", "change", "message"),
    [
        (
            "batch_topk",
            {},
            unready,
            "saebench cannot hold this batch_topk SAE: its threshold -1 was never estimated, and "
            "the loader asks for one that is not negative. Export it with --format saelens.",
        ),
        (
            "gated",
            {},
            stretched,
            "saebench cannot hold this gated SAE: its decoder rows are not of norm 1 within 1e-05, "
            "which the loader refuses. Export it with --format saelens, which SAEBench takes as "
            "well.",
        ),
        (
            "topk",
            {"hook": "mlp_out"},
            None,
            "saebench cannot hold this topk SAE: it was fitted on mlp_out, and the loader takes "
            "every SAE for one of resid_post. Export it with --format saelens, which SAEBench "
            "takes as well.",
        ),
        (
            "topk",
            {"model": None},
            None,
            "saebench needs the model, which the run does not say. Pass --model.",
        ),
        (
            "topk",
            {"layer": None},
            None,
            "saebench needs the layer, which the run does not say. Pass --layer.",
        ),
        (
            "topk",
            {"hook": None},
            None,
            "saebench needs the hook, which the run does not say. Pass --hook.",
        ),
    ],
)
def test_saebench_is_refused_what_its_loader_refuses(
    arch: str,
    facts: dict[str, Any],
    change: Callable[[Sae], None] | None,
    message: str,
    tmp_path: Path,
) -> None:
    sae = make_sae(arch)
    if change is not None:
        change(sae)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        write_folder(sae, Facts(**vars(FACTS) | facts), "saebench", tmp_path / "out")


def test_saebench_is_refused_fewer_latents_than_dimensions(tmp_path: Path) -> None:
    sae = get_architecture("topk")(d_in=12, d_sae=8, k=2)
    sae.initialise_(0)
    message = (
        "saebench cannot hold this topk SAE: d_sae=8 is less than d_in=12, which the loader "
        "refuses. Export it with --format saelens, which SAEBench takes as well."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        write_folder(sae, FACTS, "saebench", tmp_path / "out")


def test_sparsify_names_the_folder_after_the_module(tmp_path: Path) -> None:
    sae = make_sae("topk")
    assert write_folder(sae, FACTS, "sparsify", tmp_path / "neox").name == "layers.3"
    gpt2 = Facts(model="gpt2", family="gpt2", layer=5, hook="resid_post")
    assert write_folder(sae, gpt2, "sparsify", tmp_path / "gpt2").name == "h.5"
    message = (
        "sparsify cannot hold this topk SAE: it was fitted on attn_out, and sparsify has the "
        "outputs of modules, of which only whole blocks are written here. Export it with --format "
        "saelens or safetensors."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        write_folder(sae, Facts(layer=3, hook="attn_out"), "sparsify", tmp_path / "out")
    message = "sparsify names a folder after the layer, which the run does not say. Pass --layer."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        write_folder(sae, Facts(), "sparsify", tmp_path / "out")


# --- the files, as their tools look at them ---


def test_saelens_gets_a_constant_threshold_and_the_ends_of_the_groups(tmp_path: Path) -> None:
    sae = make_sae("matryoshka")
    folder = write_folder(sae, FACTS, "saelens", tmp_path / "out")
    config = json.loads((folder / "cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "jumprelu",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert metadata["training_architecture"] == "matryoshka_batchtopk"
    details = {"k": K, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [6, 18, 48]}
    assert metadata["training_architecture_details"] == details
    assert (metadata["model_name"], metadata["hook_name"]) == (
        "EleutherAI/pythia-70m",
        "blocks.3.hook_resid_post",
    )
    threshold_S = load_file(folder / "sae_weights.safetensors")["threshold"]
    assert torch.equal(threshold_S, torch.full((D_SAE,), float(sae.get_buffer("threshold"))))


def test_dictionary_learning_gets_a_pickle_of_plain_tensors(tmp_path: Path) -> None:
    folder = write_folder(make_sae("matryoshka"), FACTS, "dictionary_learning", tmp_path / "out")
    state = torch.load(folder / "ae.pt", weights_only=True)
    described = {name: (str(value.dtype)[6:], tuple(value.shape)) for name, value in state.items()}
    assert described == {
        "W_enc": ("float32", (D_IN, D_SAE)),
        "b_enc": ("float32", (D_SAE,)),
        "W_dec": ("float32", (D_SAE, D_IN)),
        "b_dec": ("float32", (D_IN,)),
        "threshold": ("float32", ()),
        "k": ("int32", ()),
        "group_sizes": ("int64", (3,)),
    }
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == "MatryoshkaBatchTopKSAE"
    assert trainer["trainer_class"] == "MatryoshkaBatchTopKTrainer"
    assert trainer["group_sizes"] == [6, 12, 30]
    assert (trainer["layer"], trainer["lm_name"]) == (3, "EleutherAI/pythia-70m")


# --- runs out and in, by command ---


def a_run(folder: Path, variant: str = "matryoshka") -> Path:
    write_run(make_sae(variant), FACTS, folder, {"from": "/home/someone", "format": "test"})
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_export_and_import_by_command(format: str, tmp_path: Path) -> None:
    run, out, back = a_run(tmp_path / "run", "topk"), tmp_path / "out", tmp_path / "back"
    done = CliRunner().invoke(app, ["export", str(run), "--format", format, "--out", str(out)])
    inside = out / "layers.3" if format == "sparsify" else out
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{inside} holds the SAE of {run} for {format}.\n"
    done = CliRunner().invoke(app, ["import", str(out), "--out", str(back)])
    assert (done.exit_code, done.stderr) == (0, "")
    read_as = "dictionary_learning" if format == "saebench" else format
    assert done.stdout == (
        f"{back} holds the topk SAE of {out}, read as {read_as}: d_in=12, d_sae=48, k=5 "
        "(EleutherAI/pythia-70m, layer 3, resid_post).\n"
    )
    assert (back / "sae.safetensors").read_bytes() == (run / "sae.safetensors").read_bytes()
    config = json.loads((back / "config.json").read_text())
    assert facts_of(config).layer == 3
    assert config["imported"]["from"] == str(out)


def test_the_recipe_of_a_run_travels_without_what_belongs_to_this_machine(tmp_path: Path) -> None:
    sae, run = make_sae("topk"), tmp_path / "run"
    save_sae(sae, run)
    config = config_of(sae, FACTS) | {"free": {"device": "cuda:3"}}
    config["recipe"]["auxk_coefficient"] = 1 / 32
    config["store"] |= {"path": "/home/someone/acts.zarr", "digest": "ab" * 32}
    config["provenance"] = {"command": "sae-pipe fit /home/someone", "begun": "2026-11-25"}
    (run / "config.json").write_text(json.dumps(config))
    for format in FORMATS:
        inside = export_sae(run, format, tmp_path / format)
        text = b"".join(file.read_bytes() for file in inside.iterdir())
        assert b"/home/someone" not in text
        assert b"cuda:3" not in text
        import_sae(str(inside), tmp_path / f"{format}-back", say=quiet)
        found = json.loads((tmp_path / f"{format}-back" / "config.json").read_text())
        assert found["recipe"] == config["recipe"]
        assert found["store"]["digest"] == "ab" * 32
        assert found["provenance"] == {"begun": "2026-11-25"}


def test_what_the_run_does_not_say_can_be_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_sae(make_sae("topk"), run)
    message = "saebench needs the model, which the run does not say. Pass --model."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        export_sae(run, "saebench", tmp_path / "out")
    export_sae(run, "saebench", tmp_path / "out", model="pythia-70m", layer=3, hook="resid_post")
    message = "--layer is 4, but the run was fitted with 3. Leave --layer out."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        export_sae(a_run(tmp_path / "other"), "saelens", tmp_path / "again", layer=4)
    message = "Hook 'q' is not known. Pass one of resid_post, resid_pre, mlp_out, attn_out."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        export_sae(run, "saelens", tmp_path / "again", hook="q")


def test_what_stands_there_is_never_overwritten(tmp_path: Path) -> None:
    run, out = a_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    message = f"^{re.escape(f'{out} exists. Pass another --out, or move it away.')}$"
    with pytest.raises(InputError, match=message):
        export_sae(run, "saelens", out)
    with pytest.raises(InputError, match=message):
        import_sae(str(run), out, say=quiet)
    assert list(out.iterdir()) == []


def test_unknown_formats_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    known = "saelens, dictionary_learning, sparsify, safetensors, saebench"
    message = f"Unknown --format 'gguf': choose one of {known}."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        export_sae(tmp_path, "gguf", tmp_path / "out")
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        import_sae(str(tmp_path), tmp_path / "out", format="gguf", say=quiet)


# --- which folder is meant ---


def test_a_folder_that_holds_one_sae_is_taken_for_it(tmp_path: Path) -> None:
    write_folder(make_sae("topk"), FACTS, "saelens", tmp_path / "all" / "one")
    import_sae(str(tmp_path / "all"), tmp_path / "run", say=quiet)
    write_folder(make_sae("topk"), FACTS, "sparsify", tmp_path / "all" / "two")
    write_folder(make_sae("topk"), FACTS, "safetensors", tmp_path / "all" / "three")
    message = f"{tmp_path / 'all'} holds 2 SAEs. Pass one of them: one, three."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        import_sae(str(tmp_path / "all"), tmp_path / "again", say=quiet)


def test_a_file_on_its_own_is_read(tmp_path: Path) -> None:
    folder = write_folder(make_sae("gated"), FACTS, "safetensors", tmp_path / "out")
    import_sae(str(folder / "sae.safetensors"), tmp_path / "run", say=quiet)
    assert same(load_sae(tmp_path / "run"), make_sae("gated"))


def test_places_without_an_sae_are_said(tmp_path: Path) -> None:
    def refused(source: Path, message: str) -> None:
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            import_sae(str(source), tmp_path / "out", say=quiet)

    nothing, empty, file = tmp_path / "nothing", tmp_path / "empty", tmp_path / "x.pt"
    empty.mkdir()
    file.touch()
    refused(nothing, f"There is nothing at {nothing}. Pass a folder, or hf://USER/REPO.")
    refused(
        empty,
        f"{empty} holds no SAE that is known by its files (saelens: cfg.json and "
        "sae_weights.safetensors; dictionary_learning: config.json and ae.pt; sparsify: cfg.json "
        "and sae.safetensors; safetensors: sae.safetensors; saebench: config.json and ae.pt).",
    )
    refused(
        file,
        f"{file} is a file, and what is read is a folder with sae.safetensors. Pass the folder "
        "that it is in.",
    )
    run = a_run(tmp_path / "run")
    refused(run, f"{run} is a run of sae-pipe already: it needs no import.")


# --- what other tools and older versions have written ---


def saelens_folder(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any
) -> Path:
    """A SAELens folder without our section. changes: of cfg.json; None takes a field out."""
    arch = changes.get("architecture", "standard")
    sae = make_sae({"standard": "relu", "topk": "topk", "gated": "gated"}.get(arch, "jumprelu"))
    write_folder(sae, FACTS, "saelens", folder)
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["sae_pipe"]
    config = {name: value for name, value in (config | changes).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(load_file(folder / "sae_weights.safetensors") | tensors, folder / "new")
        (folder / "new").rename(folder / "sae_weights.safetensors")
    return folder


def test_saelens_before_version_6_is_read(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "old", architecture="topk", k=None, metadata=None)
    old = {
        "hook_point": "blocks.7.hook_mlp_out",
        "model_name": "gpt2-small",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "context_size": 256,
    }
    config = json.loads((folder / "cfg.json").read_text())
    config.pop("apply_b_dec_to_input")
    (folder / "cfg.json").write_text(json.dumps(config | old | {"architecture": "standard"}))
    found, facts = get_format("saelens").read(folder)
    assert torch.equal(found.encode(some_x()), make_sae("topk").encode(some_x()))
    assert (facts.model, facts.layer, facts.hook) == ("gpt2-small", 7, "mlp_out")
    assert facts.context_size == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_held_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "half", dtype=str(dtype)[6:])
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({n: v.to(dtype) for n, v in tensors.items()}, folder / "sae_weights.safetensors")
    found, _ = get_format("saelens").read(folder)
    assert found.W_enc.dtype == torch.float32
    assert torch.equal(found.W_enc, tensors["W_enc"].to(dtype).float())


def test_topk_that_selects_by_decoder_norm_is_folded(tmp_path: Path) -> None:
    """SAELens: top k of pre * norm, x_hat = (latents / norm) W_dec + b_dec."""
    scale_S = torch.rand(D_SAE, generator=torch.Generator().manual_seed(0)) + 0.5
    W_dec_SD = make_sae("topk").W_dec * scale_S[:, None]
    folder = saelens_folder(
        tmp_path / "topk",
        {"W_dec": W_dec_SD},
        architecture="topk",
        rescale_acts_by_decoder_norm=True,
    )
    found, _ = get_format("saelens").read(folder)
    w = {n: v.numpy() for n, v in load_file(folder / "sae_weights.safetensors").items()}
    x_BD, norm_S = some_x().numpy(), np.linalg.norm(w["W_dec"], axis=1)
    pre_BS = np.maximum((x_BD - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0) * norm_S
    latents_BS = pre_BS * (pre_BS >= np.sort(pre_BS, axis=1)[:, -K, None])
    x_hat_BD = (latents_BS / norm_S) @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(found.encode(some_x()).numpy(), latents_BS, atol=1e-5)
    np.testing.assert_allclose(found(some_x()).numpy(), x_hat_BD, atol=1e-5)


def test_a_threshold_for_each_latent_stays_jumprelu_whatever_it_was_trained_as(
    tmp_path: Path,
) -> None:
    metadata = {
        "training_architecture": "batchtopk",
        "training_architecture_details": {"k": K},
    }
    folder = saelens_folder(
        tmp_path / "own",
        architecture="jumprelu",
        apply_b_dec_to_input=True,
        metadata=metadata,
    )
    assert type(get_format("saelens").read(folder)[0]).__name__ == "JumpRelu"
    constant = {"threshold": torch.full((D_SAE,), 0.25)}
    folder = saelens_folder(
        tmp_path / "same",
        constant,
        architecture="jumprelu",
        apply_b_dec_to_input=True,
        metadata=metadata,
    )
    found, _ = get_format("saelens").read(folder)
    assert (type(found).__name__, found.k) == ("BatchTopK", K)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"architecture": "matching_pursuit"}, "architecture 'matching_pursuit'; standard, gated, topk, jumprelu are read"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' at run time"),
        ({"normalize_activations": True}, "normalize_activations 'expected_average_only_in' at run time"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z' at run time"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"finetuning_scaling_factor": True}, "a finetuning_scaling_factor"),
        ({"architecture": "gated", "apply_b_dec_to_input": False}, "apply_b_dec_to_input false; gated SAEs subtract b_dec here"),
    ],
)  # fmt: skip
def test_what_of_saelens_cannot_be_held_is_named(
    changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    folder = saelens_folder(tmp_path / "saelens", **changes)
    message = f"{folder}/cfg.json is of an SAE that sae-pipe cannot hold: it has {what}."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        import_sae(str(folder), tmp_path / "out", say=quiet)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax'"),
        ({"skip_connection": True}, "skip_connection 'True'"),
        ({"transcode": True}, "transcode 'True'"),
        ({"signed": True}, "signed 'True'"),
    ],
)
def test_what_of_sparsify_cannot_be_held_is_named(
    changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    folder = write_folder(make_sae("topk"), FACTS, "sparsify", tmp_path / "out")
    edit(folder / "cfg.json", lambda config: config | changes)
    message = f"{folder}/cfg.json is of an SAE that sae-pipe cannot hold: it has {what}."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        import_sae(str(folder), tmp_path / "run", say=quiet)


def edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_sparsify_without_our_section_is_read(tmp_path: Path) -> None:
    folder = write_folder(make_sae("topk"), FACTS, "sparsify", tmp_path / "out")
    edit(
        folder / "cfg.json",
        lambda c: {"d_in": D_IN, "expansion_factor": 4, "num_latents": 0, "k": K, "signed": False},
    )
    found, facts = get_format("sparsify").read(folder)
    assert torch.equal(found.encode(some_x()), make_sae("topk").encode(some_x()))
    assert (facts.layer, facts.hook) == (3, "resid_post")


def test_dictionary_learning_without_our_section_is_read(tmp_path: Path) -> None:
    for variant, expected in (("p_anneal", "p_anneal"), ("relu of April 2024", "relu")):
        folder = write_folder(make_sae(variant), FACTS, "dictionary_learning", tmp_path / variant)
        edit(folder / "config.json", lambda c: {k: v for k, v in c.items() if k != "sae_pipe"})
        found, facts = get_format("dictionary_learning").read(folder)
        assert describe_sae(found)["architecture"] == expected
        assert torch.equal(found.encode(some_x()), make_sae(variant).encode(some_x()))
        assert (facts.model, facts.layer, facts.hook) == (FACTS.model, 3, "resid_post")


# --- strangers ---


def test_our_section_is_believed_where_it_agrees_alone(tmp_path: Path) -> None:
    folder = write_folder(make_sae("topk"), FACTS, "saelens", tmp_path / "out")
    edit(folder / "cfg.json", lambda config: config | {"k": 7})
    message = (
        f"{folder}/cfg.json contradicts itself: k is '7' there and '5' in its section sae_pipe. "
        "Remove that section to believe the rest."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        get_format("saelens").read(folder)


def test_a_threshold_that_is_not_one_number_is_no_batch_topk(tmp_path: Path) -> None:
    folder = write_folder(make_sae("batch_topk"), FACTS, "saelens", tmp_path / "out")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["threshold"][3] += 1
    save_file(tensors, folder / "sae_weights.safetensors")
    message = (
        f"{folder}/sae_weights.safetensors has a threshold for each latent, but {folder}/cfg.json "
        "calls it a batch_topk SAE, which has one for all. Remove its section sae_pipe to read it "
        "as jumprelu."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        get_format("saelens").read(folder)


class Evil:
    """What a pickle can do when it is believed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import pathlib; pathlib.Path('evil').touch()",))


def pt(value: Any) -> bytes:
    packed = io.BytesIO()
    torch.save(value, packed)
    return packed.getvalue()


def repacked(data: bytes, compression: int) -> bytes:
    out, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
    with zipfile.ZipFile(out, "w", compression) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry.filename))
    return out.getvalue()


STATE = {
    "bias": torch.zeros(D_IN),
    "encoder.weight": torch.ones(D_SAE, D_IN),
    "encoder.bias": torch.zeros(D_SAE),
    "decoder.weight": torch.ones(D_IN, D_SAE),
}
NOT_LOADED = "was not loaded: its archive is compressed or larger than an SAE needs, which torch.save does not write"
HOSTILE_PT = {
    "code": (pt(STATE | {"bias": Evil()}), "was not loaded: it holds something other than plain tensors, or is damaged"),
    "a list": (pt([1, 2]), "holds list, not a dictionary of tensors"),
    "text": (pt(STATE | {"bias": "hello"}), "holds 'bias', which is not a plain tensor"),
    "one number for all": (pt(STATE | {"encoder.weight": torch.zeros(1).expand(D_SAE, D_IN)}), "holds 'encoder.weight', which is not a plain tensor"),
    "sparse": (pt(STATE | {"bias": torch.zeros(D_IN).to_sparse()}), "holds 'bias', which is not a plain tensor"),
    "another shape": (pt(STATE | {"bias": torch.zeros(5)}), "holds bias in shape (5,), but its config asks for (12,)"),
    "integers": (pt(STATE | {"bias": torch.zeros(D_IN, dtype=torch.int64)}), "holds bias as torch.int64, which is no number format of weights"),
    "NaN": (pt(STATE | {"bias": torch.full((D_IN,), torch.nan)}), "holds NaN or Inf in bias"),
    "one missing": (pt({n: v for n, v in STATE.items() if n != "bias"}), "does not hold the tensors of what its config describes: bias missing"),
    "one too many": (pt(STATE | {"evil": torch.zeros(3)}), "does not hold the tensors of what its config describes: evil unknown"),
    "compressed": (repacked(pt(STATE), zipfile.ZIP_DEFLATED), NOT_LOADED),
    "a large pickle": (pt(STATE | {str(i): i for i in range(10_000)}), NOT_LOADED),
    "no archive": (b"\x80\x02}q\x00.", "is not a file of torch.save (a zip archive), or it is damaged"),
    "cut off": (pt(STATE)[:-400], "is not a file of torch.save (a zip archive), or it is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_PT)
def test_a_hostile_pickle_is_refused_and_runs_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_folder(make_sae("relu"), FACTS, "dictionary_learning", tmp_path / "out")
    edit(folder / "config.json", lambda c: {k: v for k, v in c.items() if k != "sae_pipe"})
    data, sentence = HOSTILE_PT[what]
    (folder / "ae.pt").write_bytes(data)
    with pytest.raises(InputError, match=f"^{re.escape(f'{folder}/ae.pt {sentence}')}") as caught:
        import_sae(str(folder), tmp_path / "run", say=quiet)
    assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "run").exists()


def test_weights_longer_than_the_config_allows_are_not_read(tmp_path: Path) -> None:
    for format, file in (("saelens", "sae_weights.safetensors"), ("dictionary_learning", "ae.pt")):
        folder = write_folder(make_sae("topk"), FACTS, format, tmp_path / format)
        with (folder / file).open("ab") as opened:
            opened.truncate(1 << 40)  # takes no room
        message = (
            f"{folder}/{file} has 1,099,511,627,776 bytes, and the weights of an SAE of d_in=12 "
            "and d_sae=48, which is what its config says, have at most 1,060,480. It was not read."
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            get_format(format).read(folder)


CONFIGS = {
    "saelens": "cfg.json",
    "dictionary_learning": "config.json",
    "sparsify": "cfg.json",
    "saebench": "config.json",
}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is damaged: it is not JSON"),
        ("[" * 200_000, "is damaged: it is not JSON"),
        ('{"d_in": NaN}', "is damaged: it is not JSON (NaN is not a number of JSON)"),
        ('{"d_in": 1e999}', "is damaged: it is not JSON (1e999 is not a number of JSON)"),
        ("[" * 101 + "]" * 101, "is damaged: it is not JSON (it is nested more than 100 deep)"),
        ("[1]", "is no config: it holds list, not an object."),
        (" " * (1 << 24) + "{}", "is no config: it is larger than 16,777,216 bytes."),
    ],
)
@pytest.mark.parametrize("format", CONFIGS)
def test_a_config_that_is_none_is_refused(
    format: str, text: str, sentence: str, tmp_path: Path
) -> None:
    folder = write_folder(make_sae("topk"), FACTS, format, tmp_path / "out")
    (folder / CONFIGS[format]).write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{folder}/{CONFIGS[format]} {sentence}")):
        get_format(format).read(folder)


@pytest.mark.parametrize("size", [0, -1, 2**40, 1.5, "12", None, True])
def test_sizes_that_cannot_be_are_refused(size: Any, tmp_path: Path) -> None:
    folder = write_folder(make_sae("topk"), FACTS, "saelens", tmp_path / "out")
    edit(folder / "cfg.json", lambda config: config | {"d_sae": size})
    message = f"{folder}/cfg.json says d_sae {str(size)!r}, which is no size of an SAE."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        get_format("saelens").read(folder)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()  # fmt: skip
    return [path, *(each for key, child in inside for each in paths_of(child, (*path, key)))]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A matryoshka SAE (for sparsify, TopK) in every format that has a config."""
    root = tmp_path_factory.mktemp("written")
    return {
        format: write_folder(
            make_sae("topk" if format == "sparsify" else "matryoshka"), FACTS, format, root / format
        )
        for format in CONFIGS
    }


@settings(max_examples=120, deadline=None)
@given(data=st.data(), format=st.sampled_from(sorted(CONFIGS)), value=VALUES)
def test_a_config_changed_anywhere_gives_an_sae_or_a_sentence(
    data: st.DataObject, format: str, value: Any, written: dict[str, Path]
) -> None:
    file = written[format] / CONFIGS[format]
    before = file.read_text()
    config = json.loads(before)
    *places, last = data.draw(st.sampled_from([path for path in paths_of(config) if path]))
    parent = config
    for place in places:
        parent = parent[place]
    parent[last] = value
    try:
        file.write_text(json.dumps(config))
        found, _ = get_format(format).read(written[format])
        # What was believed is an SAE of these weights that works.
        assert found.encode(some_x()).isfinite().all()
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017  # either is right
    finally:
        file.write_text(before)
