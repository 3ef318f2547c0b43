"""Labelled items whose activations and latents are made by hand, so that answers are known.

# I items, D d_in, S d_sae
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..evaluation.judged import Judged
from ..metrics.base import TaskData

LETTERS = [chr(ord("a") + place) for place in range(26)]


class ByHand(Judged):
    """A judged dictionary that is only a decoder: its latents are written down beside it."""

    def __init__(self, W_dec_SD: NDArray[np.floating]) -> None:
        W_dec = torch.tensor(W_dec_SD, dtype=torch.float32)
        super().__init__(W_dec=W_dec, b_dec=torch.zeros(W_dec.shape[1]), facts={"name": "by hand"})

    def latents(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD @ self.W_dec.T


def task_of(
    x_ID: NDArray[np.floating],
    label_I: Sequence[int] | NDArray[np.integer],
    split_I: Sequence[int] | NDArray[np.integer],
    *,
    name: str = "planted",
    suite: str = "letters",
    classes: list[str] | None = None,
    group_I: NDArray[np.integer] | None = None,
    texts: Sequence[str] | None = None,
) -> TaskData:
    n_items = len(x_ID)
    return TaskData(
        name=name,
        suite=suite,
        classes=["no", "yes"] if classes is None else classes,
        groups=None if group_I is None else ["without", "with"],
        x_ID=np.asarray(x_ID, dtype=np.float32),
        label_I=np.asarray(label_I, dtype=np.int32),
        group_I=np.full(n_items, -1, np.int32) if group_I is None else group_I.astype(np.int32),
        split_I=np.asarray(split_I, dtype=np.uint8),
        document_I=np.arange(n_items),
        texts=[f"word {item}" for item in range(n_items)] if texts is None else texts,
        seed=0,
    )


def orthonormal(n: int, d_in: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """n directions of length 1, each orthogonal to the others, (n, D)."""
    q_DD, _ = np.linalg.qr(rng.normal(size=(d_in, d_in)))
    return q_DD.T[:n]


class PlantedLetters:
    """26 letters, 20 training and 8 test words each; in some words the letter's latent is silent.

    x = mean + 3 letter + 1 word + noise, where mean, letters and words are orthogonal. Latent c
    (decoder row: the letter) fires with 3 on the words of letter c that are not absorbed. Each
    absorbed word has a latent of its own, whose decoder row is the direction of letter + word / 3.
    """

    def __init__(self, absorbed_test_words: Sequence[int], *, scale: float = 1.0) -> None:
        """absorbed_test_words: how many of each letter's 8 test words are absorbed."""
        rng = np.random.default_rng(3)
        n_train, n_test, d_in = 20, 8, 300
        basis = orthonormal(d_in, d_in, rng)
        letter_CD, mean_D, free = basis[:26], 7 * basis[26], basis[27:]
        x: list[NDArray[np.float64]] = []
        label, split, rows = [], [], list(letter_CD)
        fired: list[tuple[int, int, float]] = []
        self.absorbed_items: list[int] = []
        for letter in range(26):
            for word in range(n_train + n_test):
                is_test = word >= n_train
                count = absorbed_test_words[letter] if is_test else 4
                is_absorbed = (word - n_train if is_test else word) < count
                own_D = free[(letter * 28 + word) % len(free)]
                item = len(x)
                x.append(mean_D + 3 * letter_CD[letter] + own_D + 0.01 * rng.normal(size=d_in))
                label.append(letter)
                split.append(int(is_test))
                if is_absorbed:
                    row_D = letter_CD[letter] + own_D / 3
                    rows.append(row_D / np.linalg.norm(row_D))
                    fired.append((item, len(rows) - 1, 3 * float(np.linalg.norm(row_D))))
                    self.absorbed_items.append(item)
                else:
                    fired.append((item, letter, 3.0))
        item_N, latent_N, value_N = (np.array(each) for each in zip(*fired, strict=True))
        self.latents_IS = csr_array(
            (value_N * scale, (item_N, latent_N)), shape=(len(x), len(rows)), dtype=np.float32
        )
        self.judged = ByHand(np.array(rows))
        self.x_ID = scale * np.array(x)
        self.label_I, self.split_I = np.array(label), np.array(split)

    def task(self) -> TaskData:
        return task_of(self.x_ID, self.label_I, self.split_I, name="first letter", classes=LETTERS)
