"""The 113 binary tasks of sae-probes (Kantamneni et al. 2025, arXiv 2502.16681), balanced.

Of each task up to 1024 texts are split train and up to 1000 others split test, half of each class,
by the published draw (`balanced_draw`).

The texts of a task repeat, in some more than half of them: with the published draw over rows, the
same text is trained and tested on. Here a text counts once, at its first row, and not at all if it
has both labels; what is left out is counted.
"""

import numpy as np
from numpy.typing import NDArray

from ...storage.evalset import TEST, TRAIN, Task
from .base import Draft, Labelled, Making, add_texts, check_classes
from .published import DATA, balanced_draw, chosen_tasks, encoded
from .wheel import Rows, Tables, open_tables

TRAIN_TEXTS, TEST_TEXTS = 1024, 1000
_LEAST_TEST, _LEAST_TRAIN = 100, 20  # as published, 100 are kept for the test
_REPEATED, _CONTRADICTED = "repeated text", "text with both labels"


def draft(making: Making) -> Draft:
    """One task for each table."""
    made = Draft(suite="probes", pooling=making.config.pooling, data=DATA)
    with open_tables() as tables:
        for name in chosen_tasks(making, tables.binary_tasks()):
            _add_task(made, making, tables, name)
    return made


def _add_task(made: Draft, making: Making, tables: Tables, name: str) -> None:
    rows = tables.read(name)
    classes, label_R = encoded(rows, name)
    texts_R = once_each(made, name, rows, label_R)
    label_T = label_R[texts_R]
    most = 2 * int(np.bincount(label_T, minlength=2).min())  # that are balanced
    wanted_train, wanted_test = (
        min(n, making.config.limit or n) for n in (TRAIN_TEXTS, TEST_TEXTS)
    )
    n_train = min(wanted_train, most - min(_LEAST_TEST, wanted_test)) // 2 * 2
    n_test = min(wanted_test, most - n_train) // 2 * 2
    if n_train < min(_LEAST_TRAIN, wanted_train):
        made.dropped[f"{name}: task with fewer texts than a probe needs"] += len(rows)
        return
    made.tasks.append(Task(name, classes, None, ""))
    train, test = balanced_draw(label_T, n_train, n_test, making.seed)
    for chosen, split in ((train, TRAIN), (test, TEST)):
        labelled = [Labelled(rows[i]["prompt"], int(label_R[i]), split) for i in texts_R[chosen]]
        add_texts(made, making, labelled)
    check_classes(made, (TRAIN, TEST))


def once_each(made: Draft, name: str, rows: Rows, label_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows with the first of each different text that has one label, ascending; counts the others."""
    labels: dict[str, set[int]] = {}
    first: dict[str, int] = {}
    for row, (entry, label) in enumerate(zip(rows, label_R.tolist(), strict=True)):
        labels.setdefault(entry["prompt"], set()).add(label)
        first.setdefault(entry["prompt"], row)
    kept = [row for text, row in first.items() if len(labels[text]) == 1]
    contradicted = sum(len(labels[row["prompt"]]) > 1 for row in rows)
    if contradicted:
        made.dropped[f"{name}: {_CONTRADICTED}"] += contradicted
    if len(rows) - contradicted > len(kept):
        made.dropped[f"{name}: {_REPEATED}"] += len(rows) - contradicted - len(kept)
    return np.array(kept, np.int64)
