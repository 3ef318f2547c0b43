"""Memory in which the rows of one block gather until it can be written.

# R rows of a block, D d_model

Plain memory when a block fills in a minute. When it takes longer, the buffer is a file in the store
with a note of how far it is filled, so that a crash costs a minute and not the block.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..storage.files import disk_error, write_json
from ..storage.loader import scatter_rows
from ..storage.values import Rows, ValueType

FOLDER = ".block"


class BlockBuffer:
    """Rows of one block for each hooked layer, in stored order."""

    def __init__(self, values: dict[int, Rows], journals: dict[int, Path], filled: int) -> None:
        """filled: contexts whose rows are there already."""
        self.values, self._journals, self.filled = values, journals, filled
        self._noted_at = time.monotonic()

    @classmethod
    def in_memory(cls, values: dict[int, Rows]) -> "BlockBuffer":
        """values: layer -> memory of the block's size, which may hold anything."""
        return cls(values, {}, 0)

    @classmethod
    def on_disk(
        cls, stores: dict[int, Path], label: str, n_rows: int, d_model: int, values_in: ValueType
    ) -> "BlockBuffer":
        """Go on with what an earlier run left there, if it did.

        stores: layer -> folder of its store; label: of the block, unique in the store.
        """
        values: dict[int, Rows] = {}
        journals: dict[int, Path] = {}
        filled = []
        for layer, store in stores.items():
            folder = store / FOLDER
            note, file = folder / f"{label}.json", folder / f"{label}.values"
            size = n_rows * d_model * values_in.bytes
            is_left = note.is_file() and file.is_file() and file.stat().st_size == size
            filled.append(int(json.loads(note.read_bytes())["contexts"]) if is_left else 0)
            try:
                if not is_left:  # never noted: nothing in it counts
                    note.unlink(missing_ok=True)
                    _reserve(file, size)
                values[layer] = np.memmap(file, values_in.memory, "r+", shape=(n_rows, d_model))
            except OSError as error:
                raise disk_error(error, file) from error
            journals[layer] = note
        return cls(values, journals, min(filled))

    @property
    def is_on_disk(self) -> bool:
        """Whether the rows are in files of the store rather than in memory."""
        return bool(self._journals)

    def put(self, layer: int, places_R: NDArray[np.int64], rows_RD: Rows) -> None:
        """Store rows at their places in the block."""
        scatter_rows(self.values[layer], places_R, rows_RD)

    def wants_note(self, every_s: float) -> bool:
        """Whether it is time to note how far the buffer is filled."""
        return self.is_on_disk and time.monotonic() - self._noted_at > every_s

    def note(self, contexts: int) -> None:
        """Make what is there durable and say so: the first `contexts` contexts are in."""
        for layer, note in self._journals.items():
            values = self.values[layer]
            assert isinstance(values, np.memmap)
            values.flush()
            write_json(note, {"contexts": contexts})
        self._noted_at = time.monotonic()

    def discard(self) -> None:
        """The block is written: give the memory or the files back."""
        self.values = {}
        for note in self._journals.values():
            note.unlink(missing_ok=True)  # first: a note without its values counts for nothing
            note.with_suffix(".values").unlink(missing_ok=True)


def _reserve(file: Path, size: int) -> None:
    """Take the disk space now: a full disk must be an error here, not a signal while filling."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as handle:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, size)
        else:  # macOS
            handle.truncate(size)
