"""Hooked activations: what they equal, what is loaded for them, and what is run."""

# B contexts, T positions, D d_model

import ctypes
import json
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sae_pipe.stages.hooks import HookedModel, check_model, locate_blocks
from sae_pipe.stages.models import inspect_model, load_truncated
from sae_pipe.stages.taps import HOOKS
from sae_pipe.storage.errors import InputError

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


def whole(message: str) -> str:
    """A pattern that matches the whole message and nothing else."""
    return f"^{re.escape(message)}$"


def load(
    folder: Path, layers: list[int], hook: str = "resid_post", dtype: torch.dtype = torch.float32
) -> HookedModel:
    return load_truncated(inspect_model(str(folder)), layers, hook, CPU, dtype)


def load_full(folder: Path) -> Any:
    """The reference: the whole model, loaded and run by Transformers alone."""
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def token_ids_BT() -> Tensor:
    """Longer than the sliding windows of the tiny models, and with token 0 that ends texts."""
    return torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0))


class Bomb(nn.Module):
    """Must never be run."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a module after the deepest hooked one was run")


@torch.inference_mode()
def test_resid_post_is_hidden_states_one_further(family_folder: Path, token_ids_BT: Tensor) -> None:
    """All layers of one pass; bit by bit, though the last blocks were not even loaded."""
    hidden = load_full(family_folder)(token_ids_BT, output_hidden_states=True).hidden_states
    activations = load(family_folder, [2, 0, 1]).activations(token_ids_BT)
    assert list(activations) == [0, 1, 2]
    for layer, found_BTD in activations.items():
        torch.testing.assert_close(found_BTD, hidden[layer + 1], rtol=0, atol=0)


@torch.inference_mode()
def test_resid_post_of_the_last_layer_is_before_the_final_norm(
    family_folder: Path, token_ids_BT: Tensor
) -> None:
    full, caught = load_full(family_folder), []
    locate_blocks(full, 4)[3].register_forward_hook(lambda _m, _a, output: caught.append(output))
    normed_BTD = full(token_ids_BT).last_hidden_state
    found_BTD = load(family_folder, [3]).activations(token_ids_BT)[3]
    torch.testing.assert_close(found_BTD, caught[0], rtol=0, atol=0)
    assert not torch.allclose(found_BTD, normed_BTD)


def test_the_parts_of_a_block_add_up(family_folder: Path, token_ids_BT: Tensor) -> None:
    layers = [0, 2]
    part = {hook: load(family_folder, layers, hook).activations(token_ids_BT) for hook in HOOKS}
    for layer in layers:
        sum_BTD = part["resid_pre"][layer] + part["attn_out"][layer] + part["mlp_out"][layer]
        torch.testing.assert_close(sum_BTD, part["resid_post"][layer])
        assert part["attn_out"][layer].norm() > 0.01 * sum_BTD.norm()
        assert part["mlp_out"][layer].norm() > 0.01 * sum_BTD.norm()


def test_resid_pre_is_resid_post_of_the_layer_before(
    family_folder: Path, token_ids_BT: Tensor
) -> None:
    before = load(family_folder, [0, 1]).activations(token_ids_BT)
    after = load(family_folder, [1, 2], "resid_pre").activations(token_ids_BT)
    assert torch.equal(after[1], before[0])
    assert torch.equal(after[2], before[1])


def test_only_the_needed_blocks_and_no_head_are_loaded(family_folder: Path) -> None:
    full, model = load_full(family_folder), load(family_folder, [1])
    dropped = sum(n_parameters(block) for block in locate_blocks(full, 4)[2:])
    assert len(model.blocks) == 2
    assert n_parameters(model.decoder) == n_parameters(full) - dropped
    assert not any("head" in name for name, _ in model.decoder.named_modules())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "qwen3"])
def test_what_the_configuration_lists_by_layer_is_cut_too(
    family: str, tiny_models: dict[str, Path]
) -> None:
    folder = tiny_models[family]
    info = inspect_model(str(folder))
    decoder = load(folder, [1]).decoder
    assert isinstance(decoder, transformers.PreTrainedModel)
    assert decoder.config.layer_types == info.config.layer_types[:2]
    assert (decoder.config.num_hidden_layers, info.config.num_hidden_layers) == (2, 4)


def test_the_model_is_ready_to_run_and_not_to_train(family_folder: Path) -> None:
    model = load(family_folder, [1])
    assert not any(module.training for module in model.decoder.modules())
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())
    # Gemma 2 soft-caps attention scores, which sdpa cannot: there sdpa would be wrong.
    assert isinstance(model.decoder, transformers.PreTrainedModel)
    attention = model.decoder.config._attn_implementation
    assert attention == ("eager" if family_folder.name == "gemma2" else "sdpa")


@pytest.mark.parametrize("hook", HOOKS)
def test_padding_on_the_right_changes_nothing_before_it(family_folder: Path, hook: str) -> None:
    model = load(family_folder, [0, 2], hook)
    text_BT = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    padded_BT = torch.cat([text_BT, torch.zeros(2, 11, dtype=torch.int64)], dim=1)
    alone, padded = model.activations(text_BT), model.activations(padded_BT)
    for layer in (0, 2):
        torch.testing.assert_close(padded[layer][:, :9], alone[layer], rtol=1e-5, atol=1e-5)


def test_nothing_after_the_deepest_hooked_module_is_run(
    neox_folder: Path, token_ids_BT: Tensor
) -> None:
    model = load(neox_folder, [1, 2])
    expected = model.activations(token_ids_BT)
    model.decoder.final_layer_norm = Bomb()
    for layer, found_BTD in model.activations(token_ids_BT).items():
        assert torch.equal(found_BTD, expected[layer])
    with pytest.raises(AssertionError, match=r"^a module after the deepest hooked one was run$"):
        model.decoder(token_ids_BT)
    attention = replace(model, hook="attn_out", layers=(1,))
    model.blocks[1].mlp = Bomb()
    assert attention.activations(token_ids_BT).keys() == {1}


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_behind(neox_folder: Path, token_ids_BT: Tensor, fails: bool) -> None:
    model = load(neox_folder, [0, 1])
    if fails:
        model.blocks[1].mlp = Bomb()
        with pytest.raises(AssertionError, match=r"^a module after"):
            model.activations(token_ids_BT)
    else:
        model.activations(token_ids_BT)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.decoder.modules())


def save_again(source: Path, folder: Path, **how: Any) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(folder, **how)
    return folder


def save_as_bin(source: Path, folder: Path) -> Path:
    """The older format of PyTorch pickles, which many published checkpoints still have."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    "save",
    [lambda source, folder: save_again(source, folder, max_shard_size="20KB"), save_as_bin],
    ids=["sharded", "bin"],
)
def test_other_layouts_of_a_checkpoint_give_the_same(
    save: Callable[[Path, Path], Path], neox_folder: Path, tmp_path: Path, token_ids_BT: Tensor
) -> None:
    folder = save(neox_folder, tmp_path / "other")
    assert (
        len(list(folder.glob("model-*.safetensors"))) > 2 or (folder / "pytorch_model.bin").exists()
    )
    found, expected = load(folder, [1]), load(neox_folder, [1])
    assert torch.equal(found.activations(token_ids_BT)[1], expected.activations(token_ids_BT)[1])
    assert inspect_model(str(folder)).revision != inspect_model(str(neox_folder)).revision


