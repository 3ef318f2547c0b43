"""`sae-pipe sweep FILE.toml`: harvests and fits as a file asks for them."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sae_pipe.pipeline.sweep_file import read_sweep
from sae_pipe.storage import InputError, open_store

from .harvesting import MASK_STRING
from .test_cli import refused, run

RECIPES = Path(__file__).resolve().parent.parent / "docs/recipes"
RECIPE = RECIPES / "masked-regularization.toml"


def write_toml(file: Path, tables: Mapping[str, Any]) -> Path:
    """JSON's strings, numbers, booleans and lists are TOML's, too."""
    lines = []
    for name, found in tables.items():
        for table in found if isinstance(found, list) else [found]:
            lines.append(f"[[{name}]]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_read(recipe: Path) -> None:
    asked = read_sweep(recipe)
    assert asked.harvests
    assert recipe.with_suffix(".md").is_file()


def test_the_recipe_of_masked_regularization_is_the_papers() -> None:
    asked = read_sweep(RECIPE)
    assert [(each.model, each.layers) for each in asked.harvests] == [
        ("pythia-160m-deduped", (8,)),
        ("gemma-2-2b", (12,)),
    ]
    for harvest in asked.harvests:
        assert (harvest.mask_p, harvest.tokens) == ((0.0, 0.3), 500_000_000)
        assert (harvest.text.dataset, harvest.mask_string) == ("pile-cc", "...")
    [fit] = asked.fits
    assert fit.stores is None
    assert [config.k for config in fit.configs] == [20, 40, 80, 160]
    for config in fit.configs:
        assert (config.arch, config.d_sae, config.batch_size) == ("matryoshka", 4096, 2048)
        schedule = config.schedule(500_000_000)
        assert (schedule.steps, schedule.lr, schedule.warmup_steps) == (244_140, 3e-4, 1000)


@pytest.fixture(scope="module")
def scaled_down(lm: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe over a tiny model and text, with everything else as it is."""
    root = tmp_path_factory.mktemp("recipe")
    tables = tomllib.loads(RECIPE.read_text())
    for number, harvest in enumerate(tables["harvest"]):
        harvest |= {"model": str(lm), "layer": number + 1, "dataset": str(text)}
        harvest |= {"mask_string": MASK_STRING, "tokens": 3000, "heldout_tokens": 300}
        harvest |= {"context_size": 32, "out": str(root / harvest["out"])}
    fit = tables["fit"]
    fit |= {"l0": [2, 4], "d_sae": 64, "batch_size": 256, "warmup_steps": 1}
    fit |= {"out": str(root / fit["out"])}
    return write_toml(root / "sweep.toml", tables)


def test_a_dry_run_prints_the_plan_of_harvests_and_fits_and_writes_nothing(
    scaled_down: Path,
) -> None:
    code, stdout, stderr = run("sweep", scaled_down, "--dry-run")
    assert code == 0, stderr
    assert stdout.count("rows      3,000 training and 300 held-out rows of 32 values in 2 ") == 2
    root = scaled_down.parent
    *_, fit, fits, memory, disk, time = stdout.splitlines()
    assert fit == f"fit       into {root}/runs/masked-regularization"
    assert fits == "fits      8 SAEs from 4 stores; 44 batches are read, of 256 rows"
    assert re.fullmatch(r"memory    .* for the SAEs of a store, beside the reader's 1 GB", memory)
    assert re.fullmatch(r"disk      .* for the run folders \(.* at most while running\)", disk)
    assert re.fullmatch(r"time      about \d+ s for the steps: .* measured on \w+", time)
    assert [path.name for path in root.iterdir()] == ["sweep.toml"]


def test_the_recipe_harvests_what_is_missing_and_fits_everything_from_every_store(
    scaled_down: Path,
) -> None:
    code, stdout, stderr = run("sweep", scaled_down)
    assert code == 0, stderr
    root = scaled_down.parent
    stores = [
        root / f"acts/{model}-p{p}.zarr"
        for model in ("pythia-160m-deduped-layer1", "gemma-2-2b-layer2")
        for p in ("0", "0.3")
    ]
    assert [open_store(store).n_rows for store in stores] == [3000] * 4
    runs = root / "runs/masked-regularization"
    names = [f"{store.stem}-matryoshka-l0_{k}-seed0" for store in stores for k in (2, 4)]
    report = json.loads((runs / "sweep.json").read_text())
    assert [entry["run"] for entry in report["runs"]] == names
    assert all(entry["summary"]["l0"] is not None for entry in report["runs"])
    assert all((runs / name / "sae.safetensors").is_file() for name in names)
    code, again, stderr = run("sweep", scaled_down)
    assert code == 0
    assert again.count("Nothing to do.") == 4
    assert stderr.count("is complete: nothing to do.") == 8
    table = [line for line in stdout.splitlines() if "-matryoshka-" in line]
    assert [line for line in again.splitlines() if "-matryoshka-" in line] == table
    code, plan, _ = run("sweep", scaled_down, "--dry-run")
    assert "fits      8 SAEs from 4 stores; 44 batches are read, of 256 rows" in plan


