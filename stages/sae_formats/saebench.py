"""SAEBench: dictionary_learning's folder, held to what SAEBench's loaders check
(sae_bench/custom_saes, version 0.6.0; github.com/adamkarvonen/SAEBench).

They take the residual stream after a layer, ask that the model's name be in lm_name and that d_sae >= d_in, refuse
decoder rows that are not of norm 1 within 1e-5 (of `relu` ones they scale them), and refuse a negative
threshold when a BatchTopK or Matryoshka SAE encodes.
"""

from __future__ import annotations

from ...storage.errors import InputError
from ..sae.base import Sae
from ..sae.batch_topk import BatchTopK
from ..sae.relu import Relu
from ..sae.weights import describe_sae
from .base import UNIT_TOLERANCE, has_unit_rows, refuse
from .dictionary_learning import DictionaryLearning
from .facts import Facts

# Architecture of ours -> module of sae_bench.custom_saes, and what its loader is called after.
_LOADERS = {
    "relu": ("relu_sae", "relu"),
    "p_anneal": ("relu_sae", "relu"),
    "gated": ("gated_sae", "gated"),
    "jumprelu": ("jumprelu_sae", "jump_relu"),
    "topk": ("topk_sae", "topk"),
    "batch_topk": ("batch_topk_sae", "batch_topk"),
    "matryoshka": ("batch_topk_sae", "matryoshka_batch_topk"),
}
_INSTEAD = "--format saelens, which SAEBench takes as well"


class SaeBench(DictionaryLearning):
    """Read as dictionary_learning, which it is."""

    name = "saebench"
    tool = "SAEBench"

    def loading(self, *, sae: Sae, facts: Facts, repo: str, folder: str) -> str:
        module, kind = _LOADERS[describe_sae(sae)["architecture"]]
        loader = f"load_dictionary_learning_{kind}_sae"
        model = (facts.model or "").rpartition("/")[2]
        return (
            f"import torch\nfrom sae_bench.custom_saes.{module} import {loader}\n\n"
            f"sae = {loader}(\n"
            f"    repo_id={repo!r},\n    filename={folder + '/ae.pt'!r},\n"
            f'    model_name={model!r},\n    device=torch.device("cpu"),\n'
            "    dtype=torch.float32,\n)"
        )

    def check(self, sae: Sae, facts: Facts) -> None:
        super().check(sae, facts)
        for name, value in (("model", facts.model), ("layer", facts.layer), ("hook", facts.hook)):
            if value is None:
                raise InputError(
                    f"{self.name} needs the {name}, which the run does not say. Pass --{name}."
                )
        if facts.hook != "resid_post":
            raise refuse(
                self.name,
                sae,
                f"it was fitted on {facts.hook}, and the loader takes every SAE for one of "
                "resid_post",
                _INSTEAD,
            )
        if sae.d_sae < sae.d_in:
            raise refuse(
                self.name,
                sae,
                f"d_sae={sae.d_sae} is less than d_in={sae.d_in}, which the loader refuses",
                _INSTEAD,
            )
        if isinstance(sae, Relu):
            if not sae.subtracts_b_dec:
                raise refuse(
                    self.name, sae, "its encoder sees x, and the loader's x - b_dec", _INSTEAD
                )
        elif not has_unit_rows(sae.W_dec):
            raise refuse(
                self.name,
                sae,
                f"its decoder rows are not of norm 1 within {UNIT_TOLERANCE:g}, which the loader "
                "refuses",
                _INSTEAD,
            )
        if isinstance(sae, BatchTopK) and not sae.is_ready:
            raise refuse(
                self.name,
                sae,
                f"its threshold {float(sae.threshold):g} was never estimated, and the loader asks "
                "for one that is not negative",
                "--format saelens",
            )
