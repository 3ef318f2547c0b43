"""What the two suites made of sae-probes' texts have in common: classes, and the published draw."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ...storage.errors import InputError
from ..progress import progress
from .base import Making
from .wheel import PACKAGE, VERSION, WHEEL_SHA256, Rows

# The name of what the texts are from, for the recipe.
DATA = {"package": PACKAGE, "version": VERSION, "wheel_sha256": WHEEL_SHA256}


def chosen_tasks(making: Making, known: Sequence[str]) -> Iterator[str]:
    """The tasks asked for by --task, or all, with a bar; InputError for one that there is not."""
    asked = making.config.tasks
    for name in asked:
        if name not in known:
            raise InputError(
                f"Suite {making.config.suite} has no task {name!r}. Pass --task with one of "
                f"{', '.join(known)}."
            )
    chosen = [name for name in known if not asked or name in asked]
    with progress(len(chosen), "tokenise", "tasks", show=making.show_progress) as bar:
        for name in chosen:
            yield name
            bar.update()


def encoded(rows: Rows, task: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the two classes in sorted order, and the class of each row, int64."""
    classes = sorted({row["target"] for row in rows})
    if len(classes) != 2:
        raise InputError(
            f"Task {task} of {PACKAGE} has {len(classes)} classes and not two. "
            "Fetch the wheel again."
        )
    return classes, np.array([classes.index(row["target"]) for row in rows])


def balanced_draw(
    label_R: NDArray[np.int64], n_train: int, n_test: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows for training and for the test, each half of one class and half of the other, shuffled.

    The draw of sae-probes 0.4.2 (`get_train_test_indices`), number by number, so that the training
    rows of the same seed are the published ones: NumPy's legacy RandomState, whose stream is fixed
    for good; class 1 before class 0, then the test of what is left, then both shuffled. An odd
    number gives class 1 the row more.
    """
    rng = np.random.RandomState(seed)
    of_class = [np.flatnonzero(label_R == label) for label in (0, 1)]
    parts: list[NDArray[np.int64]] = []
    for n in (n_train, n_test):
        sizes = {1: -(-n // 2), 0: n // 2}
        drawn = {
            label: rng.choice(of_class[label], sizes[label], replace=False) for label in (1, 0)
        }
        for label in (0, 1):
            of_class[label] = np.setdiff1d(of_class[label], drawn[label])
        parts.append(np.concatenate([drawn[1], drawn[0]]))
    train, test = (rng.permutation(part) for part in parts)
    return train, test
