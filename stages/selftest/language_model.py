"""Planted case of what reconstructions do to a language model: a model that is written down.

# B contexts, T positions, V vocabulary, D d_model

A GPT-NeoX whose blocks add nothing: token v is a direction of its own in the stream, V = D of them,
and the head gives the token after it the logit that makes its probability 0.9. Texts count upwards,
so the next token is always that one: CE(clean) = -log 0.9. An activation of zeros, or the mean of
all, which the final norm makes zeros, gives all logits 0: CE = log V. The SAE reconstructs every
other token and gives zeros for the rest: its CE lies in the middle, half of the loss is recovered.
Latents are one token's each; ablated, the logit of one token changes, and no other.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluation.judged import JudgedSae
from ..evaluation.patched import PatchedModel
from ..evaluation.text import TextBatch
from ..metrics import get_metric
from .base import Check, checks_of
from .by_hand import relu_sae

V = 16
P_NEXT = 0.9
CONTEXTS, LENGTH, HORIZON = 8, 34, 4  # 32 positions of each context are scored


def downstream() -> Iterator[Check]:
    """Losses in nats a token; ablations with the model's own logits."""
    with tempfile.TemporaryDirectory() as folder:
        model = _counting_model(Path(folder))
        evens_SD = torch.eye(V)[::2]
        judged = JudgedSae(relu_sae(evens_SD.T, evens_SD), {"name": "by hand"})
        losses = get_metric("downstream")
        ablations = get_metric("ablation_sparsity", tokens=CONTEXTS, horizon=HORIZON)
        batch = _counting_text(model)
        for metric in (losses, ablations):
            metric.observe(batch, [judged])
        clean, nothing = -math.log(P_NEXT), math.log(V)
        entropy = clean * P_NEXT - (1 - P_NEXT) * math.log((1 - P_NEXT) / (V - 1))
        expected: dict[str, float | None] = {
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
        yield from checks_of(
            "ablation_sparsity",
            ablations.result(judged, seed=0),
            {"effective_logits": 1.0, "ablation_sparsity": 1 / (HORIZON * V)},
            1e-4,
        )


def _counting_text(model: PatchedModel) -> TextBatch:
    """Contexts that count upwards from different tokens; the first position yields no row."""
    tokens_BT = (2 * np.arange(CONTEXTS)[:, None] + np.arange(LENGTH)) % V
    rows_BT = np.ones(tokens_BT.shape, np.bool_)
    rows_BT[:, 0] = False
    return TextBatch(
        model=model,
        tokens_BT=tokens_BT,
        length_B=np.full(CONTEXTS, LENGTH),
        rows_BT=rows_BT,
        unit_BT=np.repeat(np.arange(CONTEXTS)[:, None], LENGTH, axis=1),
        first_context=0,
        mean_D=torch.full((V,), 1 / V),
    )


@torch.no_grad()
def _counting_model(folder: Path) -> PatchedModel:
    """The model above, written to a folder and loaded as any other, hooked behind block 0 of 2."""
    import transformers
    from safetensors.torch import save_file

    from ..models import inspect_model, load_full

    config = transformers.GPTNeoXConfig(
        vocab_size=V,
        hidden_size=V,
        intermediate_size=V,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        layer_norm_eps=1e-12,
        bos_token_id=0,
        eos_token_id=0,
    )
    lm: Any = transformers.GPTNeoXForCausalLM(config)
    for weight in lm.parameters():
        weight.zero_()
    decoder = lm.get_decoder()
    decoder.final_layer_norm.weight.fill_(1.0)
    decoder.get_input_embeddings().weight.copy_(torch.eye(V))
    # The norm makes of e_v (e_v - 1 / V) / deviation; V - 1 other tokens share what 0.9 leaves.
    deviation = math.sqrt((1 - 1 / V) / V)
    logit = math.log(P_NEXT / (1 - P_NEXT) * (V - 1))
    lm.get_output_embeddings().weight.copy_(torch.eye(V).roll(1, 0) * logit * deviation)
    config.save_pretrained(folder)
    weights = {name: value.contiguous() for name, value in lm.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    info = inspect_model(str(folder))
    return PatchedModel(load_full(info, 0, "resid_post", torch.device("cpu"), torch.float32))
