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
import torch
from scipy.sparse import csr_array

from ..evaluation.judged import JudgedSae
from ..metrics import get_metric
from .base import Check, checks_of, labelled_task
from .by_hand import relu_sae

LETTERS = [chr(ord("a") + place) for place in range(26)]
N_TRAIN, N_TEST = 20, 10
TRAIN_ABSORBED, HALF_ABSORBED = 4, 2
N_OWN = 100  # own directions, which words of different letters share


def absorption() -> Iterator[Check]:
    """Full absorption is the share of the wholly absorbed; those by half count 1/2 in the fraction."""
    d_in = 1 + len(LETTERS) + N_OWN
    rng = np.random.default_rng(0)
    basis_DD = np.linalg.qr(rng.normal(size=(d_in, d_in)))[0].T
    letter_CD, own_OD = basis_DD[1:27], basis_DD[27:]
    x, label, split, writes, fired = [], [], [], list(letter_CD), []
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
    task = labelled_task(
        np.array(x),
        np.array(label),
        np.array(split),
        name="letter",
        classes=LETTERS,
        suite="letters",
    )
    W_dec_SD = torch.from_numpy(np.array(writes)).float()
    metric = get_metric("absorption")
    metric.observe(task, JudgedSae(relu_sae(W_dec_SD.T, W_dec_SD), {"name": "by hand"}), latents_IS)
    whole = sum(letter % 4 for letter in range(26)) / (26 * N_TEST)
    fraction = whole + HALF_ABSORBED / N_TEST / 2
    found_share = [1 - (letter % 4) / N_TEST for letter in range(26)]
    expected: dict[str, float | None] = {
        "full_absorption": whole,
        "full_absorption_score": 100 * (1 - whole),
        "absorption_fraction": fraction,
        "probe_f1": 1.0,
        "k1_f1": float(np.mean([2 * share / (1 + share) for share in found_share])),
        "main_latents": 1.0,
    }
    found = metric.result(seed=0)
    # The fraction weighs what latents bring against the projection on a fitted probe.
    loose = ("absorption_fraction",)
    exact = {name: value for name, value in expected.items() if name not in loose}
    yield from checks_of("absorption", found, exact)
    yield from checks_of("absorption", found, {name: expected[name] for name in loose}, 0.01)
