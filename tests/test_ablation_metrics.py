"""TPP and SCR: ablation from one encode against ablation token by token; planted concepts."""

# I items, P tokens, D d_in, S d_sae, C concepts, N sizes

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sae_pipe.stages.evaluation.ablation import SIZES, effects, largest, removed
from sae_pipe.stages.evaluation.concepts import ground_truth
from sae_pipe.stages.evaluation.results import as_json
from sae_pipe.stages.evaluation.spurious import spurious_probes
from sae_pipe.stages.metrics.base import MetricResult, TaskData
from sae_pipe.stages.metrics.scr import Scr
from sae_pipe.stages.metrics.tpp import Tpp
from sae_pipe.stages.selftest.planted import ByHand, orthonormal, task_of


def judge(
    metric: Any, W_dec_SD: NDArray[Any], *tasks: tuple[TaskData, NDArray[Any]]
) -> MetricResult:
    judged = ByHand(W_dec_SD)
    for task, latents_IS in tasks:
        metric.observe(task, judged, csr_array(latents_IS, dtype=np.float32))
    result: MetricResult = metric.result(seed=0)
    assert json.dumps(as_json(result.details))
    return result


# --- from one encode ---


def test_one_encode_gives_what_ablating_each_token_gives() -> None:
    """Encode, zero, decode, add the error back, average over real tokens, read the probe."""
    rng = np.random.default_rng(0)
    n_items, n_tokens, d_in, d_sae = 7, 9, 12, 600
    is_pad_IP = np.arange(n_tokens) >= rng.integers(3, n_tokens + 1, n_items)[:, None]
    x_IPD = rng.normal(size=(n_items, n_tokens, d_in)) + 2
    d_SD, b_D = rng.normal(size=(d_sae, d_in)), rng.normal(size=d_in)
    f_IPS = np.maximum(rng.normal(size=(n_items, n_tokens, d_sae)), 0)
    w_D, w_bias = rng.normal(size=d_in), 0.3
    orders = [rng.permutation(d_sae)[:500], rng.permutation(d_sae)[:7]]

    def mean_over_real(values_IPX: NDArray[Any]) -> NDArray[np.float64]:
        return np.stack(
            [
                values[~is_pad].mean(axis=0)
                for values, is_pad in zip(values_IPX, is_pad_IP, strict=True)
            ]
        )

    gone_ICN = removed(csr_array(mean_over_real(f_IPS)), d_SD @ w_D, orders)
    before_I = mean_over_real(x_IPD) @ w_D + w_bias
    for place, order in enumerate(orders):
        for size, n in enumerate(SIZES):
            kept_IPS = f_IPS.copy()
            kept_IPS[..., order[:n]] = 0
            error_IPD = x_IPD - (f_IPS @ d_SD + b_D)
            ablated_ID = mean_over_real(kept_IPS @ d_SD + b_D + error_IPD)
            np.testing.assert_allclose(
                before_I - gone_ICN[:, place, size], ablated_ID @ w_D + w_bias, atol=1e-9
            )


def test_effects_follow_their_definition_and_only_positive_ones_count() -> None:
    rng = np.random.default_rng(1)
    f_IS, along_S = np.maximum(rng.normal(size=(40, 6)), 0) + 1, rng.normal(size=6)
    yes_I = rng.random(40) < 0.4
    expected_S = (f_IS[yes_I].mean(axis=0) - f_IS[~yes_I].mean(axis=0)) * along_S
    effect_S = effects(csr_array(f_IS), yes_I, along_S)
    np.testing.assert_allclose(effect_S, expected_S)
    assert largest(np.array([0.5, -2, 0, 3, 0.5])).tolist() == [3, 0, 4]
    assert len(largest(np.ones(2000))) == 500


# --- TPP ---


