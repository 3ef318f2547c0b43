"""Small evaluation sets and a small wheel of texts: shared by the tests of evaluation sets."""

import csv
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from sae_pipe.pipeline import cli_demo
from sae_pipe.stages.evalsets import wheel
from sae_pipe.stages.evalsets.build import build
from sae_pipe.stages.evalsets.config import EvalSetConfig
from sae_pipe.storage.evalset import EvalSet

from .conftest import SENTENCES

DEMO = str(cli_demo.MODEL)


def quiet(**flags: Any) -> EvalSet:
    """Build a set on the CPU without a word."""
    evalset = build(config_of(flags), say=lambda line: None, show_progress=False)
    assert evalset is not None
    return evalset


def said(**flags: Any) -> list[str]:
    """What a build prints."""
    lines: list[str] = []
    build(config_of(flags), say=lines.append, show_progress=False)
    return lines


def config_of(flags: dict[str, Any]) -> EvalSetConfig:
    """Layer 1 on the CPU, unless the flags say otherwise."""
    given: dict[str, Any] = {"layer": 1, "device": "cpu"}
    return EvalSetConfig(**given | flags)


def content(evalset: Path) -> dict[str, bytes]:
    """Every file that must be the same whoever wrote it and however often it was stopped."""
    files = {
        str(file.relative_to(evalset)): file.read_bytes()
        for file in sorted(evalset.rglob("*"))
        if file.is_file() and file.name not in (".lock", "manifest.json")
    }
    manifest = json.loads((evalset / "manifest.json").read_text())
    manifest.pop("provenance")
    files["manifest"] = json.dumps(manifest, sort_keys=True).encode()
    return files


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def sentences(n: int, seed: int = 0) -> list[str]:
    """Different texts of 4 to 9 words."""
    words = " ".join(SENTENCES).split()
    rng = np.random.default_rng(seed)
    drawn = (rng.choice(words, int(rng.integers(4, 10))).tolist() for _ in range(n))
    return [f"{' '.join(each)} {i}" for i, each in enumerate(drawn)]


def save_wheel(folder: Path) -> Path:
    """A wheel with the layout of sae-probes: two binary tasks with an out-of-distribution set, one
    without, and tables that are no binary tasks. pip takes it.
    """
    path = folder / wheel.WHEEL
    data, info = "sae_probes/data", "sae_probes-0.4.2.dist-info"
    master = [["Data type", "Dataset save name"]]
    with zipfile.ZipFile(path, "w") as archive:

        def add(name: str, rows: Iterable[Iterable[object]]) -> None:
            text = io.StringIO(newline="")
            csv.writer(text).writerows(rows)
            # A frame that does not say its size, as those of sae-probes do not.
            frame = zstandard.ZstdCompressor(write_content_size=False).compress(
                text.getvalue().encode()
            )
            archive.writestr(f"{data}/{name}.zst", frame)

        for number, (task, classes) in enumerate(
            {"9_b": ("0", "1"), "10_a": ("bigram", "not_bigram"), "11_c": ("0", "1")}.items()
        ):
            texts = sentences(300, number)
            rows = [[text, len(text), classes[i % 2]] for i, text in enumerate(texts)]
            rows += rows[:30]  # repeated
            rows += [[texts[0], 0, classes[1]]]  # with the other label
            add(f"cleaned_data/{task}.csv", [["prompt", "prompt_len", "target"], *rows])
            master.append(["Binary Classification", f"cleaned_data/{task}.csv"])
        spelt = ("1", "not_entailment")
        for task, classes in {"9_b": spelt, "10_a": ("bigram", "not_bigram")}.items():
            rows = [[text, classes[i % 2]] for i, text in enumerate(sentences(20, 7))]
            add(f"OOD data/{task}_OOD.csv", [["prompt", "target"], *rows])
        add("OOD data/9_translations.csv", [["Language"], ["French"]])
        add("cleaned_data/12_d.csv", [["prompt", "target"], ["a", "1.5"]])
        master.append(["Regression", "cleaned_data/12_d.csv"])
        add("probing_datasets_MASTER.csv", master)
        # What would be run if the package were imported.
        archive.writestr("sae_probes/__init__.py", "raise SystemExit('imported')\n")
        metadata = "Metadata-Version: 2.1\nName: sae-probes\nVersion: 0.4.2\n"
        archive.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return path
