"""Absorption: words made by hand, of which is known which are absorbed; formulas by definition."""

# W words, I items, D d_in, S d_sae

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sae_pipe.stages.evaluation import probes, splitting
from sae_pipe.stages.evaluation.absorbing import absorbed
from sae_pipe.stages.evaluation.directions import Direction
from sae_pipe.stages.evaluation.results import as_json
from sae_pipe.stages.evaluation.splitting import main_latents
from sae_pipe.stages.metrics.absorption import Absorption, least_concepts
from sae_pipe.stages.metrics.base import MetricResult, TaskData
from sae_pipe.stages.selftest.planted import LETTERS, ByHand, PlantedLetters, orthonormal, task_of

ABSORBED = [letter % 5 for letter in range(26)]  # of 8 test words each


def judge(task: TaskData, judged: ByHand, latents_IS: csr_array) -> MetricResult:
    metric = Absorption()
    metric.observe(task, judged, latents_IS)
    return metric.result(seed=0)


@pytest.fixture(scope="module")
def letters() -> PlantedLetters:
    return PlantedLetters(ABSORBED)


@pytest.fixture(scope="module")
def found(letters: PlantedLetters) -> MetricResult:
    return judge(letters.task(), letters.judged, letters.latents_IS)


# --- planted words ---


def test_the_rate_is_that_of_the_planted_words(found: MetricResult) -> None:
    truth = sum(ABSORBED) / (26 * 8)
    full, fraction = found.values["full_absorption"], found.values["absorption_fraction"]
    assert full.value == pytest.approx(truth, abs=1e-12)
    assert fraction.value == pytest.approx(truth, abs=1e-12)
    assert full.low is not None
    assert full.high is not None
    assert full.low < truth < full.high
    assert found.sample == {"words": 208, "concepts": 26, "concepts_refused": 0}


def test_scores_are_printed_as_papers_do(found: MetricResult) -> None:
    for name in ("full_absorption", "absorption_fraction"):
        raw, score = found.values[name], found.values[f"{name}_score"]
        assert raw.value is not None
        assert raw.high is not None
        assert score.value == pytest.approx(100 * (1 - raw.value))
        assert score.low == pytest.approx(100 * (1 - raw.high))


def test_the_absorbing_latent_of_each_word_is_named(
    found: MetricResult, letters: PlantedLetters
) -> None:
    named = {
        example["word"]: example["latent"]
        for concept in found.details["concepts"]
        for example in concept["absorbed"]
    }
    is_test_I = letters.split_I == 1
    expected = {
        f"word {item}": int(letters.latents_IS[[item]].indices[0])
        for item in letters.absorbed_items
        if is_test_I[item]
    }
    assert named == expected


def test_each_score_has_its_probes_beside_it(found: MetricResult) -> None:
    for place, concept in enumerate(found.details["concepts"]):
        assert concept["concept"] == LETTERS[place]
        assert concept["main"] == [place]
        assert concept["probe_f1"] == 1
        # One latent finds the words that are not absorbed, and no others.
        recall = 1 - ABSORBED[place] / 8
        assert concept["k1_f1"] == pytest.approx(2 * recall / (1 + recall))
        assert concept["l1_steps"] > 0
        assert concept["l1_converged"]
    assert json.dumps(as_json(found.details))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_units_of_the_activations_do_not_matter(scale: float, found: MetricResult) -> None:
    scaled = PlantedLetters(ABSORBED, scale=scale)
    other = judge(scaled.task(), scaled.judged, scaled.latents_IS)
    assert other.values["full_absorption"] == found.values["full_absorption"]
    assert other.values["k1_f1"] == found.values["k1_f1"]


def test_the_same_words_have_the_same_replicates_whatever_the_sae(
    found: MetricResult, letters: PlantedLetters
) -> None:
    """So that replicates of two SAEs can be subtracted: this one differs, but not in what it is
    judged by."""
    stronger_IS = letters.latents_IS * 1.5
    other = judge(letters.task(), letters.judged, stronger_IS)
    assert other.details != found.details
    assert other.values["full_absorption"] == found.values["full_absorption"]
    replicates = found.values["full_absorption"].replicates
    assert replicates is not None
    assert len(set(replicates)) > 10


def test_an_sae_whose_latents_never_fire_has_no_main_latents(letters: PlantedLetters) -> None:
    silent = csr_array(letters.latents_IS.shape, dtype=np.float32)
    result = judge(letters.task(), letters.judged, silent)
    assert result.values["full_absorption"].value == 0
    assert result.values["k1_f1"].value == 0
    assert result.values["main_latents"].value == 0


