"""Out of distribution: the eight sets of Kantamneni et al. (2025, arXiv 2502.16681), as published.

Of each task, split train is a balanced 1024 of the first 1500 rows (`balanced_draw`), in the order
of the draw, whose last 100 are there to choose C with; split ood is its out-of-distribution set.
What is left of the first 1500 rows is split test, without texts that are among the training texts:
the published protocol has no test inside the distribution, and the texts of sae-probes repeat.

Where a set spells its classes otherwise than the training rows do, they are matched in sorted
order, as the label encoder of sae-probes does.
"""

import numpy as np
from numpy.typing import NDArray

from ...storage.evalset import OOD, TEST, TRAIN, Task
from .base import Draft, Labelled, Making, add_texts, check_classes
from .published import DATA, balanced_draw, chosen_tasks, encoded
from .wheel import Rows, Tables, open_tables

FIRST_ROWS = 1500
TRAIN_ROWS = 1024
_NOTES = {
    "90_glue_qnli": (
        "malformed out of distribution: none of the 300 texts has the separator ' | ' between "
        "question and sentence that all training texts have, and the questions are missing; 167 of "
        "them are different; report means with and without it"
    )
}
_SEEN = "test text that is among the training texts"


def draft(making: Making) -> Draft:
    """One task for each set."""
    made = Draft(suite="ood", pooling=making.config.pooling, data=DATA)
    with open_tables() as tables:
        for name in chosen_tasks(making, tables.ood_tasks()):
            _add_task(made, making, tables, name)
    return made


def _add_task(made: Draft, making: Making, tables: Tables, name: str) -> None:
    rows = tables.read(name)[:FIRST_ROWS]
    ood_rows = tables.read_ood(name)
    classes, label_R = encoded(rows, name)
    ood_classes, ood_label_R = encoded(ood_rows, name)
    note = _NOTES.get(name, "")
    if ood_classes != classes:
        spelt = ", ".join(f"{a} as {b}" for a, b in zip(classes, ood_classes, strict=True))
        note = "; ".join(filter(None, [note, f"classes are spelt otherwise in it: {spelt}"]))
    made.tasks.append(Task(name, classes, None, note))

    fewest = 2 * int(np.bincount(label_R, minlength=2).min())
    n_train = min(making.config.limit or TRAIN_ROWS, fewest)
    train, _ = balanced_draw(label_R, n_train, 0, making.seed)
    add_texts(made, making, _texts(rows, label_R, train, TRAIN))
    rest = np.setdiff1d(np.arange(len(rows)), train)
    seen = {rows[i]["prompt"] for i in train}
    is_new = np.array([rows[i]["prompt"] not in seen for i in rest], np.bool_)
    if not is_new.all():
        made.dropped[f"{name}: {_SEEN}"] += int((~is_new).sum())
    add_texts(made, making, _texts(rows, label_R, rest[is_new], TEST))
    add_texts(made, making, _texts(ood_rows, ood_label_R, np.arange(len(ood_rows)), OOD))
    check_classes(made, (TRAIN, TEST, OOD))


def _texts(
    rows: Rows, label_R: NDArray[np.int64], chosen: NDArray[np.int64], split: int
) -> list[Labelled]:
    return [Labelled(rows[i]["prompt"], int(label_R[i]), split) for i in chosen]
