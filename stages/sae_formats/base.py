"""What a format is, and what formats share: tensors under other names, and our own section.

# D d_in, S d_sae

Every format here keeps two things: tensors, and a place for a JSON object of ours (`sae_pipe`) that
its own tool leaves alone. The tensors are the SAE as that tool sees it; the section holds what the
tool has no place for (which of two architectures with the same tensors it is, group weights, the
run's recipe), so that an SAE comes back as it left. It is only believed where it agrees with the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...storage.errors import InputError
from ..sae.base import Sae
from ..sae.ksparse import NO_THRESHOLD, KSparse
from ..sae.weights import describe_sae, rebuild_sae
from .facts import Facts, Json, config_of, facts_of, section

SECTION = "sae_pipe"
_SECTION_VERSION = 1
UNIT_TOLERANCE = 1e-5  # of norms of decoder rows


class Place(NamedTuple):
    """Where a format keeps a tensor of ours. spread: a scalar of ours is repeated for each latent."""

    ours: str
    transposed: bool = False
    spread: bool = False


Layout = Mapping[str, Place]


class SaeFormat(ABC):
    """One format. name: its key in FORMATS; tool: who reads it; names of its two files, of which
    config_file may be ""."""

    name: ClassVar[str]
    tool: ClassVar[str]
    config_file: ClassVar[str]
    weights_file: ClassVar[str]

    @abstractmethod
    def check(self, sae: Sae, facts: Facts) -> None:
        """Raises InputError that names what the format cannot hold of this SAE."""

    @abstractmethod
    def write(self, sae: Sae, facts: Facts, folder: Path) -> Path:
        """Write the files into an empty folder, after `check`; where the format's own loader is to
        be pointed, which is the folder or one inside it. Raises DiskError."""

    @abstractmethod
    def read(self, folder: Path) -> tuple[Sae, Facts]:
        """The SAE of a folder, its parameters frozen. Raises InputError for whatever it is not."""

    @abstractmethod
    def loading(self, *, sae: Sae, facts: Facts, repo: str, folder: str) -> str:
        """Lines of Python that load it with its tool from that folder of a repository of the Hub."""

    def sizes(self, folder: Path) -> tuple[int, int] | None:
        """(d_in, d_sae) as the config says, before the weights are there; None without a config.

        Raises InputError.
        """
        return None

    def is_in(self, names: set[str]) -> bool:
        """Whether a folder with files of these names is one of this format."""
        return {self.weights_file, self.config_file} <= names


# --- tensors under other names ---


def to_theirs(sae: Sae, layout: Layout) -> dict[str, Tensor]:
    """The SAE's tensors as a format names them."""
    state = {name: value.detach().cpu() for name, value in sae.state_dict().items()}
    return {name: _their_tensor(sae, state[place.ours], place) for name, place in layout.items()}


def _their_tensor(sae: Sae, value: Tensor, place: Place) -> Tensor:
    if place.spread:
        value = value.to(sae.W_dec.dtype).expand(sae.d_sae)
    # A copy of its own: formats of files do not share memory between tensors.
    return (value.T if place.transposed else value).clone(memory_format=torch.contiguous_format)


def their_shapes(sae: Sae, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of `to_theirs`."""
    ours = sae.parameter_shapes()
    return {
        name: (sae.d_sae,)
        if place.spread
        else (ours[place.ours][::-1] if place.transposed else ours[place.ours])
        for name, place in layout.items()
    }


def fill(sae: Sae, tensors: Mapping[str, Tensor], layout: Layout, **others: Tensor) -> Sae:
    """Give an SAE that has no storage yet the tensors of a file. Raises InputError.

    Weights in half precision become float32, which holds the same values. others: tensors of ours
    that the layout has no place for.
    """
    weights = [value for value in tensors.values() if value.is_floating_point()]
    is_double = any(value.dtype == torch.float64 for value in weights)
    dtype = torch.float64 if is_double else torch.float32
    state = {
        place.ours: _our_tensor(tensors[name], place, dtype) for name, place in layout.items()
    } | others
    if isinstance(sae, KSparse):
        state["threshold"] = state.get("threshold", torch.tensor(NO_THRESHOLD)).to(dtype)
        if sae.k > sae.d_sae:
            raise InputError(f"The SAE keeps k={sae.k} of d_sae={sae.d_sae} latents.")
    sae.load_state_dict(state, assign=True)
    return sae.requires_grad_(False).eval()


def _our_tensor(value: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    value = value.to(dtype)
    if place.spread:
        return value[0].clone()
    return (value.T if place.transposed else value).contiguous()


def is_constant(value: Tensor) -> bool:
    """Whether all entries are the same number."""
    return bool((value == value.flatten()[0]).all())


# --- our section ---


def our_section(sae: Sae, facts: Facts) -> Json:
    """What a format has no place for, as JSON."""
    found: Json = {"version": _SECTION_VERSION, "config": config_of(sae, facts)}
    if isinstance(sae, KSparse):
        found["threshold"] = float(sae.threshold)
    return found


def from_section(found: Any, file: Path) -> tuple[Sae, Facts, Tensor | None] | None:
    """The SAE, without storage, that our section describes, and its threshold if it is one number.

    None when there is no section. Raises InputError when there is one that cannot be.
    """
    if found is None:
        return None
    config = section(found, "config") if isinstance(found, dict) else {}
    version = found.get("version") if isinstance(found, dict) else None
    if type(version) is not int or version > _SECTION_VERSION:
        raise InputError(
            f"The section {SECTION} of {file} has version {str(version)[:100]}, and this sae-pipe "
            f"reads up to {_SECTION_VERSION}. Upgrade it: pip install --upgrade sae-pipe."
        )
    try:
        sae = rebuild_sae(config.get("sae"))
    except ValueError as error:
        raise InputError(
            f"The section {SECTION} of {file} describes no SAE ({str(error)[:200]}). "
            "Remove it to believe the rest."
        ) from error
    threshold = found.get("threshold")
    if not isinstance(sae, KSparse):
        return sae, facts_of(config), None
    if type(threshold) not in (int, float) or not abs(threshold) < 3.4e38:
        raise InputError(
            f"The section {SECTION} of {file} has threshold {str(threshold)[:100]!r}, which is no "
            "number of float32. Remove the section to believe the rest."
        )
    return sae, facts_of(config), torch.tensor(threshold, dtype=torch.float64)


# --- what several formats cannot hold ---


def refuse(name: str, sae: Sae, what: str, instead: str) -> InputError:
    """The sentence for an SAE that a format cannot hold."""
    architecture = describe_sae(sae)["architecture"]
    return InputError(
        f"{name} cannot hold this {architecture} SAE: {what}. Export it with {instead}."
    )


def has_unit_rows(W_dec: Tensor) -> bool:
    """Whether all decoder rows have norm 1, to what float32 gives."""
    return bool(((W_dec.norm(dim=1) - 1).abs() <= UNIT_TOLERANCE).all())


def decoder_norm_of(W_dec: Tensor) -> str:
    """How a fit would have held these decoder rows."""
    return "unit" if has_unit_rows(W_dec) else "free"
