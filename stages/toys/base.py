"""What a toy is: rows that are sums of features, and which features fire is known.

# N rows, D d_in, F features

x = sum of the features (F, D) that fire. A feature is a direction times its norm; directions are
orthogonal. Features form families: where a child fires its parent fires as well, so that an SAE
which pays for active latents gains by a latent that stands for both (absorption).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..fitconfig import FitConfig

# Far from an SAE's seeds: one that is drawn like the directions would start at the solution.
_DIRECTIONS, _ROWS, _HELD_OUT = 5_113_981, 15_485_863, 32_452_843


@dataclass(frozen=True, kw_only=True)
class Family:
    """A parent and its children, as numbers of features."""

    parent: int
    children: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ToyRows:
    """Activations (N, D), and which features fire in them, bool (N, F)."""

    x_ND: Tensor
    fires_NF: Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an architecture is fitted on a toy, and what is known to come out.

    fields: of FitConfig; known: values of `truth.Truth` with their tolerances; starts: seeds of
    which the one with the smallest loss counts.
    """

    steps: int
    batch_size: int = 256
    lr: float = 3e-3
    fields: Mapping[str, Any]
    known: Mapping[str, tuple[float, float]]
    starts: int = 1


class Toy(ABC):
    """Draws rows: the same for the same seeds and numbers of rows."""

    settings: ClassVar[Mapping[str, Setting]]  # by architecture

    def __init__(
        self, features_FD: Tensor, families: Sequence[Family], *, seed: int, rows_seed: int | None
    ) -> None:
        """seed: of the directions; rows_seed: of the rows, None is the same seed."""
        self.features_FD, self.families, self.seed = features_FD, tuple(families), seed
        rows_seed = seed if rows_seed is None else rows_seed
        self.random = torch.Generator().manual_seed(_ROWS + rows_seed)

    @property
    def n_features(self) -> int:
        return len(self.features_FD)

    @property
    def d_in(self) -> int:
        return self.features_FD.shape[1]

    @abstractmethod
    def fires(self, n_rows: int) -> Tensor:
        """Which features fire in the next rows, bool (N, F)."""

    def draw(self, n_rows: int) -> ToyRows:
        """The next rows."""
        return self.rows_of(self.fires(n_rows))

    def rows_of(self, fires_NF: Tensor) -> ToyRows:
        """Rows in which given features fire."""
        x_ND = fires_NF.to(self.features_FD.dtype) @ self.features_FD
        return ToyRows(x_ND=x_ND, fires_NF=fires_NF)

    def held_out(self) -> Toy:
        """The same features in other rows, with what is the default: rows to judge an SAE on."""
        made: Toy = type(self)(seed=self.seed, rows_seed=self.seed + _HELD_OUT)  # type: ignore[call-arg]
        return made

    def config(self, arch: str, *, steps: int | None = None, **changes: Any) -> FitConfig:
        """The setting of an architecture, with as many latents as features; changes win."""
        setting = self.settings[arch]
        fields = {
            "d_sae": self.n_features,
            "device": "cpu",
            "lr": setting.lr,
            "batch_size": setting.batch_size,
            **setting.fields,
            **changes,
        }
        tokens = (steps or setting.steps) * fields["batch_size"]
        return FitConfig(arch=arch, tokens=tokens, **fields)


def orthonormal(n: int, d_in: int, seed: int) -> Tensor:
    """n orthogonal directions of length 1 (n, D)."""
    random = torch.Generator().manual_seed(_DIRECTIONS + seed)
    rotation_DD, _ = torch.linalg.qr(torch.randn(d_in, d_in, generator=random, dtype=torch.float64))
    directions_ND: Tensor = rotation_DD[:n].float()
    return directions_ND
