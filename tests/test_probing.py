"""Probes, their scores and intervals against plain definitions; probing metrics on planted data."""

# I items, D d_in, S d_sae, R replicates

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from sae_pipe.stages.evaluation import item_bootstrap, probes
from sae_pipe.stages.evaluation.item_bootstrap import draw_items, over_tasks
from sae_pipe.stages.evaluation.results import as_json
from sae_pipe.stages.metrics import METRICS, get_metric, names_of
from sae_pipe.stages.metrics.base import MetricResult, TaskData
from sae_pipe.stages.metrics.ood_probing import OodProbing
from sae_pipe.stages.metrics.shortcut_control import ShortcutControl
from sae_pipe.stages.metrics.sparse_probing import SparseProbing
from sae_pipe.stages.selftest.planted import ByHand, task_of

N_TRAIN, N_TEST, N_OOD = 200, 80, 60
SPLITS = np.repeat([0, 1, 2], [N_TRAIN, N_TEST, N_OOD])


def judge(metric: Any, *tasks: tuple[TaskData, NDArray[Any]]) -> MetricResult:
    for task, latents_IS in tasks:
        judged = ByHand(np.eye(latents_IS.shape[1], task.x_ID.shape[1]))
        metric.observe(task, judged, csr_array(latents_IS, dtype=np.float32))
    result: MetricResult = metric.result(seed=0)
    assert json.dumps(as_json(result.details))
    return result


def drawn(seed: int, **kwargs: Any) -> tuple[TaskData, NDArray[Any]]:
    """A task whose label is in dimension 0 of x and in latent 4, both with noise; mean not 0."""
    rng = np.random.default_rng(seed)
    n_items = len(SPLITS)
    label_I = rng.permutation(n_items) % 2
    x_ID = rng.normal(size=(n_items, 12)) + 4
    x_ID[:, 0] += 1.5 * label_I
    latents_IS = np.maximum(rng.normal(size=(n_items, 40)) - 1, 0)
    latents_IS[:, 4] = np.maximum(x_ID[:, 0] - 4, 0)
    texts = ["word " * int(n) for n in rng.integers(1, 30, n_items)]
    kwargs = {"name": f"task {seed}", "suite": "ood", "texts": texts} | kwargs
    return task_of(x_ID, label_I, SPLITS, **kwargs), latents_IS


# --- scores ---


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_the_right_order(items: list[tuple[bool, int]]) -> None:
    yes_I = np.array([yes for yes, _ in items])
    score_I = np.array([float(score) for _, score in items])
    pairs = [
        1.0 if above > below else 0.5 if above == below else 0.0
        for above in score_I[yes_I]
        for below in score_I[~yes_I]
    ]
    found = probes.auc(yes_I, score_I)
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_f1_and_balanced_accuracy_follow_their_definitions(items: list[tuple[bool, bool]]) -> None:
    yes_I, answer_I = (np.array(each) for each in zip(*items, strict=True))
    hits = int((yes_I & answer_I).sum())
    precision = hits / answer_I.sum() if answer_I.any() else 0.0
    recall = hits / yes_I.sum() if yes_I.any() else 0.0
    harmonic = 2 * precision * recall / (precision + recall) if hits else 0.0
    assert probes.f1(yes_I, answer_I) == pytest.approx(harmonic)
    balanced = probes.balanced_accuracy(yes_I, answer_I)
    if yes_I.any() and not yes_I.all():
        correct_no = (~yes_I & ~answer_I).sum() / (~yes_I).sum()
        assert balanced == pytest.approx((recall + correct_no) / 2)
    else:
        assert np.isnan(balanced)


# --- fits ---


def test_the_l2_probe_is_at_the_minimum_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    x_ID = rng.normal(size=(80, 5)) + 3
    yes_I = x_ID[:, 1] + rng.normal(size=80) > 3.5
    weight_I, sign_I = probes.balanced(yes_I), np.where(yes_I, 1.0, -1.0)

    def loss(w: NDArray[np.float64]) -> float:
        margins_I = sign_I * (x_ID @ w[:5] + w[5])
        return float(w[:5] @ w[:5] / 2 + 0.7 * (weight_I * np.logaddexp(0, -margins_I)).sum())

    least = minimize(loss, np.zeros(6), tol=1e-12)
    found = probes.fit_l2(x_ID, yes_I, c=0.7, weight_I=weight_I)
    np.testing.assert_allclose([*found.weight_K, found.bias], least.x, atol=1e-4)
    assert found.converged
    assert found.steps > 0


