"""What tests of the GPU's way of stepping run, with a GPU and without: cases of a step, in all types."""

from typing import Any

import torch

from sae_pipe.stages.fit import build_trainer
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.trainer import Trainer

from .parity_cases import CASES, D_IN, Case

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bf16 selection": {"dtype": "float32", "selection": "bf16"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 moments": {"dtype": "float32", "optimizer_state": "bfloat16"},
}
MORE_CASES = {
    "multi_topk": Case("topk", CASES["topk"].options | {"multi_topk": 1 / 8}),
    "k annealed": Case("batch_topk", CASES["batch_topk"].options | {"k_anneal_steps": 20}),
    "few of many dead": Case("topk", CASES["topk"].options | {"k_aux": 2}),  # entry by entry
    "led to an L0": Case("gated", CASES["gated"].options | {"sparsity": None, "k": 6}),
    "p_anneal led to an L0": Case(
        "p_anneal", CASES["p_anneal"].options | {"sparsity": None, "k": 6}
    ),
}
ALL_CASES = CASES | MORE_CASES
FIRST_OF_ARCH = {case.arch: case for case in reversed(ALL_CASES.values())}


def trainer_of(case: Case, **changes: Any) -> Trainer:
    trainer = build_trainer(FitConfig(**(case.fit_options | changes)), D_IN)
    start = case.start()
    with torch.no_grad():
        for name, parameter in trainer.sae.named_parameters():
            parameter.copy_(start[name])
    return trainer