def test_any_labelled_concept_can_be_judged() -> None:
    """A task of two classes has one concept, its class 1; here two of its ten test items."""
    rng = np.random.default_rng(1)
    direction_D, own_D = orthonormal(2, 20, rng)
    label_I, split_I = np.tile([0, 1], 30), np.repeat([0, 1], [40, 20])
    x_ID = 5 + 3 * label_I[:, None] * direction_D + 0.01 * rng.normal(size=(60, 20))
    latents_IS = np.zeros((60, 3), dtype=np.float32)
    latents_IS[label_I == 1, 0] = 3
    latents_IS[[41, 43]] = [0, 3, 0]
    judged = ByHand(np.stack([direction_D, direction_D, own_D]))
    task = task_of(x_ID, label_I, split_I, name="is a colour")
    result = judge(task, judged, csr_array(latents_IS))
    assert result.values["full_absorption"].value == pytest.approx(2 / 10)
    assert result.details["concepts"][0]["concept"] == "is a colour"


# --- refusals ---


def test_letters_whose_probe_is_not_good_enough_are_refused(letters: PlantedLetters) -> None:
    """Test words of a are called b, and those of b a: the probes of both find nothing."""
    is_swapped_I = (letters.label_I < 2) & (letters.split_I == 1)
    label_I = np.where(is_swapped_I, 1 - letters.label_I, letters.label_I)
    task = task_of(letters.x_ID, label_I, letters.split_I, classes=LETTERS)
    result = judge(task, letters.judged, letters.latents_IS)
    why = "its ground-truth probe has F1 0.00, and more than 0.6 is needed"
    assert result.details["refused_concepts"] == {"a": why, "b": why}
    assert result.sample == {"words": 24 * 8, "concepts": 24, "concepts_refused": 2}
    assert result.values["full_absorption"].value == pytest.approx(np.mean(ABSORBED[2:]) / 8)


def test_there_is_no_score_of_fewer_than_20_letters(letters: PlantedLetters) -> None:
    """Seven letters have no words: too few for a probe."""
    kept_I = np.flatnonzero(letters.label_I < 19)
    task = task_of(
        letters.x_ID[kept_I], letters.label_I[kept_I], letters.split_I[kept_I], classes=LETTERS
    )
    result = judge(task, letters.judged, letters.latents_IS[kept_I])
    assert result.values["full_absorption_score"].value is None
    assert result.details["refused"] == (
        "19 of 26 concepts can be judged, and 20 are needed: "
        "see refused_concepts for what is wrong with the others."
    )
    assert result.details["refused_concepts"]["z"] == ("0 training items with it, and 2 are needed")


def test_fewer_concepts_need_the_same_share() -> None:
    assert [least_concepts(n) for n in (1, 2, 3, 10, 19, 20, 26, 100)] == [
        1, 2, 3, 8, 15, 20, 20, 20,
    ]  # fmt: skip


# --- formulas against their definition ---


def full_by_definition(
    f_S: NDArray[np.float64], d_SD: NDArray[np.float64], x_D: NDArray[np.float64],
    w_D: NDArray[np.float64], main: list[int],
) -> bool:  # fmt: skip
    p_D = w_D / np.linalg.norm(w_D)
    cosine_S = np.array([d_D @ p_D / np.linalg.norm(d_D) for d_D in d_SD])
    part_S = f_S * np.array([np.linalg.norm(d_D) for d_D in d_SD]) * cosine_S
    top = int(np.argmax(part_S))
    return bool(
        all(f_S[i] < 1e-8 for i in main)
        and cosine_S[top] >= 0.025
        and x_D @ p_D > 0
        and part_S[top] / (x_D @ p_D) >= 0.4
    )


def fraction_by_definition(
    f_S: NDArray[np.float64], d_SD: NDArray[np.float64], x_D: NDArray[np.float64],
    w_D: NDArray[np.float64], main: list[int],
) -> float:  # fmt: skip
    p_D = w_D / np.linalg.norm(w_D)
    whole = float(x_D @ p_D)
    mains = float(sum(f_S[i] * float(d_SD[i] @ p_D) for i in main))
    others = [
        f_S[i] * float(d_SD[i] @ p_D)
        for i in range(len(f_S))
        if i not in main and d_SD[i] @ p_D / np.linalg.norm(d_SD[i]) >= 0.1 and f_S[i] > 0
    ]
    top3 = float(sum(sorted(others, reverse=True)[:3]))
    if mains >= whole or top3 / whole < 0.4:
        return 0.0
    if mains <= 0:
        return 1.0
    a = min(top3, whole - mains)
    return a / (a + mains)