HARVEST = {"model": "pythia-160m", "layer": 8}


def test_tables_and_lists_are_every_combination(tmp_path: Path) -> None:
    fits = [
        {"l0": [20, 40], "lr": ["auto", 1e-3], "store": ["a.zarr", "b.zarr"], "workers": 2},
        {"l0": 30, "arch": ["topk", "batch_topk"], "seed": [1, 2], "epochs": 2},
    ]
    file = write_toml(tmp_path / "sweep.toml", {"harvest": HARVEST, "fit": fits})
    first, second = read_sweep(file).fits
    assert [(c.arch, c.k, c.lr) for c in first.configs] == [
        ("matryoshka", k, lr) for k in (20, 40) for lr in (None, 1e-3)
    ]
    assert (first.stores, first.workers) == ([Path("a.zarr"), Path("b.zarr")], 2)
    assert [(c.arch, c.k, c.seed, c.epochs) for c in second.configs] == [
        (arch, 30, seed, 2.0) for arch in ("topk", "batch_topk") for seed in (1, 2)
    ]
    assert (second.stores, second.out) == (None, Path("runs"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fit\n", "FILE is not TOML: "),
        (
            "[fits]\nl0 = 3\n",
            "fits in FILE is not known: a sweep has the tables [harvest] and [fit].",
        ),
        (
            "[harvest]\nmodel = 'm'\nlayer = 1\n",
            "FILE has no [fit]. Add one with at least `l0 = 20`.",
        ),
        (
            "[fit]\nl0 = 3\n",
            "FILE has no [harvest], so [fit] needs `store`: the stores to fit from.",
        ),
        ("fit = 3\n", "fit in FILE has to be a table: write [fit] above its keys."),
        (
            "[fit]\nl0 = 3\nlayers = 2\n",
            "layers in [fit] of FILE is not known. Known are: store, l0, arch, d_sae, out, ",
        ),
        (
            "[harvest]\nlayers = 2\n",
            "layers in [harvest] of FILE is not known. Known are: model, layer, mask_p, out, ",
        ),
        ("[harvest]\nlayer = 2\n", "model is missing in [harvest] of FILE."),
        (
            "[fit]\narch = 'topk'\nstore = 'a.zarr'\n",
            "topk needs to know the L0 to reach: pass --l0.",
        ),
        (
            "[fit]\nl0 = ['many', 3]\n",
            "l0 in [fit] of FILE is 'many', and has to be a whole number or a list of them.",
        ),
        (
            "[harvest]\nmodel = 'm'\nlayer = 2\npack = 1\n",
            "pack in [harvest] of FILE is 1, and has to be true or false.",
        ),
        (
            "[harvest]\nmodel = ['m', 'n']\nlayer = 2\n",
            "model in [harvest] of FILE is ['m', 'n'], and has to be text in quotes.",
        ),
        ("[fit]\nl0 = []\n", "l0 in [fit] of FILE is an empty list. Give it a value."),
        ("[fit]\nl0 = [3, 3]\n", "--l0 names 3 twice. Pass each value once."),
        ("[fit]\nl0 = 3\nd_sae = 2\n", "--l0 3 must be smaller than --d-sae 2: an SAE that keeps"),
        (
            "[harvest]\nmodel = 'm'\nlayer = 2\nmask_p = 3\n",
            "Mask probability 3.0 is outside [0, 1]. ",
        ),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_the_name_of_the_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(message.replace('FILE', str(file)))}"):
        read_sweep(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refused("sweep", tmp_path / "sweep.toml") == (
        f"{tmp_path}/sweep.toml could not be read (No such file or directory). "
        "Pass the TOML file of a sweep."
    )


def test_a_harvest_that_fails_ends_the_sweep_before_any_fit(lm: Path, tmp_path: Path) -> None:
    harvest = {"model": str(lm), "layer": 1, "dataset": str(tmp_path / "none.jsonl")}
    tables = {"harvest": harvest, "fit": {"l0": 3, "out": str(tmp_path / "runs")}}
    refused("sweep", write_toml(tmp_path / "sweep.toml", tables))
    assert not (tmp_path / "runs").exists()
