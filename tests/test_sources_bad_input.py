"""Datasets that cannot be had: each is one sentence that says what to do."""

import re
from pathlib import Path

import pytest

from sae_pipe.stages.sources import TextConfig, open_text
from sae_pipe.storage.errors import InputError, NetworkError

SUFFIXES = ".jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt"


@pytest.mark.parametrize(
    ("make", "dataset", "message"),
    [
        (
            None,
            "{tmp}/nowhere",
            (
                "Dataset '{tmp}/nowhere' is no file, folder or matching pattern. Pass a file, a folder "
                f"or a glob of {SUFFIXES} files, or a Hub dataset id."
            ),
        ),
        (
            None,
            "nowhere.jsonl",
            (
                "Dataset 'nowhere.jsonl' is no file, folder or matching pattern. Pass a file, a folder "
                f"or a glob of {SUFFIXES} files, or a Hub dataset id."
            ),
        ),
        (
            "x.csv",
            "{tmp}",
            (
                "Dataset '{tmp}' holds no text file. Pass a file, a folder or a glob of "
                f"{SUFFIXES} files, or a Hub dataset id."
            ),
        ),
        (
            "x.csv",
            "{tmp}/x.csv",
            (
                f"Text file {{tmp}}/x.csv has an unknown suffix. Known are {SUFFIXES}; rename the file, "
                "or pass another one."
            ),
        ),
        (
            None,
            "no such name",
            (
                "Dataset 'no such name' was not found: it is neither local text nor on the Hub (or it "
                "is private, and `hf auth login` is needed). Check the spelling."
            ),
        ),
    ],
)
def test_dataset_that_is_not_there_is_one_sentence(
    tmp_path: Path, make: str | None, dataset: str, message: str
) -> None:
    if make:
        (tmp_path / make).write_text("a,b")
    expected = re.escape(message.replace("{tmp}", str(tmp_path)))
    with pytest.raises(InputError, match=f"^{expected}$"):
        open_text(TextConfig(dataset=dataset.replace("{tmp}", str(tmp_path))))


@pytest.mark.parametrize("flag", ["split", "revision"])
def test_local_text_refuses_what_only_the_hub_has(tmp_path: Path, flag: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')
    message = (
        f"Dataset {str(tmp_path)!r} is local text, which has no {flag} 'x'. "
        f"Leave --{flag} out, or pass a Hub dataset id."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_text(TextConfig(dataset=str(tmp_path), **{flag: "x"}))


@pytest.mark.usefixtures("no_hub")
def test_no_network_for_the_default_dataset_says_how_to_use_a_file() -> None:
    message = (
        "Dataset monology/pile-uncopyrighted could not be reached on the Hub: no network, or the "
        "Hub does not answer. Pass local text instead: --dataset FILE, a folder or a glob of "
        ".jsonl, .jsonl.zst, .jsonl.gz, .parquet or .txt files."
    )
    with pytest.raises(NetworkError, match=f"^{re.escape(message)}$"):
        open_text(TextConfig())


@pytest.mark.usefixtures("refusing_hub")
@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            "someone/gone",
            None,
            (
                "Dataset 'someone/gone' was not found: it is neither local text nor on the Hub (or it is private, "
                "and `hf auth login` is needed). Check the spelling."
            ),
        ),
        (
            "someone/gated",
            None,
            (
                "Dataset someone/gated is gated. Accept its terms at "
                "https://huggingface.co/datasets/someone/gated, run `hf auth login`, and try again."
            ),
        ),
        (
            "someone/no-revision",
            "v9",
            (
                "Dataset someone/no-revision has no revision 'v9' on the Hub. Pass a branch, a tag "
                "or a commit listed at "
                "https://huggingface.co/datasets/someone/no-revision/commits/main."
            ),
        ),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    name: str, revision: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_text(TextConfig(dataset=name, revision=revision))
