"""What a logger is given."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Logger(ABC):
    """Shows the lines of one run somewhere else."""

    @abstractmethod
    def __init__(self, folder: Path, recipe: Mapping[str, Any], step: int) -> None:
        """folder: of the run; recipe: what decides its weights; step: updates done before, 0 for a
        new run. Raises InputError when it cannot work."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""
