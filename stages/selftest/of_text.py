"""A small language model, patched with what it had: nothing may change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import transformers

from ..evaluation.judged import JudgedSae
from ..evaluation.patched import PatchedModel
from ..evaluation.text import TextBatch
from ..hooks import HookedModel, locate_blocks
from ..metrics import get_metric
from ..models import FullModel
from ..sae import get_architecture
from . import Check

_D, _VOCABULARY, _LAYER = 32, 64, 1


def downstream_loss() -> Iterator[Check]:
    """An SAE that is exactly the identity, [I, -I] twice: no loss and no divergence is added.

    And one that always answers the mean activation costs what mean ablation costs. The model is
    random, so ratios to what zero ablation costs mean little, and are left to real ones.
    """
    text = _text()
    identity, mean = _identity(), _constant(text.mean_D)
    metric = get_metric("downstream")
    metric.observe(text, [identity, mean])
    values = metric.result(identity, seed=0).values
    yield Check(name="delta_ce", expected=0, found=values["delta_ce"].value, tolerance=1e-5)
    yield Check(name="kl", expected=0, found=values["kl"].value, tolerance=1e-5)
    values = metric.result(mean, seed=0).values
    ce_mean = values["ce_mean"].value
    assert ce_mean is not None
    yield Check(
        name="ce_sae of the mean", expected=ce_mean, found=values["ce_sae"].value, tolerance=1e-5
    )


def _text() -> TextBatch:
    config = transformers.GPTNeoXConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_D,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)  # transformers draws weights from the global generator
    lm = transformers.GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    torch.random.set_rng_state(torch_state)
    cpu, decoder = torch.device("cpu"), lm.gpt_neox
    hooked = HookedModel(
        decoder=decoder,
        blocks=locate_blocks(decoder, config.num_hidden_layers),
        layers=(_LAYER,),
        hook="resid_post",
        d_model=_D,
        device=cpu,
        dtype=torch.float32,
    )
    random = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(1, _VOCABULARY, (4, 16), generator=random)
    rows_BT = np.ones((4, 16), dtype=bool)
    rows_BT[:, 0] = False
    return TextBatch(
        model=PatchedModel(FullModel(hooked=hooked, lm=lm, source="planted")),
        tokens_BT=tokens_BT.numpy(),
        length_B=np.full(4, 16),
        rows_BT=rows_BT,
        unit_BT=np.repeat(np.arange(4)[:, None], 16, axis=1),
        first_context=0,
        mean_D=torch.linspace(-1, 1, _D),
    )


def _identity() -> JudgedSae:
    sae = get_architecture("relu")(d_in=_D, d_sae=2 * _D, k=None)
    both_SD = torch.cat([torch.eye(_D), -torch.eye(_D)])
    with torch.no_grad():
        sae.W_enc.copy_(both_SD.T)
        sae.W_dec.copy_(both_SD)
    return JudgedSae(sae.requires_grad_(False), {"name": "identity"})


def _constant(value_D: torch.Tensor) -> JudgedSae:
    sae = get_architecture("relu")(d_in=_D, d_sae=4, k=None)
    with torch.no_grad():
        sae.b_dec.copy_(value_D)
    return JudgedSae(sae.requires_grad_(False), {"name": "constant"})
