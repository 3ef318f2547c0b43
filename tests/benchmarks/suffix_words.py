"""Words of a text with their suffix as label: a concept that a model of two million parameters has.

The first letters of words are no use on the demo model: at layers 0, 1, 3 and 5 none of the 26 probes has F1
above 0.25, and absorption gives no score. Suffixes it knows. Writes a CSV file for
`sae-pipe eval-set build --csv`: text (160 characters that end with the word), label, word.

Ten labels, 200 words of each. There is no label for words without one of the suffixes: a catch-all is no concept.

    python tests/benchmarks/suffix_words.py --out suffix.csv
    sae-pipe eval-set build --model pipeline/demo_data/neox-pd --layer 3 --csv suffix.csv \\
        --text-column text --label-column label --position last --out suffix.zarr
"""

import argparse
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import zstandard

from sae_pipe.pipeline.cli_demo import TEXT
from sae_pipe.storage.counter import permutation, stream_key

SUFFIXES = ("tion", "ment", "ness", "ing", "est", "ous", "ed", "ly", "er", "s")
NOT_PLURAL = ("ss", "us", "is")
OF_EACH, CHARACTERS = 200, 160


def documents(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)["text"]


def first_uses(path: Path) -> dict[str, str]:
    """Each word of four lower-case letters or more, with the text that ends with its first use."""
    found: dict[str, str] = {}
    for text in documents(path):
        for match in re.finditer(r"(?<= )[a-z]{4,}", text):
            if match.group() not in found and match.start() >= CHARACTERS:
                start = match.start() - CHARACTERS
                found[match.group()] = text[start : match.end()].replace("\n", " ")
    return found


def label_of(word: str) -> str | None:
    """Its longest suffix, or None."""
    for suffix in SUFFIXES:
        if word.endswith(suffix) and not (suffix == "s" and word.endswith(NOT_PLURAL)):
            return suffix
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, default=TEXT, help="JSON lines with a field text")
    parser.add_argument("--out", type=Path, default=Path("suffix.csv"))
    arguments = parser.parse_args()
    uses = first_uses(arguments.text)
    words = sorted(uses)
    by_label: dict[str, list[str]] = {label: [] for label in SUFFIXES}
    for place in permutation(stream_key(0, "suffix words"), len(words)).tolist():
        label = label_of(words[place])
        if label is not None:
            by_label[label].append(words[place])
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "word"])
        for label, chosen in by_label.items():
            for word in chosen[:OF_EACH]:
                writer.writerow([uses[word], label, word])
    print({label: len(chosen) for label, chosen in by_label.items()})


if __name__ == "__main__":
    main()