def test_probes_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(1)
    x_ID = rng.normal(size=(400, 300))
    yes_I = x_ID[:, 0] > 0
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(probes.fit_l2(x_ID, yes_I, c=1.0).weight_K)
    np.testing.assert_array_equal(found[0], found[1])


def test_a_probe_that_sees_nothing_answers_by_the_classes() -> None:
    yes_I = np.array([True, False, False, False])
    for probe in (
        probes.fit_l2(np.zeros((4, 0)), yes_I, c=1.0),
        probes.fit_l1(csr_array((4, 3)), yes_I, c=1.0, seed=0),
    ):
        assert probe.bias == pytest.approx(np.log(1 / 3))
    assert probes.fit_l2(np.zeros((4, 0)), yes_I, c=1.0, weight_I=probes.balanced(yes_I)).bias == 0


def test_the_latents_that_differ_most_are_those_of_the_class_means() -> None:
    rng = np.random.default_rng(2)
    latents_IS = np.maximum(rng.normal(size=(60, 9)), 0)
    latents_IS[:, 5] = 0  # does not differ: never chosen
    yes_I = rng.random(60) < 0.3
    difference_S = np.abs(latents_IS[yes_I].mean(axis=0) - latents_IS[~yes_I].mean(axis=0))
    chosen_K = probes.most_different(csr_array(latents_IS), yes_I, 9)
    assert chosen_K.tolist() == np.argsort(-difference_S)[:8].tolist()


def test_c_is_chosen_on_the_last_items() -> None:
    """Against scikit-learn written out: 250 items, of which the last 50 are held back."""
    rng = np.random.default_rng(3)
    x_ID = rng.normal(size=(250, 30))
    yes_I = x_ID[:, 0] + 2 * rng.normal(size=250) > 0

    def fit(x_ID: NDArray[Any], yes_I: NDArray[np.bool_], c: float) -> probes.Probe:
        return probes.fit_l2(x_ID, yes_I, c=c)

    aucs = []
    for c in np.logspace(5, -5, 10):
        model = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x_ID[:200], yes_I[:200])
        aucs.append(probes.auc(yes_I[200:], model.decision_function(x_ID[200:])))
    c, best = probes.choose_c(fit, x_ID, yes_I)
    assert c == np.logspace(5, -5, 10)[np.argmax(aucs)]
    assert best == pytest.approx(max(aucs))
    one_class = probes.choose_c(fit, x_ID[:60], np.arange(60) < 30)
    assert one_class[0] == 1
    assert np.isnan(one_class[1])


# --- the bootstrap ---


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_bootstrap, "RESAMPLES", 20)