def drawn_words(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Latents of 300 words, decoder rows that are not of length 1, activations, mean not 0."""
    rng = np.random.default_rng(seed)
    d_SD = rng.normal(size=(12, 5)) * rng.uniform(0.3, 3, size=(12, 1))
    f_WS = np.maximum(rng.normal(size=(300, 12)), 0) * (rng.random((300, 12)) < 0.4)
    x_WD = f_WS @ d_SD + rng.normal(size=(300, 5)) * 0.3 + 0.5
    return f_WS, d_SD, x_WD


@pytest.mark.parametrize("main", [[], [3], [0, 7]])
def test_words_are_judged_by_the_definition(main: list[int]) -> None:
    f_WS, d_SD, x_WD = drawn_words(0)
    w_D = d_SD[3] + 0.5 * d_SD[7] + 0.2
    found = absorbed(csr_array(f_WS), x_WD, Direction.of(w_D, d_SD), np.array(main, dtype=np.int64))
    full = [full_by_definition(f_WS[i], d_SD, x_WD[i], w_D, main) for i in range(300)]
    fraction = [fraction_by_definition(f_WS[i], d_SD, x_WD[i], w_D, main) for i in range(300)]
    assert found.full_W.tolist() == full
    np.testing.assert_allclose(found.fraction_W, fraction, atol=1e-12)
    assert 0 < sum(full) < 300
    assert main == [] or any(0 < each < 1 for each in fraction)


def test_rescaling_latents_against_their_decoder_rows_changes_nothing() -> None:
    f_WS, d_SD, x_WD = drawn_words(5)
    w_D, factor_S = np.arange(1.0, 6.0), np.linspace(0.2, 4, 12)
    main = np.array([2])
    one = absorbed(csr_array(f_WS), x_WD, Direction.of(w_D, d_SD), main)
    other = absorbed(
        csr_array(f_WS / factor_S), x_WD, Direction.of(w_D, d_SD * factor_S[:, None]), main
    )
    np.testing.assert_array_equal(one.full_W, other.full_W)
    np.testing.assert_allclose(one.fraction_W, other.fraction_W, atol=1e-12)


# --- main latents ---


def test_a_concept_that_is_split_over_two_latents_has_both_as_main() -> None:
    rng = np.random.default_rng(2)
    yes_I = np.arange(200) % 2 == 0
    latents_IS = np.where(rng.random((200, 30)) < 0.1, 1.0, 0.0)
    latents_IS[:, :3] = 0
    latents_IS[yes_I, np.where(np.arange(0, 200, 2) % 4 == 0, 1, 2)] = 2.0
    found = main_latents(
        csr_array(latents_IS[:120]), yes_I[:120], csr_array(latents_IS[120:]), yes_I[120:], seed=0
    )
    assert sorted(found.latents.tolist()) == [1, 2]
    assert found.f1 == pytest.approx(2 / 3)
    assert found.f1_by_k[:2] == (found.f1, 1.0)


def test_the_l1_probe_is_at_the_minimum_of_its_loss() -> None:
    """Against proximal gradient descent on the definition, intercept free, mean far from 0."""
    rng = np.random.default_rng(4)
    x_IS = np.maximum(rng.normal(size=(150, 8)) + 1.0, 0) * (rng.random((150, 8)) < 0.6)
    yes_I = x_IS[:, 0] + 0.5 * rng.normal(size=150) > 1.4
    weight_I = probes.positives_weighted(yes_I)
    sign_I = np.where(yes_I, 1.0, -1.0)

    def loss(w_S: NDArray[np.float64], b: float) -> float:
        return float(
            np.mean(weight_I * np.logaddexp(0, -sign_I * (x_IS @ w_S + b)))
            + 0.01 * np.abs(w_S).sum()
        )

    w_S, b, step = np.zeros(8), 0.0, 0.15
    for _ in range(20_000):
        pull_I = -sign_I * weight_I / (1 + np.exp(sign_I * (x_IS @ w_S + b))) / 150
        w_S = w_S - step * (x_IS.T @ pull_I)
        w_S = np.sign(w_S) * np.maximum(np.abs(w_S) - step * 0.01, 0)
        b -= step * float(pull_I.sum())
    found = probes.fit_l1(csr_array(x_IS), yes_I, c=1 / (150 * 0.01), weight_I=weight_I, seed=0)
    assert loss(found.weight_K, found.bias) <= loss(w_S, b) + 1e-4
    np.testing.assert_allclose(found.weight_K, w_S, atol=0.02)


def test_a_probe_that_stops_early_says_so_and_does_not_fail(
    letters: PlantedLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "MOST_STEPS", 2)
    result = judge(letters.task(), letters.judged, letters.latents_IS)
    assert result.values["l1_steps"].value == 2
    assert not any(concept["l1_converged"] for concept in result.details["concepts"])