def test_a_float16_checkpoint_is_computed_in_float32(
    neox_folder: Path, tmp_path: Path, token_ids_BT: Tensor
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(neox_folder, dtype=torch.float16)
    model.save_pretrained(tmp_path)
    assert inspect_model(str(tmp_path)).dtype == "float16"
    found_BTD = load(tmp_path, [1]).activations(token_ids_BT)[1]
    expected_BTD = load(neox_folder, [1]).activations(token_ids_BT)[1]
    assert found_BTD.dtype == torch.float32
    torch.testing.assert_close(found_BTD, expected_BTD, rtol=1e-2, atol=1e-2)
    assert not torch.equal(found_BTD, found_BTD.half().float())  # not merely cast at the end


def test_bfloat16_is_computed_in_bfloat16(family_folder: Path, token_ids_BT: Tensor) -> None:
    found_BTD = load(family_folder, [1], "mlp_out", torch.bfloat16).activations(token_ids_BT)[1]
    exact_BTD = load(family_folder, [1], "mlp_out").activations(token_ids_BT)[1]
    assert found_BTD.dtype == torch.bfloat16
    assert (found_BTD - exact_BTD).norm() < 0.03 * exact_BTD.norm()


def test_loading_prints_nothing_and_leaves_the_logging_of_transformers_as_it_was(
    neox_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    load(neox_folder, [1])
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def resident_bytes(file: Path, start: int, stop: int) -> int:
    """How much of a region of a file the page cache holds, by mincore."""
    page = mmap.PAGESIZE
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # touches no page
    n_pages = (len(mapped) + page - 1) // page
    flags = (ctypes.c_ubyte * n_pages)()
    anchor = ctypes.c_char.from_buffer(mapped)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), len(mapped), flags)
    del anchor
    assert failed == 0, os.strerror(ctypes.get_errno())
    return page * sum(flag & 1 for flag in flags[start // page : stop // page])


def drop_from_page_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise and mincore")
def test_weights_of_later_blocks_are_not_read_from_disk(tmp_path: Path) -> None:
    """A 24 MB model of 6 blocks: of the file's pages only those before block 1 are touched."""
    config = transformers.GPTNeoXConfig(
        **SHAPE | {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 2048}
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + header_bytes])
    spans = {
        layer: [o for k, v in header.items() if f"layers.{layer}." in k for o in v["data_offsets"]]
        for layer in (0, 2, 5)
    }
    drop_from_page_cache(file)
    if resident_bytes(file, 0, file.stat().st_size) > 0:
        pytest.skip("this file system cannot drop a file from the page cache")
    load(tmp_path, [0])
    # The kernel reads ahead, so a little of what follows block 0 may be there, but no later block.
    start = 8 + header_bytes
    first = start + min(spans[0]), start + max(spans[0])
    later = start + min(spans[2]), start + max(spans[5])
    assert resident_bytes(file, *first) > 0.9 * (first[1] - first[0])
    assert resident_bytes(file, *later) < 0.1 * (later[1] - later[0])


def test_of_a_model_that_sees_only_the_text_decoder_is_kept(
    tmp_path: Path, token_ids_BT: Tensor
) -> None:
    text = transformers.Gemma3TextConfig(
        **SHAPE, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8
    )
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    ids = {"image_token_id": 61, "boi_token_id": 62, "eoi_token_id": 63}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path, [1])
    assert not any("vision" in name for name, _ in model.decoder.named_modules())
    with torch.inference_mode():
        reference = load_full(tmp_path).language_model(token_ids_BT, output_hidden_states=True)
    assert torch.equal(model.activations(token_ids_BT)[1], reference.hidden_states[2])


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SHAPE, intermediate_size=48)
    transformers.BertModel(config).save_pretrained(tmp_path)
    message = (
        f"Model {tmp_path} is not causal: its activations at a token depend on later tokens. "
        "Pass a decoder-only language model."
    )
    with pytest.raises(InputError, match=whole(message)):
        load(tmp_path, [1])


