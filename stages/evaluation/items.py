"""Items of an evaluation set, task by task: activations and every SAE's latents, pooled.

# I items of a task, R rows of a part of them, D d_in, S d_sae
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from ...storage.evalset import EvalSet
from ..metrics.base import TaskData
from .judged import Judged
from .latents import SparseLatents

_PART_ROWS = 8192


class TaskReader:
    """Reads one task: its activations, and latents as each SAE encodes them, part by part.

    An item is never cut: parts end where items do.
    """

    def __init__(self, evalset: EvalSet, task: int, *, seed: int) -> None:
        self._evalset = evalset
        items = evalset.items_of(task)
        self._items = slice(int(items[0]), int(items[-1]) + 1) if len(items) else slice(0, 0)
        self._first_row = evalset.first_row[self._items.start : self._items.stop + 1]
        self.n_rows = int(self._first_row[-1] - self._first_row[0])
        entry = evalset.tasks[task]
        self.data = TaskData(
            name=entry.name,
            suite=evalset.suite,
            classes=entry.classes,
            groups=entry.groups,
            x_ID=np.empty((len(items), evalset.d_in), np.float32),
            label_I=evalset.item_label[self._items],
            group_I=evalset.item_group[self._items],
            split_I=evalset.item_split[self._items],
            document_I=evalset.item_document[self._items],
            texts=Texts(evalset, self._items.start, len(items)),
            seed=seed,
        )

    def read(
        self,
        judged: Sequence[Judged],
        device: torch.device,
        encode: Callable[[Judged, torch.Tensor], SparseLatents | None],
        advance: Callable[[int], object],
    ) -> list[csr_array | None]:
        """Fill `data.x_ID`; pooled latents (I, S) of each SAE, None where encode gave None once."""
        parts: list[list[csr_array] | None] = [[] for _ in judged]
        for first, last in self._parts():
            starts = self._first_row[first : last + 1]
            x_RD = self._evalset.read(int(starts[0]), int(starts[-1]))
            starts = starts - starts[0]
            self.data.x_ID[first:last] = pooled_rows(x_RD, starts)
            on_device = torch.from_numpy(x_RD).to(device)
            for place, each in enumerate(judged):
                found = parts[place]
                if found is None:
                    continue
                latents = encode(each, on_device)
                if latents is None:
                    parts[place] = None
                else:
                    found.append(pooled_latents(latents, starts))
            advance(len(x_RD))
        return [None if found is None else _stacked(found) for found in parts]

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Ranges of items of about `_PART_ROWS` rows."""
        first, n_items = 0, len(self._first_row) - 1
        while first < n_items:
            most = self._first_row[first] + _PART_ROWS
            last = int(np.searchsorted(self._first_row, most, side="right")) - 1
            last = min(max(last, first + 1), n_items)
            yield first, last
            first = last


def _stacked(parts: list[csr_array]) -> csr_array:
    return parts[0] if len(parts) == 1 else csr_array(vstack(parts, format="csr"))


def pooled_rows(x_RD: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.float32]:
    """The mean of each item's rows, float32 (I, D), summed in float64; starts: (I + 1,)."""
    counts_I = np.diff(starts)
    if (counts_I == 1).all():
        return x_RD
    sums_ID = np.add.reduceat(x_RD, starts[:-1], axis=0, dtype=np.float64)
    return np.asarray(sums_ID / counts_I[:, None], np.float32)


def pooled_latents(latents: SparseLatents, starts: NDArray[np.int64]) -> csr_array:
    """The mean of each item's latents, as compressed rows (I, S), columns sorted."""
    n_rows = latents.n_rows
    rows_RS = csr_array(
        (
            latents.values_N.cpu().numpy(),
            latents.latent_N.cpu().numpy().astype(np.int32),
            latents.starts.cpu().numpy(),
        ),
        shape=(n_rows, latents.d_sae),
    )
    counts_I = np.diff(starts)
    if (counts_I == 1).all():
        return rows_RS
    share_R = np.repeat((1 / counts_I).astype(np.float32), counts_I)
    mean_IR = csr_array((share_R, np.arange(n_rows), starts), shape=(len(counts_I), n_rows))
    pooled = csr_array(mean_IR @ rows_RS)
    pooled.sort_indices()
    return pooled


class Texts(Sequence[str]):
    """The texts of a task's items, read when asked for."""

    def __init__(self, evalset: EvalSet, first: int, count: int) -> None:
        self._evalset, self._first, self._count = evalset, first, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, item: int) -> str: ...

    @overload
    def __getitem__(self, item: slice) -> Sequence[str]: ...

    def __getitem__(self, item: int | slice) -> str | Sequence[str]:
        if isinstance(item, slice):
            return [self[each] for each in range(*item.indices(self._count))]
        place = item if item >= 0 else self._count + item
        if not 0 <= place < self._count:
            raise IndexError(item)
        return self._evalset.text(self._first + int(place))
