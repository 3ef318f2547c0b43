"""What is judged: a fitted SAE, or a baseline that has its interface.

# B rows, D d_in, S d_sae

`facts` is the `run` section of a result file:
    name, path, sae_sha256    of the run folder; sae_sha256 is that of sae.safetensors
    arch, k, d_in, d_sae      of the SAE; k is the L0 asked for, or null
    seed, steps, tokens       of the fit
    model, model_revision, layer, hook, mask_p, store, store_digest    of the store it was fitted from
    recipe                    of the fit, as config.json has it
    baseline, of              null; of a baseline its kind, and the name of the run that it belongs to
What a folder does not say (of an SAE that was converted from elsewhere) is null.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...storage.files import file_digest
from ..sae.base import Sae
from ..sae.support import weighted_row_sums
from ..sae.weights import read_config, read_sae
from .latents import SparseLatents

# Of a full matrix of latents, some of which stand at once. On a CPU they should stay in its cache:
# rows of 64 MiB took a quarter longer than of 4 (d_in 768, d_sae 4096).
_ENCODE_BYTES, _ENCODE_BYTES_CPU, _LEAST_ROWS = 1 << 28, 1 << 22, 64


class Judged(ABC):
    """One SAE or baseline under judgement.

    has_latents: whether latents mean anything (they do not for the mean predictor, which metrics
    over items leave out).
    """

    has_latents = True

    def __init__(self, *, W_dec: Tensor, b_dec: Tensor, facts: Mapping[str, Any]) -> None:
        self.W_dec, self.b_dec, self.facts = W_dec, b_dec, facts
        self.d_sae, self.d_in = W_dec.shape

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def baseline(self) -> str | None:
        found = self.facts.get("baseline")
        return None if found is None else str(found)

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @torch.no_grad()
    def encode(self, x_BD: Tensor) -> SparseLatents:
        """Latents of raw activations, each row for itself; float32."""
        x_BD = x_BD.to(self.device, torch.float32)
        most = _ENCODE_BYTES_CPU if self.device.type == "cpu" else _ENCODE_BYTES
        rows = max(_LEAST_ROWS, most // (4 * self.d_sae))
        parts = [SparseLatents.of(self.latents(part)) for part in torch.split(x_BD, rows)]
        return parts[0] if len(parts) == 1 else SparseLatents.joined(parts)

    @abstractmethod
    def latents(self, x_BD: Tensor) -> Tensor:
        """Latents as a full matrix (B, S)."""

    @torch.no_grad()
    def decode(self, latents: SparseLatents) -> Tensor:
        """Reconstructions (B, D): of each row the sum of its active decoder rows, and b_dec."""
        sums_BD = weighted_row_sums(self.W_dec, latents.latent_N, latents.values_N, latents.starts)
        return sums_BD + self.b_dec


class JudgedSae(Judged):
    """A fitted SAE; one in another number format is judged as a float32 copy."""

    def __init__(self, sae: Sae, facts: Mapping[str, Any]) -> None:
        self.sae = sae if sae.W_dec.dtype == torch.float32 else copy.deepcopy(sae).float()
        super().__init__(W_dec=self.sae.W_dec.data, b_dec=self.sae.b_dec.data, facts=facts)

    def latents(self, x_BD: Tensor) -> Tensor:
        return self.sae.encode(x_BD)


def load_judged(run: Path, device: torch.device) -> JudgedSae:
    """The SAE of a run folder. Raises StoreError when it is unfinished or damaged."""
    sae = read_sae(run, device)
    return JudgedSae(sae, read_facts(run))


def read_facts(run: Path) -> dict[str, Any]:
    """The `run` section of a result, from config.json and the digest of sae.safetensors.

    Raises StoreError when the folder is not a run; a run without weights yet has no sae_sha256.
    """
    config = read_config(run)
    sae, recipe = _section(config, "sae"), _section(config, "recipe")
    resolved, store = _section(config, "resolved"), _section(config, "store")
    of_store = _section(store, "recipe")
    model = _section(of_store, "model")
    weights, path = run / "sae.safetensors", store.get("path")
    return {
        "name": run.resolve().name,
        "path": str(run.resolve()),
        "sae_sha256": file_digest(weights) if weights.is_file() else None,
        "arch": sae.get("architecture"),
        "k": sae.get("k"),
        "d_in": sae.get("d_in"),
        "d_sae": sae.get("d_sae"),
        "seed": recipe.get("seed"),
        "steps": resolved.get("steps"),
        "tokens": resolved.get("tokens"),
        "model": model.get("name"),
        "model_revision": model.get("revision"),
        "layer": of_store.get("layer"),
        "hook": of_store.get("hook"),
        "mask_p": _section(of_store, "mask").get("p"),
        "store": path if isinstance(path, str) and path else None,
        "store_digest": store.get("digest"),
        "recipe": recipe,
        "baseline": None,
    }


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}
