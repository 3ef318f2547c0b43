"""Planted case of absorption: words of which is known which are absorbed, and by how much.

# I items, D d_in, S d_sae

26 letters with 20 training and 10 test words each. x = mean + 3 letter + its own direction, all of
them orthogonal. Latent c writes the direction of letter c. Most words of the letter have it at 3.
A wholly absorbed word has a latent of its own at 3 instead, which writes letter + own / 3; a word
absorbed by half has both, each bringing 1.5 of the letter. Wholly absorbed are 4 of the training
words and c mod 4 of the test words of letter c, by half 2 more of the test words.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..metrics import get_metric
from .base import Check, checks_of
from .planted import LETTERS, ByHand, orthonormal, task_of

N_TRAIN, N_TEST = 20, 10
TRAIN_ABSORBED, HALF_ABSORBED = 4, 2
N_OWN = 100  # own directions, which words of different letters share


def absorption() -> Iterator[Check]:
    """Full absorption is the share of the wholly absorbed; those by half count 1/2 in the fraction."""
    d_in = 1 + len(LETTERS) + N_OWN
    basis_DD = orthonormal(d_in, d_in, np.random.default_rng(0))
    letter_CD, own_OD = basis_DD[1:27], basis_DD[27:]
    x: list[NDArray[np.float64]] = []
    label, split, writes = [], [], list(letter_CD)
    fired: list[tuple[int, int, float]] = []
    for letter in range(26):
        for word in range(N_TRAIN + N_TEST):
            place = word - N_TRAIN if word >= N_TRAIN else word
            n_whole = letter % 4 if word >= N_TRAIN else TRAIN_ABSORBED
            is_half = word >= N_TRAIN and n_whole <= place < n_whole + HALF_ABSORBED
            of_letter, of_own = (
                (0.0, 3.0) if place < n_whole else (1.5, 1.5) if is_half else (3.0, 0.0)
            )
            own_D = own_OD[(letter * (N_TRAIN + N_TEST) + word) % N_OWN]
            if of_letter:
                fired.append((len(x), letter, of_letter))
            if of_own:
                writes.append(letter_CD[letter] + own_D / 3)
                fired.append((len(x), len(writes) - 1, of_own))
            x.append(10 * basis_DD[0] + 3 * letter_CD[letter] + own_D)
            label.append(letter)
            split.append(int(word >= N_TRAIN))
    item_N, latent_N, value_N = (np.array(each) for each in zip(*fired, strict=True))
    latents_IS = csr_array(
        (value_N, (item_N, latent_N)), shape=(len(x), len(writes)), dtype=np.float32
    )
    task = task_of(np.array(x), np.array(label), np.array(split), classes=LETTERS)
    metric = get_metric("absorption")
    metric.observe(task, ByHand(np.array(writes)), latents_IS)
    whole = sum(letter % 4 for letter in range(26)) / (26 * N_TEST)
    fraction = whole + HALF_ABSORBED / N_TEST / 2
    found_share = [1 - (letter % 4) / N_TEST for letter in range(26)]
    found = metric.result(seed=0)
    expected = {
        "full_absorption": whole,
        "full_absorption_score": 100 * (1 - whole),
        "probe_f1": 1.0,
        "k1_f1": float(np.mean([2 * share / (1 + share) for share in found_share])),
        "main_latents": 1.0,
    }
    yield from checks_of("absorption", found, expected)
    # It weighs what latents bring against the projection on a fitted probe.
    yield from checks_of("absorption", found, {"absorption_fraction": fraction}, 0.01)