@pytest.mark.usefixtures("few_resamples")
def test_documents_are_drawn_whole_and_inside_their_stratum() -> None:
    document_I = np.array([7, 7, 3, 4, 9, 9, 9, 5])
    stratum_I = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    counts_RI = draw_items(document_I, stratum_I, seed=0, purpose="here")
    assert counts_RI.shape == (20, 8)
    np.testing.assert_array_equal(counts_RI[:, 0], counts_RI[:, 1])
    np.testing.assert_array_equal(counts_RI[:, 4], counts_RI[:, 6])
    assert (counts_RI[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert (counts_RI[:, [4, 7]].sum(axis=1) == 2).all()
    assert len(np.unique(counts_RI, axis=0)) > 5
    again = draw_items(document_I, stratum_I, seed=0, purpose="here")
    np.testing.assert_array_equal(counts_RI, again)
    assert (draw_items(document_I, stratum_I, seed=1, purpose="here") != counts_RI).any()
    assert (draw_items(document_I, stratum_I, seed=0, purpose="there") != counts_RI).any()


@pytest.mark.usefixtures("few_resamples")
@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_weighted_scores_are_those_of_the_drawn_items(seed: int) -> None:
    rng = np.random.default_rng(seed)
    yes_I = np.arange(14) % 3 == 0
    score_I, answer_I = rng.integers(0, 5, 14).astype(float), rng.random(14) < 0.5
    counts_RI = draw_items(np.arange(14), yes_I, seed=seed, purpose="")
    aucs = item_bootstrap.weighted_auc(yes_I, score_I, counts_RI)
    right_IE = (answer_I == yes_I)[:, None]
    accuracies = item_bootstrap.weighted_accuracy(yes_I, right_IE, counts_RI)[:, 0]
    means = item_bootstrap.weighted_mean(score_I, counts_RI)
    for replicate, counts_I in enumerate(counts_RI):
        drawn_I = np.repeat(np.arange(14), counts_I.astype(int))
        assert aucs[replicate] == pytest.approx(probes.auc(yes_I[drawn_I], score_I[drawn_I]))
        assert accuracies[replicate] == pytest.approx(
            probes.balanced_accuracy(yes_I[drawn_I], answer_I[drawn_I])
        )
        assert means[replicate] == pytest.approx(score_I[drawn_I].mean())


@pytest.mark.usefixtures("few_resamples")
def test_tasks_are_drawn_too_and_undefined_replicates_are_left_out() -> None:
    values_TR = np.arange(60.0).reshape(3, 20)
    values_TR[0, 0] = np.nan
    found = over_tasks(values_TR, seed=0)
    assert found.shape == (20,)
    assert np.isfinite(found[1:]).all()
    assert len({round(value % 1, 6) for value in (found - np.arange(20)) / 20}) > 1
    np.testing.assert_array_equal(over_tasks(values_TR[:1], seed=0), values_TR[0])


# --- metrics ---


def test_item_metrics_are_in_the_registry() -> None:
    assert {"absorption", "ood_probing", "scr", "shortcut_control", "sparse_probing", "tpp"} <= set(
        names_of("items")
    )
    for name in names_of("items"):
        metric = get_metric(name)
        assert METRICS[name].where.partition(":")[0] == name
        assert metric.direction in ("up", "down", "none")
        assert metric.version >= 1
        assert metric.definition
        assert metric.suites


def test_sparse_probing_is_what_scikit_learn_scores_on_the_chosen_latents() -> None:
    task, latents_IS = drawn(0)
    result = judge(SparseProbing(), (task, latents_IS))
    train_I, test_I = SPLITS == 0, SPLITS == 1
    yes_I = task.label_I == 1
    x_ID = task.x_ID.astype(np.float64)
    scale = np.sqrt(x_ID[train_I].var(axis=0).mean())
    order_S = np.argsort(
        -np.abs(
            latents_IS[train_I & yes_I].mean(axis=0) - latents_IS[train_I & ~yes_I].mean(axis=0)
        )
    )
    for k in (1, 2, 5):
        x_IK = latents_IS[:, order_S[:k]] / scale
        model = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=1000)
        model.fit(x_IK[train_I], yes_I[train_I])
        right_I = model.predict(x_IK[test_I]) == yes_I[test_I]
        accuracy = np.mean([right_I[yes_I[test_I] == which].mean() for which in (True, False)])
        assert result.values[f"accuracy_k{k}"].value == pytest.approx(accuracy)
    details = result.details["tasks"][0]
    assert details["latents"] == order_S[:5].tolist()
    assert details["latents"][0] == 4
    assert result.sample == {"tasks": 1, "items": N_TEST, "refused": 0}
    assert result.interval == "95 %, bootstrap over items, inside each class, 1000 resamples"


def test_a_latent_that_is_the_label_is_found_by_one_latent() -> None:
    task, latents_IS = drawn(1)
    latents_IS[:, 30] = 3 * task.label_I
    values = judge(SparseProbing(), (task, latents_IS)).values
    assert values["accuracy_k1"].value == 1
    assert (values["accuracy_k1"].low, values["accuracy_k1"].high) == (1, 1)
    oracle, best, gap = (
        values[name].value for name in ("oracle_accuracy", "accuracy_k5", "gap_to_oracle")
    )
    assert oracle is not None
    assert best is not None
    assert gap == pytest.approx(oracle - best)


def test_classes_of_one_task_are_told_from_the_rest() -> None:
    rng = np.random.default_rng(5)
    label_I = rng.permutation(len(SPLITS)) % 3
    latents_IS = np.eye(3)[label_I]
    task = task_of(latents_IS + 1, label_I, SPLITS, classes=["red", "green", "blue"])
    result = judge(SparseProbing(), (task, latents_IS))
    assert [each["concept"] for each in result.details["tasks"]] == ["red", "green", "blue"]
    assert result.values["accuracy_k1"].value == 1
    assert result.sample["tasks"] == 1


def test_concepts_without_items_are_named_and_not_dropped() -> None:
    task, latents_IS = drawn(2)
    task.label_I[SPLITS == 0] = 0
    result = judge(SparseProbing(), (task, latents_IS))
    assert result.details["refused_concepts"] == {
        "task 2": "0 training items with it, and 2 are needed"
    }
    assert result.values["accuracy_k1"].value is None
    assert re.match("No task has items enough", result.details["refused"])
    both = judge(SparseProbing(), (task, latents_IS), drawn(3))
    assert both.sample == {"tasks": 1, "items": N_TEST, "refused": 1}


def test_a_probe_is_judged_where_the_data_has_shifted() -> None:
    """Latent 7 is the label in distribution and its opposite out of it; text length is both."""
    task, latents_IS = drawn(4)
    outside_I = SPLITS == 2
    latents_IS[:, 7] = 5 * np.where(outside_I, 1 - task.label_I, task.label_I)
    task.texts = ["word " * (1 + int(label)) for label in task.label_I]
    result = judge(OodProbing(), (task, latents_IS))
    values = {name: value.value for name, value in result.values.items()}
    assert values["id_auc"] == pytest.approx(1, abs=0.02)
    assert values["ood_auc_k16"] == pytest.approx(0, abs=0.02)
    assert values["ood_auc"] is not None
    assert values["ood_auc"] < 0.1
    assert values["length_ood_auc"] == 1
    assert values["drop"] == pytest.approx(1, abs=0.1)
    oracle = values["oracle_ood_auc"]
    assert oracle is not None
    assert oracle > 0.7
    assert values["gap_to_oracle"] == pytest.approx(oracle - values["ood_auc"])


def test_the_malformed_set_is_left_out_of_a_second_mean() -> None:
    tasks = [drawn(5), drawn(6), drawn(7, name="90_glue_qnli")]
    result = judge(OodProbing(), *tasks)
    each = {found["task"]: found["ood_auc"] for found in result.details["tasks"]}
    assert result.details["malformed"] == ["90_glue_qnli"]
    assert result.values["ood_auc"].value == pytest.approx(np.mean(list(each.values())))
    assert result.values["ood_auc_without_malformed"].value == pytest.approx(
        (each["task 5"] + each["task 6"]) / 2
    )
    assert result.sample["sets"] == 3
    assert "over sets" in result.interval


def test_the_oracle_is_fitted_once_for_all_saes(monkeypatch: pytest.MonkeyPatch) -> None:
    task, latents_IS = drawn(8)
    first = [judge(metric(), (task, latents_IS)) for metric in (OodProbing, SparseProbing)]
    monkeypatch.setattr("sae_pipe.stages.metrics.ood_probing.fit_l2", None)
    second = judge(OodProbing(), (task, latents_IS * 2))
    for name in ("oracle_ood_auc", "oracle_id_auc", "oracle_drop"):
        assert second.values[name] == first[0].values[name]


def test_a_latent_is_credited_only_above_a_shortcut() -> None:
    """The latent is the length of the text, and so is the label."""
    task, latents_IS = drawn(9)
    n_words_I = 10 + 10 * task.label_I + np.random.default_rng(0).integers(0, 8, len(SPLITS))
    task.texts = ["word " * int(n) for n in n_words_I]
    latents_IS[:, 20] = n_words_I
    values = judge(ShortcutControl(), (task, latents_IS)).values
    assert values["latent_auc"].value == pytest.approx(1)
    assert values["length_auc"].value == 1
    assert values["credited_auc"].value == pytest.approx(0, abs=1e-9)
    assert values["ood_length_auc"].value == 1
    assert "group_auc" not in values


def test_a_planted_second_label_is_a_shortcut_and_gone_inside_its_groups() -> None:
    rng = np.random.default_rng(10)
    task, latents_IS = drawn(10)
    group_I = np.where(rng.random(len(SPLITS)) < 0.9, task.label_I, 1 - task.label_I)
    task.group_I, task.groups = group_I.astype(np.int32), ["without", "with"]
    latents_IS[:] = 3 * group_I[:, None] * (np.arange(40) == 11)
    values = judge(ShortcutControl(), (task, latents_IS)).values
    group, latent = values["group_auc"].value, values["latent_auc"].value
    assert group is not None
    assert latent is not None
    assert group == pytest.approx(0.9, abs=0.06)
    assert values["credited_auc"].value == pytest.approx(latent - group)
    assert values["within_group_auc"].value == 0.5


def test_shuffled_labels_are_told_no_better_than_by_chance() -> None:
    tasks = [drawn(seed) for seed in range(20, 32)]
    for _, latents_IS in tasks:
        latents_IS[:, 4] = 0
    values = judge(ShortcutControl(), *tasks).values
    assert values["shuffled_auc"].value == pytest.approx(0.5, abs=0.05)
    assert values["latent_auc"].value == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("metric", [SparseProbing, OodProbing, ShortcutControl])
def test_latents_that_never_fire_are_at_chance(metric: Any) -> None:
    task, latents_IS = drawn(11)
    values = judge(metric(), (task, np.zeros_like(latents_IS))).values
    name = {SparseProbing: "auc_k5", OodProbing: "ood_auc", ShortcutControl: "latent_auc"}[metric]
    assert values[name].value == 0.5
    assert values[name].low == values[name].high == 0.5
