"""The real packages load what we write, and we what they write, with the same numbers.

They live in an environment of their own, because their dependencies exclude ours:

    tests/interop/build_env.sh DIR
    SAE_PIPE_INTEROP_PYTHON=DIR/bin/python pytest tests/test_interop.py

# B rows, D d_in, S d_sae
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sae_pipe.stages.sae import load_sae
from sae_pipe.stages.sae_formats import FORMATS
from sae_pipe.stages.sae_import import import_sae, write_run

from .interop.table import export_all, variants
from .local_hub import TOKEN, LocalHub, serving
from .saes import FACTS, VARIANTS, make_sae, some_x

CHECK = Path(__file__).parent / "interop" / "check.py"
PYTHON = os.environ.get("SAE_PIPE_INTEROP_PYTHON")
TOLERANCE = 1e-5
# What the packages themselves save, by the name that check.py gives it -> the architecture here.
MADE = {
    "saelens_standard": "relu",
    "saelens_standard_without_b_dec": "relu",
    "saelens_gated": "gated",
    "saelens_topk": "topk",
    "saelens_topk_rescaled": "topk",
    "saelens_jumprelu": "jumprelu",
    "saelens_jumprelu_without_b_dec": "jumprelu",
    "saelens_batchtopk": "batch_topk",
    "saelens_matryoshka": "matryoshka",
    "dictionary_learning_AutoEncoder": "relu",
    "dictionary_learning_AutoEncoderNew": "relu",
    "dictionary_learning_GatedAutoEncoder": "gated",
    "dictionary_learning_JumpReluAutoEncoder": "jumprelu",
    "dictionary_learning_AutoEncoderTopK": "topk",
    "dictionary_learning_BatchTopKSAE": "batch_topk",
    "dictionary_learning_MatryoshkaBatchTopKSAE": "matryoshka",
    "sparsify_topk": "topk",
}

pytestmark = pytest.mark.timeout(900)  # importing all of them takes minutes on a busy machine
needs_packages = pytest.mark.skipif(
    PYTHON is None or not Path(PYTHON).is_file(),
    reason="no environment with the real packages: build one with tests/interop/build_env.sh and "
    "set SAE_PIPE_INTEROP_PYTHON to its python",
)


def run_check(*arguments: str, **environment: str) -> str:
    """What check.py prints. The folder that it runs in is that of its last file."""
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, str(CHECK), *arguments],
        # The other tests ask their own Hubs; here a package that asks one would wait for it.
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        cwd=Path(arguments[-1]) if Path(arguments[-1]).is_dir() else Path(arguments[-1]).parent,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """(variant, format) -> what the real package made of it."""
    folder = tmp_path_factory.mktemp("exported")
    export_all(variants(), folder)
    run_check("load", str(folder))
    results = json.loads((folder / "results.json").read_text())["cases"]
    return {(each["name"], each["format"]): each for each in results}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SAEs that the packages have saved."""
    folder = tmp_path_factory.mktemp("made")
    run_check("make", str(folder))
    return folder


@needs_packages
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_real_packages_compute_what_we_compute(
    variant: str, loaded: dict[tuple[str, str], dict[str, Any]]
) -> None:
    # What a format does not hold is in tests/test_sae_formats.py, with the sentence.
    found = {format: each for (name, format), each in loaded.items() if name == variant}
    assert {"saelens", "safetensors"} <= found.keys()
    for format, each in found.items():
        assert "error" not in each, f"{format}: {each['error']}"
        assert each["active"] >= 1
        assert max(each["encode"], each["decode"], each["both"]) <= TOLERANCE, format


@needs_packages
@pytest.mark.parametrize("name", MADE)
def test_we_compute_what_the_real_package_computes(name: str, made: Path, tmp_path: Path) -> None:
    import_sae(str(made / name), tmp_path / "run", say=lambda _: None)
    sae, expected = load_sae(tmp_path / "run"), load_file(made / f"{name}.expected")
    latents_BS = sae.encode(expected["x"])
    assert (expected["latents"] > 0).any()
    assert (latents_BS - expected["latents"]).abs().max() <= TOLERANCE
    assert (sae.decode(expected["latents"]) - expected["x_hat"]).abs().max() <= TOLERANCE
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["sae"]["architecture"] == MADE[name]
    assert config["store"]["recipe"]["layer"] == 3
    assert config["store"]["recipe"]["hook"] == "resid_post"


@needs_packages
@pytest.mark.parametrize(
    ("variant", "tools"),
    [
        ("matryoshka", {"SAELens", "dictionary_learning", "SAEBench"}),
        ("topk", {"SAELens", "dictionary_learning", "SAEBench", "sparsify"}),
    ],
)
def test_the_code_in_a_card_loads_the_published_sae(
    variant: str, tools: set[str], tmp_path: Path
) -> None:
    run, sae, x_BD = tmp_path / "run", make_sae(variant), some_x()
    write_run(sae, FACTS, run, {"format": "test"})
    expected, card = tmp_path / "expected", tmp_path / "README.md"
    save_file({"x": x_BD, "latents": sae.encode(x_BD)}, expected)
    with serving() as address:
        here = {
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
        }
        formats = [name for name in FORMATS if variant == "topk" or name != "sparsify"]
        command = [sys.executable, "-m", "sae_pipe.pipeline.cli", "sae", "push", str(run)]
        arguments = ["hf://someone/sae", "--formats", ",".join(formats)]
        subprocess.run(command + arguments, env=os.environ | here, check=True, timeout=800)
        card.write_bytes(LocalHub.repos["someone/sae"][-1][1]["README.md"])
        found = json.loads(run_check("card", str(card), str(expected), **here))
    assert found.keys() == tools
    assert max(found.values()) <= TOLERANCE


@needs_packages
def test_everything_that_the_packages_made_is_read(made: Path) -> None:
    assert set(json.loads((made / "made.json").read_text())["made"]) == set(MADE)
