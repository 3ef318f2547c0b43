"""TensorBoard: event files in the run folder. `tensorboard --logdir runs` shows all runs beside
one another."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from .base import Logger


class TensorBoard(Logger):
    """Writes RUN/tensorboard/."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], step: int) -> None:
        module: Any = import_module("torch.utils.tensorboard")
        # Points after the checkpoint that a run goes on from are hidden: they come again.
        purge_step = step + 1 if step else None
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        if not step:
            self._writer.add_text("recipe", "  \n".join(f"{k} {v}" for k, v in recipe.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