def concepts(
    n_classes: int, *, shared: bool = False
) -> tuple[TaskData, NDArray[Any], NDArray[Any]]:
    """Each class has a direction of its own, 4 long, and a latent with that decoder row; or, if
    shared, one latent writes the directions of all classes."""
    rng = np.random.default_rng(n_classes)
    label_I, split_I = np.tile(np.arange(n_classes), 60), np.repeat([0, 1], 30 * n_classes)
    rows_SD = orthonormal(n_classes + 1, 30, rng)
    x_ID = (
        4 * rows_SD[label_I] + 3 * rows_SD[n_classes] + 0.1 * rng.normal(size=(60 * n_classes, 30))
    )
    latents_IS = 4 * np.eye(n_classes)[label_I]
    task = task_of(x_ID, label_I, split_I, classes=[f"class {c}" for c in range(n_classes)])
    if shared:
        return task, latents_IS.sum(axis=1, keepdims=True), rows_SD[:n_classes].sum(axis=0)[None]
    return task, latents_IS, rows_SD[:n_classes]


def test_a_latent_for_each_concept_erases_that_concept_alone() -> None:
    task, latents_IS, rows_SD = concepts(4)
    values = judge(Tpp(), rows_SD, (task, latents_IS)).values
    assert ground_truth(task).f1_C.tolist() == [1, 1, 1, 1]
    # All items of the class lose its direction and are told to be of the rest: half of the
    # balanced accuracy. Its own latent is the only one that counts.
    assert values["intended_2"].value == pytest.approx(0.5)
    assert values["unintended_2"].value == pytest.approx(0, abs=0.01)
    assert values["tpp_500"].value == values["tpp_2"].value
    assert (values["intended_2"].low, values["intended_2"].high) == (0.5, 0.5)


def test_tpp_is_the_drop_of_a_concept_less_that_of_the_others() -> None:
    """Written out with loops, on latents that overlap."""
    rng = np.random.default_rng(3)
    n_classes, d_sae = 3, 40
    label_I, split_I = np.tile(np.arange(n_classes), 50), np.repeat([0, 1], [90, 60])
    rows_SD = rng.normal(size=(d_sae, 16))
    f_IS = np.maximum(rng.normal(size=(150, d_sae)), 0) * (rng.random((150, d_sae)) < 0.5)
    f_IS[np.arange(150), label_I * 3] += 1.5
    x_ID = (f_IS @ rows_SD + rng.normal(size=(150, 16)) + 2).astype(np.float32)
    task = task_of(x_ID, label_I, split_I, classes=["a", "b", "c"])
    result = judge(Tpp(), rows_SD, (task, f_IS))
    truth, train_I, test_I = ground_truth(task), split_I == 0, split_I == 1
    rows_SD = rows_SD.astype(np.float32)
    f_IS = f_IS.astype(np.float32)

    def accuracy(concept: int, x_ID: NDArray[Any]) -> float:
        answer_I = x_ID @ truth.weight_CD[concept] + truth.bias_C[concept] > 0
        yes_I = label_I[test_I] == concept
        return float((answer_I[yes_I].mean() + (~answer_I[~yes_I]).mean()) / 2)

    for n in SIZES:
        tpp, own, others = [], [], []
        for c in range(n_classes):
            yes_I = label_I[train_I] == c
            difference_S = f_IS[train_I][yes_I].mean(axis=0) - f_IS[train_I][~yes_I].mean(axis=0)
            effect_S = difference_S * (rows_SD @ truth.weight_CD[c])
            top_N = [i for i in np.argsort(-effect_S) if effect_S[i] > 0 and difference_S[i] > 0][
                :n
            ]
            left_ID = x_ID[test_I] - f_IS[test_I][:, top_N] @ rows_SD[top_N]
            drop_C = [accuracy(k, x_ID[test_I]) - accuracy(k, left_ID) for k in range(n_classes)]
            own.append(drop_C[c])
            others.append(np.mean([drop_C[k] for k in range(n_classes) if k != c]))
            tpp.append(own[-1] - others[-1])
        assert result.values[f"tpp_{n}"].value == pytest.approx(np.mean(tpp))
        assert result.values[f"intended_{n}"].value == pytest.approx(np.mean(own))
        assert result.values[f"unintended_{n}"].value == pytest.approx(np.mean(others))
        low, high = result.values[f"tpp_{n}"].low, result.values[f"tpp_{n}"].high
        assert low is not None
        assert high is not None
        assert low <= np.mean(tpp) <= high
    assert result.sample == {"concepts": 3, "items": 60, "refused": 0}


