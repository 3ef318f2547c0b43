"""Language models: names, what the configuration tells, and loading only what is needed."""

# B contexts, T positions, D d_model

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sae_pipe.stages.devices import pick_device, pick_dtype
from sae_pipe.stages.hooks import HookedModel
from sae_pipe.stages.model_names import MODEL_NAMES, resolve_model
from sae_pipe.stages.models import ModelInfo, check_layer, inspect_model, load_truncated
from sae_pipe.stages.taps import HOOKS
from sae_pipe.storage.errors import InputError
from sae_pipe.storage.files import file_digest, json_digest

CPU = torch.device("cpu")


def whole(message: str) -> str:
    """A pattern that matches the whole message and nothing else."""
    return f"^{re.escape(message)}$"


def load(folder: Path, layers: list[int], hook: str = "resid_post") -> HookedModel:
    return load_truncated(inspect_model(str(folder)), layers, hook, CPU, torch.float32)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def own_folder(neox_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny GPT-NeoX that a test may damage."""
    return Path(shutil.copytree(neox_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("pythia-160m", "EleutherAI/pythia-160m"),
        ("pythia-160m-deduped", "EleutherAI/pythia-160m-deduped"),
        ("Pythia-1.4B", "EleutherAI/pythia-1.4b"),
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2-9b-it", "google/gemma-2-9b-it"),
        ("gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("qwen3-0.6b-base", "Qwen/Qwen3-0.6B-Base"),
        ("tinyllama-v1.1", "TinyLlama/TinyLlama_v1.1"),
        ("someone/some-model_2.0", "someone/some-model_2.0"),
    ],
)
def test_a_short_name_stands_for_the_hub_id(name: str, hub_id: str) -> None:
    assert resolve_model(name) == hub_id


@pytest.mark.parametrize("family", MODEL_NAMES)
def test_the_example_of_each_rule_matches_that_rule_alone(family: str) -> None:
    example = MODEL_NAMES[family].example
    matching = [
        other
        for other, rule in MODEL_NAMES.items()
        if re.fullmatch(rule.pattern, example, re.IGNORECASE)
    ]
    assert matching == [family]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", resolve_model(example))


def test_a_folder_wins_over_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert resolve_model("gpt2") == "gpt2"
    assert resolve_model(str(tmp_path)) == str(tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    examples = ", ".join(rule.example for rule in MODEL_NAMES.values())
    message = (
        f"Model name 'pythia160m' is not known. Known are names like {examples}; pass one of them, "
        "a Hub id of the form owner/name, or a local folder."
    )
    with pytest.raises(InputError, match=whole(message)):
        resolve_model("pythia160m")


@pytest.mark.parametrize("name", ["./no", "/no/such/folder", "a/b/c", "models/no", "~no/x", ""])
def test_a_path_that_does_not_exist_is_not_sent_to_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    message = (
        f"Model folder {name!r} does not exist. Pass the folder that holds the model's "
        "config.json, or a Hub id of the form owner/name."
    )
    with pytest.raises(InputError, match=whole(message)):
        resolve_model(name)


def test_a_file_is_not_a_model_folder(own_folder: Path) -> None:
    file = own_folder / "model.safetensors"
    message = (
        f"Model folder {str(file)!r} is not a folder. Pass the folder that holds the model's "
        "config.json, or a Hub id of the form owner/name."
    )
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(file))


def test_the_configuration_tells_the_shape(family_folder: Path) -> None:
    info = inspect_model(str(family_folder))
    assert info == ModelInfo(
        source=str(family_folder),
        commit=None,
        architecture=family_folder.name,
        n_layers=4,
        d_model=32,
        max_context=64,
        dtype="float32",
        config=None,
    )


def test_the_revision_of_a_folder_changes_with_its_weights_and_its_config(own_folder: Path) -> None:
    before = inspect_model(str(own_folder)).revision
    digests = {
        name: file_digest(own_folder / name) for name in ("config.json", "model.safetensors")
    }
    assert before == "sha256:" + json_digest(digests)
    edit_config(own_folder, rope_theta=20_000)
    edited = inspect_model(str(own_folder)).revision
    weights = load_file(own_folder / "model.safetensors")
    weights["gpt_neox.layers.3.mlp.dense_4h_to_h.bias"] += 1
    save_file(weights, own_folder / "model.safetensors", metadata={"format": "pt"})
    assert len({before, edited, inspect_model(str(own_folder)).revision}) == 3


def test_inspecting_reads_no_weights(own_folder: Path) -> None:
    (own_folder / "model.safetensors").write_bytes(b"not read")
    assert inspect_model(str(own_folder)).n_layers == 4


def test_a_folder_has_no_revisions(neox_folder: Path) -> None:
    message = (
        f"Model {neox_folder} is a local folder, which has no revision 'step1000'. "
        "Leave --revision out, or pass a Hub id."
    )
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(neox_folder), revision="step1000")


def test_a_folder_without_a_config_is_not_a_model(tmp_path: Path) -> None:
    message = (
        f"Folder {tmp_path} holds no config.json, so it is not a model. "
        "Pass the folder that a model was saved to."
    )
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(tmp_path))


def test_a_folder_without_weights_is_refused(own_folder: Path) -> None:
    (own_folder / "model.safetensors").unlink()
    message = (
        f"Folder {own_folder} holds a config.json but no weights (*.safetensors or "
        "pytorch_model*.bin). Pass a folder with both."
    )
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(own_folder))


def test_a_config_that_is_not_json_is_refused(own_folder: Path) -> None:
    (own_folder / "config.json").write_text("{")
    message = f"The config.json of model {own_folder} is not valid JSON. Fetch the model again."
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(own_folder))


def test_code_of_a_checkpoint_is_never_run(own_folder: Path) -> None:
    (own_folder / "mine.py").write_text("raise SystemExit('this code was run')")
    edit_config(own_folder, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
    message = (
        f"Model {own_folder} needs code of its own to run, and code from a checkpoint is never run "
        "here. Pass a model of an architecture that Transformers contains."
    )
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(own_folder))


def test_an_unknown_architecture_is_refused(own_folder: Path) -> None:
    edit_config(own_folder, model_type="mine")
    message = (
        f"Model {own_folder} is of type 'mine', which Transformers {transformers.__version__} does "
        "not know. Pass another model, or install a newer Transformers."
    )
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(own_folder))


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_a_model_that_is_no_decoder_is_refused(own_folder: Path, kind: str) -> None:
    edit_config(own_folder, model_type=kind, is_encoder_decoder=kind == "t5")
    message = (
        f"Model {own_folder} is of type {kind!r}, which is not a decoder-only language model. "
        "Pass one that is, such as a GPT-NeoX, GPT-2, Gemma, Llama or Qwen model."
    )
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(own_folder))


def test_a_quantised_model_is_refused(own_folder: Path) -> None:
    edit_config(own_folder, quantization_config={"quant_method": "gptq"})
    message = (
        f"Model {own_folder} is quantised, and its activations would be those of the quantised "
        "weights. Pass the unquantised model."
    )
    with pytest.raises(InputError, match=whole(message)):
        inspect_model(str(own_folder))


@pytest.mark.parametrize("layer", [-1, 4, 12])
def test_a_layer_out_of_range_says_how_many_there_are(neox_folder: Path, layer: int) -> None:
    message = (
        f"Model {neox_folder} has 4 layers, counted from 0, but layer {layer} was asked for. "
        "Pass --layer from 0 to 3."
    )
    with pytest.raises(InputError, match=whole(message)):
        check_layer(inspect_model(str(neox_folder)), [0, layer], "resid_post")


def test_no_layer_at_all_is_refused(neox_folder: Path) -> None:
    message = "No layer was asked for. Pass --layer from 0 to 3."
    with pytest.raises(InputError, match=whole(message)):
        check_layer(inspect_model(str(neox_folder)), [], "resid_post")


def test_an_unknown_hook_lists_the_known_ones(neox_folder: Path) -> None:
    message = f"Hook 'resid_mid' is not known. Pass one of {', '.join(HOOKS)}."
    with pytest.raises(InputError, match=whole(message)):
        check_layer(inspect_model(str(neox_folder)), [0], "resid_mid")


def test_a_missing_weight_of_a_kept_block_is_refused(own_folder: Path) -> None:
    weights = load_file(own_folder / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"]
    del weights["gpt_neox.layers.3.mlp.dense_4h_to_h.bias"]
    save_file(weights, own_folder / "model.safetensors", metadata={"format": "pt"})
    assert load(own_folder, [0]).layers == (0,)  # what is not needed is not missed
    message = (
        f"Model {own_folder} lacks 1 of the weights that its configuration calls for, the first "
        "being layers.1.mlp.dense_4h_to_h.bias. Its files are incomplete or belong to another "
        "model; fetch it again."
    )
    with pytest.raises(InputError, match=whole(message)):
        load(own_folder, [1])


@pytest.mark.parametrize("damage", ["cut short", "of another shape"])
def test_damaged_weights_are_refused(own_folder: Path, damage: str) -> None:
    file = own_folder / "model.safetensors"
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        edit_config(own_folder, intermediate_size=50)
    message = (
        f"The weights of model {own_folder} could not be read with its config.json: they are "
        "damaged, incomplete or of another shape. Fetch the model again."
    )
    with pytest.raises(InputError, match=whole(message)):
        load(own_folder, [1])


def test_auto_picks_what_is_here() -> None:
    device = pick_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else device.type)
    assert pick_device("cpu") == CPU
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_absent_is_refused() -> None:
    message = "Device 'cuda' was asked for, but torch finds none here. Pass --device auto or one "
    with pytest.raises(InputError, match=f"^{message}that is here: cpu(, mps)?\\.$"):
        pick_device("cuda")


def test_a_device_that_is_unknown_or_counted_too_far_is_refused() -> None:
    message = r"^'abacus' is not a device; auto, cpu, cuda, mps and cuda:N are known\. Pass "
    with pytest.raises(InputError, match=message + r"--device auto or one that is here: cpu.*\.$"):
        pick_device("abacus")
    message = r"^Device 'cpu:1' was asked for, but there are 1, counted from 0\. Pass "
    with pytest.raises(InputError, match=message + r"--device auto or one that is here: cpu.*\.$"):
        pick_device("cpu:1")


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    message = "Dtype 'int8' is not known. Pass one of auto, float32, bfloat16, float16."
    with pytest.raises(InputError, match=whole(message)):
        pick_dtype("int8", CPU)
