"""sae-pipe store recode, import and export as they are typed."""

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage import ActivationStore, open_store


def run(*args: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, ["store", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback is a bug of ours
    return result.exit_code, result.stdout, result.stderr


def test_a_store_goes_out_and_comes_back_by_the_commands(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    code, said, _ = run("export", small_store.path, tmp_path / "out", "--format", "numpy")
    assert (code, said) == (
        0,
        f"{tmp_path / 'out'} is complete: 4,096 rows of 16 values in float32, 295 kB.\n",
    )
    flags = ["--context-size", 64, "--heldout-rows", 100, "--block-gb", 0.001, "--layer", 3]
    back = tmp_path / "back.zarr"
    code, said, bar = run("import", tmp_path / "out" / "activations.npy", "--out", back, *flags)
    assert code == 0
    assert said.splitlines()[0] == (
        "input     4,096 rows of 16 values (float32), 128 of them held out, in contexts of 64"
    )
    assert said.splitlines()[-1] == (f"{back} is complete: 3,968 training and 128 held-out rows.")
    assert "4.10k/4.10k" in bar
    code, said, _ = run("recode", back, tmp_path / "small.zarr", "--codec", "compact")
    assert code == 0
    assert said.splitlines()[-1].startswith(
        f"{tmp_path / 'small.zarr'} is complete: 3,968 training and 128 held-out rows, "
    )
    code, said, _ = run("info", tmp_path / "small.zarr")
    assert code == 0
    assert "imported  activations.npy (npy), 4,096 x 16 values in float32" in said
    assert run("verify", tmp_path / "small.zarr")[0] == 0
    assert run("verify", "--shuffle", tmp_path / "small.zarr")[0] == 0
    again = open_store(tmp_path / "small.zarr")
    error = again.read(slice(None)) - small_store.read(again._train.read_source(slice(None)))
    assert np.abs(error).max() <= 0.51 * again._codec.served.step


def test_mistakes_are_one_sentence_and_exit_code_2(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    code, _, said = run("recode", small_store.path, tmp_path / "b.zarr", "--codec", "zip")
    assert (code, said) == (
        2,
        "Error: Unknown codec 'zip': choose one of compact, lossless, none.\n",
    )
    code, _, said = run("import", tmp_path / "gone.npy", "--out", tmp_path / "b.zarr")
    assert (code, said) == (
        2,
        f"Error: There is nothing at {tmp_path / 'gone.npy'}. Pass a file or folder of "
        "activations.\n",
    )
    code, _, said = run("export", small_store.path, tmp_path, "--format", "arrow")
    assert (code, said) == (
        2,
        f"Error: {tmp_path} exists. Pass another place for the export, or remove it.\n",
    )