def test_one_latent_for_all_concepts_is_no_use() -> None:
    task, latents_IS, rows_SD = concepts(4, shared=True)
    values = judge(Tpp(), rows_SD, (task, latents_IS)).values
    assert values["tpp_10"].value == pytest.approx(0, abs=0.02)


def two_class_tasks(n_tasks: int) -> tuple[list[tuple[TaskData, NDArray[Any]]], NDArray[Any]]:
    """Tasks with a direction and a latent each; the other latents differ in no class mean."""
    rng = np.random.default_rng(7)
    rows_SD = orthonormal(n_tasks, 20, rng)
    tasks = []
    for place in range(n_tasks):
        bit_IS = np.arange(80)[:, None] >> np.arange(n_tasks) & 1
        f_IS = 3.0 * np.roll(bit_IS, place, axis=1)
        x_ID = f_IS @ rows_SD + 1 + 0.1 * rng.normal(size=(80, 20))
        task = task_of(x_ID, np.arange(80) % 2, np.repeat([0, 1], 40), name=f"task {place}")
        tasks.append((task, f_IS))
    return tasks, rows_SD


def test_tasks_of_two_classes_are_concepts_among_one_another() -> None:
    tasks, rows_SD = two_class_tasks(3)
    result = judge(Tpp(), rows_SD, *tasks)
    assert [each["concept"] for each in result.details["concepts"]] == [
        "task 0",
        "task 1",
        "task 2",
    ]
    assert result.values["intended_2"].value == pytest.approx(0.5)
    assert result.values["unintended_2"].value == 0
    assert result.values["tpp_500"].value == pytest.approx(0.5)
    assert result.sample == {"concepts": 3, "items": 120, "refused": 0}


def test_one_concept_alone_has_no_tpp() -> None:
    tasks, rows_SD = two_class_tasks(1)
    result = judge(Tpp(), rows_SD, *tasks)
    assert result.values["tpp_2"].value is None
    assert result.details["refused_concepts"] == {
        "task 0": "there is no other concept to compare with"
    }
    assert result.details["refused"] == "There are no two concepts with items enough for a probe."


# --- SCR ---


def confounded(
    *, class_length: float = 1.0, group_length: float = 2.0, noise: float = 0.2
) -> tuple[TaskData, NDArray[Any], NDArray[Any]]:
    """Class and group each move x along a direction of their own, one way or the other, and have a
    latent for either way; where both agree, a probe reads the longer one. 40 training and 20 test
    items of each of the four pairs."""
    rng = np.random.default_rng(11)
    class_I, group_I = np.tile([0, 0, 1, 1], 60), np.tile([0, 1], 120)
    split_I = np.repeat([0, 1], [160, 80])
    class_D, group_D, mean_D = orthonormal(3, 20, rng)
    rows_SD = np.stack([class_D, -class_D, group_D, -group_D])
    f_IS = np.stack([class_I, 1 - class_I, group_I, 1 - group_I], axis=1)
    f_IS = f_IS * np.array([class_length, class_length, group_length, group_length])
    x_ID = f_IS @ rows_SD + 5 * mean_D + noise * rng.normal(size=(240, 20))
    return task_of(x_ID, class_I, split_I, group_I=group_I), f_IS, rows_SD


def test_ablating_the_spurious_latents_cures_the_probe() -> None:
    task, f_IS, rows_SD = confounded()
    result = judge(Scr(), rows_SD, (task, f_IS))
    (details,) = result.details["tasks"]
    assert details["direction"] == "class"
    assert not details["tie"]
    # The latents of the class do not differ between groups: there are no others to ablate.
    assert details["class"]["latents"] == [2, 3]
    assert details["class"]["acc_0"] == pytest.approx(0.5, abs=0.05)
    assert details["class"]["acc_clean"] == 1
    assert details["group"]["acc_0"] == 1
    assert result.values["scr_2"].value == pytest.approx(1, abs=0.1)
    assert result.values["scr_500"] == result.values["scr_2"]
    assert result.sample == {
        "tasks": 1, "items": 80, "ties": 0, "empty_denominators": 0, "refused": 0,
    }  # fmt: skip


