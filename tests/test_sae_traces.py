"""Two recorded traces of the reference trainers, 100 updates each, where a machine has them.

# B rows, D d_in, S d_sae
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_pipe.stages.fit import build_trainer
from sae_pipe.stages.fitconfig import FitConfig

from .parity_cases import disagreement

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
TRACES = {"topk": "topk.f64.npz", "matryoshka": "matryoshka_nodead.f64.npz"}

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the recorded traces of the reference trainers are not here"
)


def config_of(meta: dict[str, Any], arch: str, dtype: str) -> FitConfig:
    arguments = meta["kwargs"]
    return FitConfig(
        arch=arch,
        k=arguments["k"],
        d_sae=arguments["dict_size"],
        tokens=arguments["steps"] * 256,
        batch_size=256,
        lr=arguments["lr"],
        warmup_steps=arguments["warmup_steps"],
        decay_start=arguments["decay_start"] / arguments["steps"],
        auxk_coefficient=arguments["auxk_alpha"],
        threshold_start=arguments["threshold_start_step"],
        threshold_beta=arguments["threshold_beta"],
        dead_after_tokens=meta["overrides"].get("dead_feature_threshold", 10_000_000),
        device="cpu",
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("arch", TRACES)
def test_a_hundred_updates_agree_with_the_reference_trainer(arch: str, dtype: str) -> None:
    golden = np.load(GOLDEN / TRACES[arch])
    batches = np.load(GOLDEN / "batches.npy")
    torch_dtype = getattr(torch, dtype)
    trainer = build_trainer(config_of(json.loads(str(golden["meta"])), arch, dtype), 32)
    start = {name: torch.from_numpy(golden[f"init/{name}"]).to(torch_dtype) for name in PARAMETERS}
    trainer.sae.load_state_dict(start)

    found: dict[str, float] = {}
    values = []
    for i, batch in enumerate(batches, start=1):
        step = trainer.step(torch.from_numpy(batch).to(torch_dtype))
        values.append({name: float(value) for name, value in step.items()})
        if i in (1, 10, 100):
            for name, value in trainer.sae.state_dict().items():
                found[f"s{i:04d}/{name}"] = disagreement(value, golden[f"s{i:04d}/{name}"])
    theirs = {"grad_norm": "gradnorm", "threshold": "thr", "dead": "n_dead"}
    for name in ("loss", "aux", "l0", "k", "lr", *theirs):
        found[name] = disagreement([v[name] for v in values], golden[theirs.get(name, name)])
    with torch.no_grad():
        latents = trainer.sae.encode(torch.from_numpy(golden["probe/x"]).to(torch_dtype))
        found["probe/f"] = disagreement(latents, golden["probe/f"])
        found["probe/xhat"] = disagreement(trainer.sae.decode(latents), golden["probe/xhat"])
    tolerance = 1e-9 if dtype == "float64" else 1e-5
    assert {name: value for name, value in found.items() if not value < tolerance} == {}

    state = trainer.state_dict()
    moments = {
        f"adam_{moment}.{name}": disagreement(
            state[f"adam_{moment}.{name}"], golden[f"s0100/adam_{moment}.{name}"]
        )
        for moment in "mv"
        for name in PARAMETERS
    }
    # Squared gradients are heavy-tailed: an entry of 100 rms carries 100 times the rounding.
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    assert {name: value for name, value in moments.items() if not value < tolerance} == {}
