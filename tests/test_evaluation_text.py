"""What reconstructions do to the language model: the same as plain passes with plain hooks.

# B contexts, T positions, D d_model, V vocabulary
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_pipe.stages.evaluation.judged import JudgedSae
from sae_pipe.stages.evaluation.patched import PatchedModel
from sae_pipe.stages.evaluation.text import TextBatch
from sae_pipe.stages.hooks import HookedModel
from sae_pipe.stages.metrics.ablation_sparsity import AblationSparsity, effective_number
from sae_pipe.stages.metrics.downstream import Downstream
from sae_pipe.stages.models import FullModel, inspect_model, load_full
from sae_pipe.stages.sae import get_architecture
from sae_pipe.stages.taps import HOOKS
from sae_pipe.storage import InputError

CPU = torch.device("cpu")
V, D = 64, 32


def loaded(folder: Path, layer: int = 2, hook: str = "resid_post") -> FullModel:
    return load_full(inspect_model(str(folder)), layer, hook, CPU, torch.float32)


def tokens(n_contexts: int = 3, length: int = 12) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(1, V, (n_contexts, length), generator=random)


def plain_logits(model: FullModel, tokens_BT: Tensor, x_BTD: Tensor | None = None) -> Tensor:
    """One whole pass of the model, by its own head; x_BTD at the hook, by a hook of torch's."""
    handles = []
    if x_BTD is not None:
        hooked = model.hooked
        tap = HOOKS[hooked.hook](hooked.blocks[hooked.layers[0]])

        def after(_module: Any, _args: Any, output: Any) -> Any:
            return (x_BTD, *output[1:]) if isinstance(output, tuple) else x_BTD

        def before(_module: Any, args: Any) -> Any:
            return (x_BTD, *args[1:])

        add = tap.module.register_forward_hook
        handles = [
            add(after) if tap.end == "output" else tap.module.register_forward_pre_hook(before)
        ]
    with torch.no_grad():
        logits: Tensor = model.lm(input_ids=tokens_BT, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_patched_model_gives_the_logits_of_a_whole_pass(
    family_folder: Path, layer: int, hook: str
) -> None:
    model = loaded(family_folder, layer, hook)
    patched, tokens_BT = PatchedModel(model), tokens()
    clean = patched.clean(tokens_BT)
    # Nothing is run twice, but for what the embedding itself is.
    assert patched.reruns_all == (layer == 0 and hook != "resid_post")
    x_BTD = clean.x_BTD + torch.randn(clean.x_BTD.shape, generator=torch.Generator().manual_seed(1))
    for given in (clean.x_BTD, x_BTD):
        final_BTD = patched.patched(clean, given)
        logits = patched.logits(final_BTD.flatten(0, 1)).view(*tokens_BT.shape, V)
        torch.testing.assert_close(logits, plain_logits(model, tokens_BT, given))
    # The model is left as it was.
    own = patched.logits(clean.final_BTD.flatten(0, 1)).view(*tokens_BT.shape, V)
    torch.testing.assert_close(own, plain_logits(model, tokens_BT))


class _Counting(torch.nn.Module):
    """A block that counts its passes and asks for what it alone knows."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block, self.n_passes = block, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.n_passes += 1
        return self.block(*args, **kwargs)


def test_only_the_blocks_after_the_hook_are_run_again(neox_folder: Path) -> None:
    model = loaded(neox_folder, 1)
    blocks = [_Counting(block) for block in model.hooked.blocks]
    for place, block in enumerate(blocks):
        model.hooked.blocks[place] = block
    patched = PatchedModel(model)
    clean = patched.clean(tokens())
    before = [block.n_passes for block in blocks]
    patched.patched(clean, clean.x_BTD)
    assert [block.n_passes - n for block, n in zip(blocks, before, strict=True)] == [0, 0, 1, 1]


class _Remembering(torch.nn.Module):
    """A block whose output depends on what the first block was called with: no stand-in has that."""

    def __init__(self, block: torch.nn.Module, seen: list[Tensor], *, writes: bool) -> None:
        super().__init__()
        self.block, self.seen, self.writes = block, seen, writes

    def forward(self, x_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.writes:
            self.seen[:] = [x_BTD]
        out = self.block(x_BTD, *args, **kwargs)
        return out if self.writes else out + self.seen.pop()


def test_a_model_with_state_beside_the_stream_is_run_whole(neox_folder: Path) -> None:
    model, seen = loaded(neox_folder, 1), list[Tensor]()
    blocks = model.hooked.blocks
    blocks[0] = _Remembering(blocks[0], seen, writes=True)
    blocks[3] = _Remembering(blocks[3], seen, writes=False)
    patched, tokens_BT = PatchedModel(model), tokens()
    clean = patched.clean(tokens_BT)
    assert patched.reruns_all
    x_BTD = clean.x_BTD * 0.5
    logits = patched.logits(patched.patched(clean, x_BTD).flatten(0, 1))
    torch.testing.assert_close(logits, plain_logits(model, tokens_BT, x_BTD).flatten(0, 1))


def test_a_model_that_gives_other_logits_with_its_own_activations_is_refused(
    neox_folder: Path,
) -> None:
    model = loaded(neox_folder, 1)
    noise = iter(range(1000))
    norm: Any = model.hooked.decoder.final_layer_norm
    norm.register_forward_hook(lambda _module, _args, output: output + next(noise))
    message = (
        f"Model {neox_folder} gives other logits when its own resid_post of layer 1 is put back, "
        "so what a reconstruction does to it cannot be measured. Leave out the metrics that need "
        "the language model."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        PatchedModel(model).clean(tokens())


def some_sae(seed: int = 0) -> JudgedSae:
    sae = get_architecture("topk")(d_in=D, d_sae=48, k=8)
    sae.initialise_(seed)
    return JudgedSae(sae, {"name": f"sae {seed}"})


def batch(model: PatchedModel, *, first: int = 0) -> TextBatch:
    """Three contexts of 12, 9 and 5 tokens; the first position yields no row."""
    length_B = np.array([12, 9, 5])
    rows_BT = np.arange(12) < length_B[:, None]
    rows_BT[:, 0] = False
    return TextBatch(
        model=model,
        tokens_BT=tokens().numpy(),
        length_B=length_B,
        rows_BT=rows_BT,
        unit_BT=np.repeat([[4], [4], [9]], 12, axis=1),
        first_context=first,
        mean_D=torch.linspace(-1, 1, D),
    )


def plain_losses(model: FullModel, text: TextBatch, judged: JudgedSae) -> dict[str, float]:
    """CE and KL of each pass at the scored positions, by whole passes and a loop over positions."""
    tokens_BT = torch.from_numpy(text.tokens_BT)
    clean_x = text.clean.x_BTD
    x_hat = judged.sae(clean_x.flatten(0, 1)).view_as(clean_x)
    values = {
        "clean": clean_x,
        "zero": torch.zeros_like(clean_x),
        "mean": text.mean_D.expand_as(clean_x),
        "sae": x_hat,
    }
    log_p = {}
    for name, x_BTD in values.items():
        patched = torch.where(torch.from_numpy(text.rows_BT)[..., None], x_BTD, clean_x)
        log_p[name] = plain_logits(model, tokens_BT, patched).double().log_softmax(dim=-1)
    sums = dict.fromkeys([*values, "kl"], 0.0)
    count = 0
    for b, length in enumerate(text.length_B):
        for t in range(1, length - 1):
            count += 1
            for name in values:
                sums[name] -= float(log_p[name][b, t, tokens_BT[b, t + 1]])
            p = log_p["clean"][b, t].exp()
            sums["kl"] += float((p * (log_p["clean"][b, t] - log_p["sae"][b, t])).sum())
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("hook", ["resid_post", "mlp_out"])
def test_downstream_loss_is_its_definition(neox_folder: Path, hook: str) -> None:
    model = loaded(neox_folder, 1, hook)
    patched, judged = PatchedModel(model), some_sae()
    metric, text = Downstream(), batch(patched)
    metric.observe(text, [some_sae(1), judged])
    found = metric.result(judged, seed=0)
    expected = plain_losses(model, text, judged)
    values = {name: value.value for name, value in found.values.items()}
    for name in ("clean", "zero", "mean", "sae"):
        assert values[f"ce_{name}"] == pytest.approx(expected[name], rel=1e-5)
    assert values["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    delta = expected["sae"] - expected["clean"]
    assert values["delta_ce"] == pytest.approx(delta, abs=1e-5)
    for name in ("zero", "mean"):
        rise = expected[name] - expected["clean"]
        if rise > 0:
            assert values[f"loss_recovered_{name}"] == pytest.approx(1 - delta / rise, rel=1e-3)
        else:
            assert values[f"loss_recovered_{name}"] is None
    assert found.sample == {"tokens": 10 + 7 + 3, "contexts": 3, "documents": 2}


def loud(folder: Path) -> PatchedModel:
    """A model whose predictions are far from uniform."""
    model = loaded(folder, 1)
    model.lm.lm_head.weight.mul_(50)
    return PatchedModel(model)


def with_next_tokens(text: TextBatch, final_BTD: Tensor) -> TextBatch:
    """The same text, but scored by the tokens that some hidden states find likeliest."""
    likeliest = text.model.logits(final_BTD.flatten(0, 1)).argmax(dim=-1)
    tokens_BT = text.tokens_BT.copy()
    tokens_BT[:, 1:] = likeliest.view(tokens_BT.shape).numpy()[:, :-1]
    other = replace(text, tokens_BT=tokens_BT)
    other.__dict__["clean"] = text.clean
    return other


def test_the_share_of_the_loss_recovered_is_given_where_ablation_loses(neox_folder: Path) -> None:
    text, judged, metric = batch(loud(neox_folder)), some_sae(), Downstream()
    metric.observe(with_next_tokens(text, text.clean.final_BTD), [judged])
    found = metric.result(judged, seed=0)
    values = {name: value.value or 0.0 for name, value in found.values.items()}
    assert values["ce_zero"] > values["ce_clean"]
    assert values["loss_recovered_zero"] == pytest.approx(
        1 - values["delta_ce"] / (values["ce_zero"] - values["ce_clean"])
    )
    assert found.details == {}
    assert found.values["delta_ce"].low is not None


def test_a_ratio_is_refused_where_ablation_does_not_raise_the_loss(neox_folder: Path) -> None:
    text, judged, metric = batch(loud(neox_folder)), some_sae(), Downstream()
    # What comes next is what the zero-ablated model finds likeliest: the clean one does worse.
    zero_BTD = text.model.patched(text.clean, text.ablated(torch.zeros(D)))
    metric.observe(with_next_tokens(text, zero_BTD), [judged])
    found = metric.result(judged, seed=0)
    assert found.values["loss_recovered_zero"].value is None
    ce = {name: found.values[f"ce_{name}"].value for name in ("zero", "clean")}
    assert found.details["refused"]["loss_recovered_zero"] == (
        f"CE(zero) = {ce['zero']:.4f} is not above CE(clean) = {ce['clean']:.4f}: ablation does not "
        "raise the loss, so that the ratio has no meaning"
    )


def test_an_effective_number_of_logits_is_one_for_one_and_all_for_all() -> None:
    one = torch.zeros(2, 9)
    one[1, 3] = -2.0
    assert effective_number(one) == pytest.approx((1.0, 1 / 18))
    both_sides = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0]]) + 7.0  # a constant changes nothing
    assert effective_number(both_sides) == pytest.approx((4.0, 4 / 5))
    assert np.isnan(effective_number(torch.ones(2, 9))).all()


def test_ablation_sparsity_is_its_definition(neox_folder: Path) -> None:
    model = loaded(neox_folder, 1)
    patched, judged = PatchedModel(model), some_sae()
    metric, text = AblationSparsity(tokens=2, latents=100, horizon=3), batch(patched)
    metric.observe(text, [judged])
    found = metric.result(judged, seed=0)
    tokens_BT, x_BTD = torch.from_numpy(text.tokens_BT), text.clean.x_BTD
    # Any token of the first two contexts may be drawn: one of all pairs has to be what was found.
    means = [[_plain_ablations(model, judged, tokens_BT, x_BTD, b, t) for t in range(1, n - 2)]
             for b, n in ((0, 12), (1, 9))]  # fmt: skip
    pairs = [
        (sum(first) + sum(second)) / (len(first) + len(second))
        for first in means[0]
        for second in means[1]
    ]
    value = found.values["effective_logits"].value
    assert any(value == pytest.approx(pair, rel=1e-3) for pair in pairs)
    share = found.values["ablation_sparsity"].value
    assert share == pytest.approx((value or 0) / (3 * V))
    assert found.sample["tokens"] == 2


def _plain_ablations(
    model: FullModel, judged: JudgedSae, tokens_BT: Tensor, x_BTD: Tensor, b: int, t: int
) -> list[float]:
    """Effective numbers of all active latents of one token, by whole passes."""
    found = []
    clean = plain_logits(model, tokens_BT)[b, t : t + 3].double()
    for latent, value in enumerate(judged.sae.encode(x_BTD[b, t])):
        if value == 0:
            continue
        patched = x_BTD.clone()
        patched[b, t] -= value * judged.W_dec[latent]
        difference = plain_logits(model, tokens_BT, patched)[b, t : t + 3].double() - clean
        d = (difference - difference.median(dim=1, keepdim=True).values).numpy()
        found.append(float(np.abs(d).sum() ** 2 / (d**2).sum()))
    return found


def test_load_full_takes_the_whole_model(neox_folder: Path) -> None:
    model = loaded(neox_folder, 1)
    assert isinstance(model.hooked, HookedModel)
    assert len(model.hooked.blocks) == 4