@pytest.mark.parametrize("hook", ["attn_out", "mlp_out"])
def test_a_block_that_scales_what_it_adds_has_no_mlp_out(hook: str, tmp_path: Path) -> None:
    config = transformers.GraniteConfig(**SHAPE, intermediate_size=48, residual_multiplier=0.2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = (
        f"Model {tmp_path} does more in a block than add its attention and MLP outputs to the "
        f"residual stream, so {hook} is not defined for it. Pass --hook resid_post or resid_pre."
    )
    with pytest.raises(InputError, match=whole(message)):
        load(tmp_path, [1], hook)
    assert load(tmp_path, [1]).layers == (1,)


def test_a_block_without_an_mlp_module_names_what_it_has(tmp_path: Path) -> None:
    config = transformers.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = (
        "No MLP module was found in OPTDecoderLayer, which has self_attn, activation_fn, "
        "self_attn_layer_norm, fc1, fc2, final_layer_norm. Pass --hook resid_post or resid_pre, "
        "which work for any block."
    )
    with pytest.raises(InputError, match=whole(message)):
        load(tmp_path, [1], "mlp_out")


def test_activations_that_are_no_vector_a_token_are_refused(neox_folder: Path) -> None:
    message = (
        "Model m gives resid_post of shape (2, 6, 32) at layer 1 where (2, 6, 16) was expected, "
        "so it has no single vector a token there. Pass another --hook or another model."
    )
    with pytest.raises(InputError, match=whole(message)):
        check_model(replace(load(neox_folder, [1]), d_model=16), "m")


def test_blocks_are_the_list_with_the_most_parameters() -> None:
    """Lists of experts or of small adapters may have as many entries as there are blocks."""
    experts = [nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(2)]
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), e) for e in experts])
    adapters = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
    assert locate_blocks(nn.ModuleList([adapters, blocks, nn.Linear(1, 1)]), 2) is blocks


def test_a_model_without_blocks_is_refused() -> None:
    message = (
        "Linear has no list of 3 blocks, so its layers cannot be told apart. "
        "Pass a model of the usual decoder-only form."
    )
    with pytest.raises(InputError, match=whole(message)):
        locate_blocks(nn.Linear(2, 2), 3)