def test_scr_is_the_share_of_the_lacking_accuracy() -> None:
    """Accuracies by hand: the biased probe's, before and after x loses f d of the top latents."""
    task, f_IS, rows_SD = confounded(noise=1.0)
    result = judge(Scr(), rows_SD, (task, f_IS))
    probes, test_I = spurious_probes(task), task.split_I == 1
    quadrant_I = (2 * task.label_I + task.group_I)[test_I]

    def accuracy(probe: Any, x_ID: NDArray[Any]) -> float:
        right_I = (x_ID @ probe.weight_D + probe.bias > 0) == (task.label_I[test_I] == 1)
        return float(np.mean([right_I[quadrant_I == q].mean() for q in range(4)]))

    x_ID = task.x_ID[test_I].astype(np.float64)
    acc_0, acc_clean = accuracy(probes.biased, x_ID), accuracy(probes.of_class, x_ID)
    assert 0.5 < acc_0 < acc_clean < 1
    left_ID = x_ID - f_IS[test_I][:, 2:] @ rows_SD[2:]
    scr = (accuracy(probes.biased, left_ID) - acc_0) / (acc_clean - acc_0)
    value = result.values["scr_2"]
    assert value.value == pytest.approx(scr)
    assert value.low is not None
    assert value.high is not None
    assert value.low < scr < value.high


def test_equal_directions_are_a_tie_that_is_told() -> None:
    """The biased probe is right on three of four pairs, of class as of group."""
    task, f_IS, rows_SD = confounded(class_length=2, group_length=2, noise=0.05)
    task.x_ID += 0.5 * (rows_SD[0] + rows_SD[2]) * (task.split_I == 1)[:, None]
    result = judge(Scr(), rows_SD, (task, f_IS))
    (details,) = result.details["tasks"]
    assert details["tie"]
    assert details["direction"] == "class"
    assert details["class"]["acc_0"] == details["group"]["acc_0"] == 0.75
    assert result.sample["ties"] == 1
    assert result.values["scr_2"].value is not None


def test_an_empty_denominator_is_counted_and_has_no_score() -> None:
    """Test items are all the same: every probe is right on half of the pairs."""
    task, f_IS, rows_SD = confounded()
    task.x_ID[task.split_I == 1] = 0
    result = judge(Scr(), rows_SD, (task, f_IS))
    assert result.sample == {
        "tasks": 0, "items": 80, "ties": 1, "empty_denominators": 1, "refused": 0,
    }  # fmt: skip
    assert result.details["tasks"][0]["empty_denominator"]
    assert result.values["scr_2"].value is None
    assert "a biased probe that is worse than the clean one" in result.details["refused"]
    beside = judge(Scr(), rows_SD, (task, f_IS), confounded()[:2])
    assert beside.sample["empty_denominators"] == 1
    assert beside.sample["tasks"] == 1


def test_tasks_without_a_second_label_are_refused_by_name() -> None:
    tasks, rows_SD = two_class_tasks(1)
    result = judge(Scr(), rows_SD, *tasks)
    assert result.details["refused_tasks"] == {
        "task 0": "it has 2 classes and 0 groups, and 2 of both are needed"
    }
    task, f_IS, rows_SD = confounded()
    task.group_I[task.split_I == 1] = task.label_I[task.split_I == 1]
    few = judge(Scr(), rows_SD, (task, f_IS))
    assert few.details["refused_tasks"] == {
        "planted": "a pair of class and group has 0 test items, and 2 of each of the four are needed"
    }


@pytest.mark.parametrize("metric", [Tpp, Scr])
def test_latents_that_never_fire_take_nothing_away(metric: Any) -> None:
    task, f_IS, rows_SD = confounded() if metric is Scr else concepts(3)
    result = judge(metric(), rows_SD, (task, np.zeros_like(f_IS)))
    name = "scr_500" if metric is Scr else "tpp_500"
    assert result.values[name].value == 0
