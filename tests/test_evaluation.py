"""sae-pipe eval: many SAEs on one reading, results that are kept, what does not fit refused.

# N rows, I items, D d_in, S d_sae
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from torch import Tensor
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.evaluation import passes
from sae_pipe.stages.evaluation.baselines import BASELINES, baselines_of
from sae_pipe.stages.evaluation.engine import EvalConfig, Outcome, evaluate_runs
from sae_pipe.stages.evaluation.items import TaskReader
from sae_pipe.stages.evaluation.judged import JudgedSae, load_judged, read_facts
from sae_pipe.stages.evaluation.results import Result, read_results
from sae_pipe.stages.evaluation.sources import StoreRows, StoreText
from sae_pipe.stages.fit import fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.metrics import METRICS, names_of
from sae_pipe.stages.metrics.base import TaskData, Value
from sae_pipe.stages.metrics.probe_loss import ProbeLoss, fit_probes
from sae_pipe.stages.sae import ARCHITECTURES, get_architecture
from sae_pipe.stages.sae.weights import save_sae
from sae_pipe.storage import InputError, open_store
from sae_pipe.storage.evalset import EvalSet, Task
from sae_pipe.storage.evalset_writer import Contents, Origin, write_evalset

from .harvesting import config_for, quiet

CPU = torch.device("cpu")


def whole(message: str) -> str:
    return f"^{re.escape(message)}$"


def fitted(store: Path, out: Path, **changes: Any) -> Path:
    given: dict[str, Any] = {"arch": "topk", "k": 4, "d_sae": 64, "tokens": 512} | changes
    config = FitConfig(batch_size=128, **given)
    fit(open_store(store), config, out, show_progress=False)
    return out


@pytest.fixture(scope="module")
def masked_store(lm: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same harvest as `store`, at another mask ratio."""
    out = tmp_path_factory.mktemp("masked") / "masked.zarr"
    quiet(config_for(lm, text, out, mask_p=(0.2,)))
    return out


