"""Planted cases of what reconstructions do to a language model: one that is written down, and a
random one that is given back what it had.

# B contexts, T positions, V vocabulary, D d_model

The one that is written down is a GPT-NeoX whose blocks add nothing. Token v is a direction of its
own in the stream, V = D of them, and the head gives the token after it the logit that makes its
probability 0.9. Texts count upwards, so the next token is always that one: CE(clean) = -log 0.9. An
activation of zeros, or the mean of all, which the final norm makes zeros, gives all logits 0:
CE = log V. The SAE reconstructs every other token and gives zeros for the rest: its CE lies in the
middle, half of the loss is recovered. Latents are one token's each; ablated, the logit of one token
changes, and no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from ..evaluation.judged import JudgedSae
from ..evaluation.patched import PatchedModel
from ..evaluation.text import TextBatch
from ..hooks import HookedModel, locate_blocks
from ..metrics import get_metric
from ..models import FullModel
from .base import Check, checks_of
from .by_hand import relu_sae

P_NEXT = 0.9
COUNTING_V = 16
CONTEXTS, LENGTH, HORIZON = 8, 34, 4  # 32 positions of each context are scored
RANDOM_V, RANDOM_D = 64, 32


def counting_model() -> Iterator[Check]:
    """Losses in nats a token; ablations with the model's own logits."""
    v = COUNTING_V
    evens_SD = torch.eye(v)[::2]
    judged = JudgedSae(relu_sae(evens_SD.T, evens_SD), {"name": "every other token"})
    tokens_BT = (2 * np.arange(CONTEXTS)[:, None] + np.arange(LENGTH)) % v
    text = _text(_counting_model(), 0, tokens_BT, mean_D=torch.full((v,), 1 / v))
    losses = get_metric("downstream")
    ablations = get_metric("ablation_sparsity", tokens=CONTEXTS, horizon=HORIZON)
    for metric in (losses, ablations):
        metric.observe(text, [judged])
    clean, nothing = -math.log(P_NEXT), math.log(v)
    entropy = P_NEXT * clean - (1 - P_NEXT) * math.log((1 - P_NEXT) / (v - 1))
    expected = {
        "ce_clean": clean,
        "ce_zero": nothing,
        "ce_mean": nothing,
        "ce_sae": (clean + nothing) / 2,
        "delta_ce": (nothing - clean) / 2,
        "loss_recovered_zero": 0.5,
        "loss_recovered_mean": 0.5,
        "kl": (nothing - entropy) / 2,
    }
    yield from checks_of("downstream", losses.result(judged, seed=0), expected, 1e-4)
    expected = {"effective_logits": 1.0, "ablation_sparsity": 1 / (HORIZON * v)}
    yield from checks_of("ablation_sparsity", ablations.result(judged, seed=0), expected, 1e-4)


def model_as_it_was() -> Iterator[Check]:
    """An SAE that is exactly the identity, [I, -I] twice: no loss and no divergence is added.

    And one that always answers the mean activation costs what mean ablation costs. The model is
    random, so ratios to what zero ablation costs mean little, and are left to real ones.
    """
    mean_D = torch.linspace(-1, 1, RANDOM_D)
    both_SD = torch.cat([torch.eye(RANDOM_D), -torch.eye(RANDOM_D)])
    identity = JudgedSae(relu_sae(both_SD.T, both_SD), {"name": "identity"})
    nothing_SD = torch.zeros(4, RANDOM_D)
    mean = JudgedSae(relu_sae(nothing_SD.T, nothing_SD, mean_D), {"name": "mean"})
    random = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(1, RANDOM_V, (4, 16), generator=random).numpy()
    metric = get_metric("downstream")
    metric.observe(_text(_random_model(), 1, tokens_BT, mean_D), [identity, mean])
    unchanged = metric.result(identity, seed=0)
    yield from checks_of("downstream", unchanged, {"delta_ce": 0.0, "kl": 0.0}, 1e-5)
    ablated = metric.result(mean, seed=0)
    ce_mean = ablated.values["ce_mean"].value
    assert ce_mean is not None
    yield from checks_of("downstream", ablated, {"ce_sae": ce_mean}, 1e-5)


@torch.no_grad()
def _counting_model() -> Any:
    """The model above, of two blocks."""
    v = COUNTING_V
    lm = _neox(v, v, n_layers=2, layer_norm_eps=1e-12)
    for weight in lm.parameters():
        weight.zero_()
    decoder = lm.get_decoder()
    decoder.final_layer_norm.weight.fill_(1.0)
    decoder.get_input_embeddings().weight.copy_(torch.eye(v))
    # The norm makes of e_v (e_v - 1 / V) / deviation; V - 1 other tokens share what 0.9 leaves.
    deviation = math.sqrt((1 - 1 / v) / v)
    logit = math.log(P_NEXT / (1 - P_NEXT) * (v - 1))
    lm.get_output_embeddings().weight.copy_(torch.eye(v).roll(1, 0) * logit * deviation)
    return lm


def _random_model() -> Any:
    """Attention, MLPs and rotary positions, with random weights."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)  # transformers draws weights from the global generator
    lm = _neox(RANDOM_V, RANDOM_D, n_layers=3)
    torch.random.set_rng_state(torch_state)
    return lm


def _neox(n_vocabulary: int, d_model: int, n_layers: int, **options: float) -> Any:
    config = transformers.GPTNeoXConfig(
        vocab_size=n_vocabulary,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        intermediate_size=2 * d_model,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    return transformers.GPTNeoXForCausalLM(config).eval().requires_grad_(False)


def _text(
    lm: Any, layer: int, tokens_BT: NDArray[np.integer[Any]], mean_D: torch.Tensor
) -> TextBatch:
    """Contexts for a model hooked behind a block; their first positions yield no rows."""
    decoder, n_contexts = lm.get_decoder(), len(tokens_BT)
    hooked = HookedModel(
        decoder=decoder,
        blocks=locate_blocks(decoder, lm.config.num_hidden_layers),
        layers=(layer,),
        hook="resid_post",
        d_model=lm.config.hidden_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    rows_BT = np.ones(tokens_BT.shape, np.bool_)
    rows_BT[:, 0] = False
    return TextBatch(
        model=PatchedModel(FullModel(hooked=hooked, lm=lm, source="planted")),
        tokens_BT=tokens_BT.astype(np.int64),
        length_B=np.full(n_contexts, tokens_BT.shape[1]),
        rows_BT=rows_BT,
        unit_BT=np.repeat(np.arange(n_contexts)[:, None], tokens_BT.shape[1], axis=1),
        first_context=0,
        mean_D=mean_D,
    )