@pytest.fixture(scope="module")
def runs(store: Path, masked_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs: two architectures, and one of them on the other mask ratio."""
    root = tmp_path_factory.mktemp("runs")
    fitted(store, root / "a-topk")
    fitted(store, root / "b-matryoshka", arch="matryoshka")
    fitted(masked_store, root / "c-masked")
    return root


def judged_by(runs: Path, out: Path, **changes: Any) -> list[Outcome]:
    given: dict[str, Any] = {"out": out, "device": "cpu"} | changes
    config = EvalConfig(**given)
    return evaluate_runs([runs], config, say=lambda line: None, show_progress=False)


def by_name(out: Path) -> dict[str, Result]:
    return {each.name: each for each in read_results([out])}


def value(result: Result, name: str) -> float:
    found = [e.values[name].value for e in result.metrics if name in e.values]
    assert len(found) == 1
    assert found[0] is not None
    return found[0]


@pytest.fixture(scope="module")
def results(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    judged_by(runs, out)
    return out


def test_results_have_the_numbers_of_the_fits_own_judgement(runs: Path, results: Path) -> None:
    found = by_name(results)
    for run in ("a-topk", "b-matryoshka"):
        summary = json.loads((runs / run / "summary.json").read_text())
        for name in ("explained_variance", "fvu", "mse", "l0", "dead_fraction", "gamma"):
            assert value(found[run], name) == pytest.approx(summary[name], rel=1e-5), name


def test_results_say_what_was_judged_on_what(runs: Path, store: Path, results: Path) -> None:
    found, opened = by_name(results), open_store(store)
    result = found["a-topk"]
    facts = read_facts(runs / "a-topk")
    assert dict(result.run) == json.loads(json.dumps(facts))
    expected = {"arch": "topk", "k": 4, "d_sae": 64, "d_in": 32, "layer": 1, "hook": "resid_post"}
    assert expected.items() <= result.run.items()
    assert (result.run["mask_p"], found["c-masked"].run["mask_p"]) == (0.3, 0.2)
    names = {entry.metric for entry in result.metrics}
    assert names == {n for n in names_of("rows") if METRICS[n].by_default}
    [entry] = [each for each in result.metrics if each.metric == "explained_variance"]
    assert (entry.source.kind, entry.source.digest) == ("store", opened.digest)
    assert entry.sample["rows"] == opened.heldout.n_rows
    assert entry.sample["documents"] > 2
    assert entry.interval == "95 %, bootstrap over documents, 1000 resamples"
    found_value = entry.values["explained_variance"]
    assert found_value.low is not None
    assert found_value.high is not None
    assert found_value.low < (found_value.value or 0) < found_value.high
    assert len(found_value.replicates or ()) == 1000


def test_masked_and_unmasked_runs_are_judged_on_the_same_rows(
    runs: Path, store: Path, masked_store: Path, tmp_path: Path
) -> None:
    """The held-out rows of both stores are the same ones: unmasked."""
    a, b = (open_store(path).heldout for path in (store, masked_store))
    assert np.array_equal(a.read(0, a.n_rows), b.read(0, b.n_rows))
    said: list[str] = []
    config = EvalConfig(out=tmp_path, metrics=("l0",), baselines=False, device="cpu")
    evaluate_runs([runs], config, say=said.append, show_progress=False)
    digests = {entry.source.digest for each in by_name(tmp_path).values() for entry in each.metrics}
    assert digests == {open_store(store).digest}
    assert said == [
        f"All 3 are judged on the held-out rows of {store.resolve()}, which are unmasked; 1 of "
        "them were fitted from another store of the same text."
    ]


def test_every_row_is_read_once_for_all_saes(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    plain = StoreRows.read

    def counted(self: StoreRows, start: int, stop: int) -> NDArray[np.float32]:
        read.append((start, stop))
        return plain(self, start, stop)

    monkeypatch.setattr(StoreRows, "read", counted)
    monkeypatch.setattr(passes, "BATCH_ROWS", 100)
    judged_by(runs, tmp_path, baselines=False)
    n_rows = read[-1][1]
    assert read == [(start, min(start + 100, n_rows)) for start in range(0, n_rows, 100)]


def test_values_do_not_depend_on_batches(
    runs: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "BATCH_ROWS", 37)
    judged_by(runs, tmp_path, compat=("saebench",))
    for name, result in by_name(results).items():
        entries = {e.metric: e for e in by_name(tmp_path)[name].metrics}
        for entry in result.metrics:
            for key, expected in entry.values.items():
                found = entries[entry.metric].values[key]
                for a, b in zip(_numbers(found), _numbers(expected), strict=True):
                    assert a == pytest.approx(b, rel=1e-4, abs=1e-5), key


def _numbers(found: Value) -> list[float]:
    return [each for each in (found.value, found.low, found.high) if each is not None]


def test_what_is_there_is_not_computed_again(runs: Path, tmp_path: Path) -> None:
    first = judged_by(runs, tmp_path, metrics=("l0", "fvu"))
    assert [o.computed for o in first if "mean" not in o.name] == [2] * (len(first) - 1)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.json")}
    again = judged_by(runs, tmp_path, metrics=("l0", "fvu"))
    assert all(o.computed == 0 and o.kept > 0 for o in again)
    assert {file: file.read_bytes() for file in tmp_path.glob("*.json")} == before
    more = judged_by(runs, tmp_path, metrics=("l0", "fvu", "mse"))
    assert all(o.computed == 1 for o in more)
    other_rows = judged_by(runs, tmp_path, metrics=("l0",), rows=200)
    assert {o.computed for o in other_rows if "mean" not in o.name} == {1}
    [entry] = [e for e in by_name(tmp_path)["a-topk"].metrics if e.options == {"first_rows": 200}]
    assert entry.sample["rows"] == 200
    other_seed = judged_by(runs, tmp_path, metrics=("fvu",), seed=1)
    assert all(o.computed == 1 for o in other_seed)


def test_baselines_stand_for_all_runs_of_their_shape(results: Path) -> None:
    found = by_name(results)
    baselines = {name: each for name, each in found.items() if each.baseline}
    # Of topk and matryoshka; the masked run has topk's shape; the mean is one for all.
    assert sorted((each.run["of"], each.baseline) for each in baselines.values()) == [
        ("a-topk", "mean"),
        ("a-topk", "random latents"),
        ("a-topk", "untrained"),
        ("b-matryoshka", "random latents"),
        ("b-matryoshka", "untrained"),
    ]
    mean = found["a-topk (mean)"]
    assert value(mean, "explained_variance") == pytest.approx(0, abs=0.01)
    assert "l0" not in {entry.metric for entry in mean.metrics}
    for run in ("a-topk", "b-matryoshka"):
        for kind in ("untrained", "random latents"):
            l0 = value(found[f"{run} ({kind})"], "l0")
            assert l0 == pytest.approx(value(found[run], "l0"), rel=0.15), (run, kind)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_untrained_sae_has_the_l0_of_the_fitted_one(arch: str) -> None:
    random = torch.Generator().manual_seed(0)
    x_BD = torch.randn(600, 16, generator=random) + 5
    options: dict[str, Any] = {"d_in": 16, "d_sae": 64, "k": 6}
    if arch == "matryoshka":
        options["group_sizes"] = [16, 48]
    sae = get_architecture(arch)(**options)
    sae.initialise_(3)
    sae.start_from(x_BD)
    sae.set_threshold_(1.0)
    judged = JudgedSae(sae, {"name": "sae", "seed": 0})
    l0 = float(judged.encode(x_BD).counts_B.double().mean())
    assert l0 > 0
    untrained, shuffled, mean = baselines_of(judged, x_BD)
    assert [each.baseline for each in (untrained, shuffled, mean)] == list(BASELINES)
    for each in (untrained, shuffled):
        assert float(each.encode(x_BD).counts_B.double().mean()) == pytest.approx(l0, rel=0.1)
    assert not torch.equal(untrained.W_dec, judged.W_dec)
    torch.testing.assert_close(mean.decode(mean.encode(x_BD))[0], x_BD.mean(dim=0))


def test_random_latents_have_the_frequencies_and_know_nothing_of_the_row() -> None:
    random = torch.Generator().manual_seed(0)
    x_BD = torch.randn(4000, 8, generator=random)
    sae = get_architecture("relu")(d_in=8, d_sae=12, k=None)
    sae.initialise_(0)
    sae.set_threshold_(0.05)
    judged = JudgedSae(sae, {"name": "sae"})
    shuffled = baselines_of(judged, x_BD)[1]
    fired, own = (each.encode(x_BD).dense() for each in (shuffled, judged))
    torch.testing.assert_close(
        (fired > 0).double().mean(dim=0), (own > 0).double().mean(dim=0), rtol=0, atol=0.04
    )
    both = torch.corrcoef(torch.cat([(fired > 0).double(), (own > 0).double()], dim=1).T)
    assert both[:12, 12:].abs().max() < 0.08
    again = torch.cat([shuffled.encode(part).dense() for part in torch.split(x_BD, 999)])
    assert torch.equal(again, fired)


def test_a_run_that_fails_does_not_stop_the_others(runs: Path, tmp_path: Path) -> None:
    copies = tmp_path / "runs"
    shutil.copytree(runs, copies)
    weights = copies / "b-matryoshka" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (copies / "c-masked" / "sae.safetensors").unlink()
    outcomes = {o.name: o for o in judged_by(copies, tmp_path / "out", metrics=("fvu",))}
    assert outcomes["a-topk"].computed == 1
    assert "is damaged" in str(outcomes["b-matryoshka"].error)
    assert "has no weights" in str(outcomes["c-masked"].error)
    assert "b-matryoshka (untrained)" not in outcomes
    command = [
        "eval",
        str(copies),
        "--out",
        str(tmp_path / "out"),
        "--metrics",
        "fvu",
        "--device",
        "cpu",
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 2
    assert "a-topk" in shown.stdout
    assert "Error: 2 of " in shown.stderr
    assert f"Run {copies / 'c-masked'} has no weights" in shown.stderr


def test_a_mistake_of_ours_in_one_sae_is_raised_when_the_others_are_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = JudgedSae.latents

    def broken(self: JudgedSae, x_BD: Tensor) -> Tensor:
        if self.name == "b-matryoshka":
            raise ZeroDivisionError("ours")
        return plain(self, x_BD)

    monkeypatch.setattr(JudgedSae, "latents", broken)
    command = ["eval", str(runs), "--out", str(tmp_path), "--metrics", "fvu", "--device", "cpu"]
    shown = CliRunner().invoke(app, [*command, "--no-baselines"])
    assert isinstance(shown.exception, ZeroDivisionError)
    assert sorted(by_name(tmp_path)) == ["a-topk", "c-masked"]


@pytest.mark.parametrize(
    ("name", "called", "ours"),
    [("layer", "layer", 0), ("hook", "hook", "mlp_out"), ("model", "model", "other")],
)
def test_a_run_and_a_store_that_do_not_fit_are_refused_with_both_values(
    runs: Path, store: Path, tmp_path: Path, name: str, called: str, ours: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "a-topk", run)
    config = json.loads((run / "config.json").read_text())
    recipe = config["store"]["recipe"]
    theirs = recipe["model"]["name"] if name == "model" else recipe[name]
    if name == "model":
        recipe["model"] |= {"name": ours, "revision": None}
    else:
        recipe[name] = ours
    (run / "config.json").write_text(json.dumps(config))
    message = (
        f"Run run was fitted on {called} {ours}, but store {store} has {called} {theirs}. "
        "Pass a --store or an --eval-set of the same model, layer and hook."
    )
    with pytest.raises(InputError, match=whole(message)):
        judged_by(run, tmp_path / "out", store=store)
    assert not list((tmp_path / "out").glob("*.json"))


def test_another_width_is_refused_with_both_values(
    small_store: Any, runs: Path, tmp_path: Path
) -> None:
    message = (
        f"Run a-topk was fitted on d_in 32, but store {small_store.path} has d_in 16. "
        "Pass a --store or an --eval-set of the same model, layer and hook."
    )
    with pytest.raises(InputError, match=whole(message)):
        judged_by(runs, tmp_path, store=small_store.path)


def test_an_sae_from_elsewhere_needs_to_be_told_the_store(store: Path, tmp_path: Path) -> None:
    sae = get_architecture("topk")(d_in=32, d_sae=40, k=3)
    sae.initialise_(0)
    save_sae(sae, tmp_path / "foreign")
    message = (
        "Run foreign does not say which store it was fitted from. Pass --store, or --eval-set with "
        "--metrics items."
    )
    with pytest.raises(InputError, match=whole(message)):
        judged_by(tmp_path / "foreign", tmp_path / "out")
    outcomes = judged_by(tmp_path / "foreign", tmp_path / "out", store=store, metrics=("l0",))
    assert [o.computed for o in outcomes if o.name == "foreign"] == [1]
    assert by_name(tmp_path / "out")["foreign"].run["mask_p"] is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "metric": (
        {"metrics": ("recall",)},
        f"Unknown metric 'recall': choose of {', '.join(sorted(METRICS))}, or a kind "
        "(rows, items, text, all).",
    ),
    "compat": (
        {"compat": ("other",)},
        "Unknown suite 'other' for --compat: choose one of saebench.",
    ),
    "rows": ({"rows": 0}, "--rows must be at least 1, not 0."),
    "contexts": ({"contexts": -1}, "--contexts must be at least 1, not -1."),
    "ito_k": ({"ito_k": (4, 0)}, "--ito-k must be at least 1, not 0."),
    "no set": (
        {"metrics": ("probe_loss",)},
        "Metric probe_loss judges on a labelled evaluation set of suite probes or ood or letters "
        "or csv, and none was given. Build one with `sae-pipe eval-set build` and pass it as "
        "--eval-set.",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_asked_for_is_said_before_anything_is_computed(
    bad: str, runs: Path, tmp_path: Path
) -> None:
    changes, message = BAD[bad]
    with pytest.raises(InputError, match=whole(message)):
        judged_by(runs, tmp_path / "out", **changes)
    assert not list(tmp_path.glob("out/*.json"))


def test_places_without_runs_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, what in (("empty", "holds no run"), ("gone", "does not exist")):
        message = (
            f"{tmp_path / place} {what}. Pass the folder that `sae-pipe fit --out` wrote, or a "
            "folder of such folders."
        )
        with pytest.raises(InputError, match=whole(message)):
            judged_by(tmp_path / place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- text ---


def test_metrics_over_text_share_the_language_model(runs: Path, lm: Path, tmp_path: Path) -> None:
    outcomes = judged_by(
        runs, tmp_path, metrics=("text",), model=str(lm), contexts=3, baselines=False
    )
    assert all(o.error is None and o.computed == 2 for o in outcomes)
    found = by_name(tmp_path)
    for result in found.values():
        downstream = next(e for e in result.metrics if e.metric == "downstream")
        assert downstream.options == {"contexts": 3}
        assert downstream.sample["contexts"] == 3
        assert value(result, "ce_clean") == value(found["a-topk"], "ce_clean")
    ce = [value(result, "ce_sae") for result in found.values()]
    assert len(set(ce)) == 3


def test_text_in_batches_is_that_of_the_store(store: Path) -> None:
    opened = open_store(store)
    table = opened.corpus.heldout
    text = StoreText(opened, 10**6)
    parts = list(text.batches(2))
    assert sum(len(part.tokens_BT) for part in parts) == table.n_contexts == text.n_contexts
    assert sum(int(part.rows_BT.sum()) for part in parts) == table.n_rows
    assert [part.first for part in parts] == list(range(0, table.n_contexts, 2))


def test_a_store_of_a_local_model_asks_where_it_lies(
    runs: Path, store: Path, lm: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    message = (
        f"Store {store.resolve()} was made with a local folder {lm.name}. Pass it as --model, or "
        "leave out the metrics that need the language model."
    )
    with pytest.raises(InputError, match=whole(message)):
        judged_by(runs, tmp_path, metrics=("downstream",))
    other = tiny_models["gpt2"]
    with pytest.raises(InputError, match=r"but --model .* is sha256:\w+\. Pass the model that it"):
        judged_by(runs, tmp_path, metrics=("downstream",), model=str(other))


# --- evaluation sets ---


def labelled_rows(n_items: int, rows_each: int = 3) -> NDArray[np.float32]:
    """Items whose first dimension says their label, rows far from zero."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n_items * rows_each, 32)).astype(np.float32) + 3
    rows[:, 0] += np.repeat(np.arange(n_items) % 2, rows_each) * 6
    return rows


def write_set(path: Path, recipe: dict[str, Any], **changes: Any) -> EvalSet:
    """A set like the suite probes: two tasks of 80 items, three rows an item, mean-pooled."""
    n_items, each = 160, 3
    rows = changes.pop("rows", labelled_rows(n_items, each))
    given: dict[str, Any] = {
        "suite": "probes",
        "pooling": "mean",
        "tasks": [Task("first", ["no", "yes"], None, ""), Task("second", ["no", "yes"], None, "")],
        "texts": [f"text {i}" for i in range(n_items)],
        "item_task": np.repeat([0, 1], 80),
        "item_label": np.arange(n_items) % 2,
        "item_split": (np.arange(n_items) % 80 >= 40).astype(int),
        "item_document": np.arange(n_items),
        "row_item": np.repeat(np.arange(n_items), each),
        "row_token": np.arange(n_items * each) % 300 + 1,
        "row_position": np.tile(np.arange(1, each + 1), n_items),
    } | changes
    origin = Origin(recipe=recipe, tokenizer_json="{}")
    return write_evalset(path, rows, Contents(**given), origin, chunk_rows=64)


def recipe_of(store: Path) -> dict[str, Any]:
    names = ("model", "layer", "hook", "dtype")
    own = {name: open_store(store).recipe[name] for name in names}
    return own | {"context_size": 32, "tokenizer": {"bos_id": None, "prepends_bos": False}}


@pytest.fixture(scope="module")
def probes(store: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    return write_set(tmp_path_factory.mktemp("sets") / "probes.zarr", recipe_of(store))


def test_items_are_pooled_as_plain_means(
    probes: EvalSet, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_pipe.stages.evaluation.items._PART_ROWS", 50)
    judged = load_judged(runs / "a-topk", CPU)
    reader = TaskReader(probes, 1, seed=0)
    steps: list[int] = []
    [pooled] = reader.read([judged], CPU, lambda each, x_BD: each.encode(x_BD), steps.append)
    x_ND = probes.read(240, 480)
    latents_NS = judged.sae.encode(torch.from_numpy(x_ND)).numpy()
    assert isinstance(pooled, csr_array)
    assert pooled.toarray() == pytest.approx(latents_NS.reshape(80, 3, -1).mean(axis=1), abs=1e-5)
    assert reader.data.x_ID == pytest.approx(x_ND.reshape(80, 3, -1).mean(axis=1), abs=1e-5)
    assert sum(steps) == reader.n_rows == 240
    assert len(steps) > 3
    data = reader.data
    assert (data.name, data.suite, data.texts[0], data.texts[-1]) == (
        "second",
        "probes",
        "text 80",
        "text 159",
    )
    assert data.texts[1:3] == ["text 81", "text 82"]


def test_saes_are_judged_on_labelled_sets(probes: EvalSet, runs: Path, tmp_path: Path) -> None:
    outcomes = judged_by(runs, tmp_path, evalsets=(probes.path,), metrics=("probe_loss",))
    assert {o.computed for o in outcomes if "mean" not in o.name} == {1}
    [entry] = by_name(tmp_path)["a-topk"].metrics
    assert (entry.source.kind, entry.source.suite) == ("evaluation set", "probes")
    assert entry.sample == {"labels": 2, "test_items": 80}
    constant = entry.values["probe_loss_constant"].value
    assert constant == pytest.approx(np.log(2))
    assert entry.values["probe_loss"].value is not None
    assert entry.values["probe_loss"].low is not None


def test_a_set_without_labels_takes_the_place_of_the_store(
    store: Path, runs: Path, lm: Path, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).standard_normal((480, 32)).astype(np.float32)
    core = write_set(
        tmp_path / "core.zarr",
        recipe_of(store),
        suite="core",
        pooling="all",
        tasks=[],
        item_task=np.full(160, -1),
        item_label=np.full(160, -1),
        item_document=np.arange(160) // 4,
        row_position=np.tile(np.arange(1, 13), 40),
        rows=rows,
    )
    judged_by(
        runs,
        tmp_path / "out",
        evalsets=(core.path,),
        metrics=("fvu", "downstream"),
        model=str(lm),
        contexts=5,
    )
    entries = {entry.metric: entry for entry in by_name(tmp_path / "out")["a-topk"].metrics}
    assert {entry.source.suite for entry in entries.values()} == {"core"}
    assert entries["fvu"].sample == {"rows": 480, "documents": 40}
    # Contexts of 12 tokens, of which the first is no row and the last predicts nothing.
    assert entries["downstream"].sample == {"tokens": 50, "contexts": 5, "documents": 5}


def test_a_set_of_another_layer_is_refused_with_both_values(
    store: Path, runs: Path, tmp_path: Path
) -> None:
    other = write_set(tmp_path / "other.zarr", recipe_of(store) | {"layer": 2})
    message = (
        f"Run a-topk was fitted on layer 1, but evaluation set {other.path} has layer 2. "
        "Pass a --store or an --eval-set of the same model, layer and hook."
    )
    with pytest.raises(InputError, match=whole(message)):
        judged_by(runs, tmp_path / "out", evalsets=(other.path,))


# --- probe loss ---


def task(label_I: NDArray[np.int64], split_I: NDArray[np.int64], classes: list[str]) -> TaskData:
    n = len(label_I)
    return TaskData(
        name="task",
        suite="csv",
        classes=classes,
        groups=None,
        x_ID=np.zeros((n, 2), np.float32),
        label_I=label_I.astype(np.int32),
        group_I=np.full(n, -1, np.int32),
        split_I=split_I.astype(np.uint8),
        document_I=np.arange(n),
        texts=[""] * n,
        seed=0,
    )


def plain_probe(
    f_I: NDArray[np.float64], y_I: NDArray[np.bool_], ridge: float
) -> NDArray[np.float64]:
    """w and b of one logistic probe, by a general optimiser; the ridge is on scaled latents."""
    scale = np.abs(f_I).max() or 1.0

    def objective(parameters: NDArray[np.float64]) -> float:
        w, b = parameters
        score_I = w * f_I / scale + b
        loss = np.mean(np.log1p(np.exp(-np.where(y_I, score_I, -score_I))))
        return float(loss + ridge * w**2 / 2)

    w, b = minimize(objective, np.zeros(2), tol=1e-10).x
    return np.array([w / scale, b])


def test_probe_loss_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    y_I = rng.integers(0, 2, 200)
    latents_IS = np.maximum(rng.normal(size=(200, 6)) - 0.5, 0) * [1, 2, 0.1, 5, 1, 0]
    latents_IS[:, 3] += 3 * y_I * rng.random(200)
    split_I = np.arange(200) % 2
    metric = ProbeLoss()
    judged: Any = None
    metric.observe(
        task(y_I, split_I, ["no", "yes"]), judged, csr_array(latents_IS.astype(np.float32))
    )
    found = metric.result(seed=0)
    train, test = split_I == 0, split_I == 1

    def loss(probe: NDArray[np.float64], rows: NDArray[np.bool_], latent: int) -> float:
        w, b = probe
        p = 1 / (1 + np.exp(-(w * latents_IS[rows, latent] + b)))
        return float(-np.where(y_I[rows] == 1, np.log(p), np.log(1 - p)).mean())

    probes = [plain_probe(latents_IS[train, s], y_I[train] == 1, 1e-4) for s in range(6)]
    train_losses = [loss(probe, train, s) for s, probe in enumerate(probes)]
    best = int(np.argmin(train_losses))
    assert found.details["labels"][0]["latent"] == best
    assert found.details["labels"][0]["train_loss"] == pytest.approx(train_losses[best], rel=1e-3)
    assert found.values["probe_loss"].value == pytest.approx(
        loss(probes[best], test, best), rel=1e-3
    )


def test_a_separating_latent_has_a_small_finite_loss_and_a_dead_one_the_base_rate() -> None:
    from sae_pipe.stages.metrics.probe_loss import _Columns

    y_I = np.arange(100) % 4 == 0
    latents_IS = np.stack([y_I * 7.0, np.zeros(100)], axis=1)
    w_S, b_S, loss_S = fit_probes(_Columns(csr_array(latents_IS)), y_I)
    assert 0 < loss_S[0] < 0.02
    assert np.isfinite([w_S, b_S]).all()
    assert loss_S[1] == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))


def test_labels_with_too_few_items_are_named() -> None:
    label_I = np.array([0, 1, 2] * 40 + [0] * 20)
    label_I[label_I == 2] = np.where(np.arange((label_I == 2).sum()) < 5, 2, 1)
    metric, judged = ProbeLoss(), None
    latents = csr_array(np.random.default_rng(0).random((140, 4)).astype(np.float32))
    metric.observe(task(label_I, np.arange(140) % 2, ["a", "b", "c"]), judged, latents)  # type: ignore[arg-type]
    found = metric.result(seed=0)
    assert found.details["too_few_items"] == ["task: c"]
    assert found.sample["labels"] == 2
    nothing = ProbeLoss().result(seed=0)
    assert nothing.values["probe_loss"].value is None


# --- the command ---


def test_the_command_shows_a_table_and_says_what_it_wrote(runs: Path, tmp_path: Path) -> None:
    command = ["eval", str(runs), "--out", str(tmp_path), "--metrics", "explained_variance,l0"]
    shown = CliRunner().invoke(app, [*command, "--no-baselines", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0] == "Held-out rows and text of acts"
    assert lines[1].split() == ["SAE", "explained", "variance", "L0"]
    assert [line.split()[0] for line in lines[3:6]] == ["a-topk", "b-matryoshka", "c-masked"]
    assert lines[-1] == f"6 results written to {tmp_path}; 0 were there already."


def test_two_commands_do_not_write_into_one_folder(runs: Path, tmp_path: Path) -> None:
    from sae_pipe.storage.lock import sole_writer

    with sole_writer(tmp_path, "Results folder"), pytest.raises(InputError, match="Results folder"):
        judged_by(runs, tmp_path)
