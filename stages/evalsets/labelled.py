"""The user's own labelled texts: a CSV file with a column of texts and a column of labels.

Four fifths of the different texts of each class are split train and the rest test, by permutation
`csv/split/CLASS` (docs/store-format.md, "Draws"); a text that is there twice is on one side. Rows
of --ood-csv are split ood. Nothing is left out silently: what cannot be used is refused, or counted
in `dropped` and printed.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...storage.counter import permutation, stream_key
from ...storage.errors import InputError
from ...storage.evalset import OOD, TEST, TRAIN, Task
from ...storage.files import file_digest
from .base import EMPTY, ONLY_SINK, Draft, Labelled, Making, add_texts, few
from .wheel import large_fields

TRAIN_SHARE = 0.8
# With less a probe of the class has nothing to learn from, or nothing to be judged by.
LEAST_TEXTS = 10


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a CSV file; number: of its first line."""

    number: int
    text: str
    label: str
    group: str
    word: str


def draft(making: Making) -> Draft:
    """One task, named after the file."""
    config = making.config
    assert config.csv is not None
    lines = _read(config.csv, making)
    ood_lines = [] if config.ood_csv is None else _read(config.ood_csv, making)
    made = Draft(suite="csv", pooling=config.pooling)
    made.data = {
        flag: {"name": path.name, "sha256": file_digest(path)}
        for flag, path in (("csv", config.csv), ("ood_csv", config.ood_csv))
        if path is not None
    }
    for path, found in ((config.csv, lines), (config.ood_csv, ood_lines)):
        if path is not None:
            _check_lengths(making, path, found)
    name = config.csv.stem
    lines = [*_with_text(made, name, lines, making)]
    ood_lines = [*_with_text(made, f"{name} out of distribution", ood_lines, making)]
    classes = _classes(config.csv, lines)
    unknown = sorted({line.label for line in ood_lines} - set(classes))
    if unknown:
        raise InputError(
            f"{config.ood_csv} has the labels {few(unknown)}, which {config.csv} has not: those "
            f"are {few(classes)}. Give both the same labels."
        )
    groups = None
    if config.group_column is not None:
        groups = sorted({line.group for line in [*lines, *ood_lines]})
    made.tasks.append(Task(name, classes, groups, ""))
    is_train = _train_texts(lines, making.seed)
    order = permutation(stream_key(making.seed, "csv", "order"), len(lines))
    in_order = [lines[i] for i in order]
    for split, part in (
        (TRAIN, [line for line in in_order if line.text in is_train]),
        (TEST, [line for line in in_order if line.text not in is_train]),
        (OOD, ood_lines),
    ):
        _add(made, making, part, split)
    _check_counts(made, config.csv)
    return made


# --- the file ---


def _read(path: Path, making: Making) -> list[Line]:
    """The rows of a file, `--limit` of them; InputError names the column or the line."""
    config = making.config
    columns = {
        "--text-column": config.text_column,
        "--label-column": config.label_column,
        "--group-column": config.group_column,
        "--marked-column": config.marked_column,
    }
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, large_fields():
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            for flag, column in columns.items():
                if column is not None and column not in header:
                    raise InputError(
                        f"{path} has no column {column!r}; it has "
                        f"{few([repr(name) for name in header], 20) or 'none'}. Pass one of them "
                        f"as {flag}."
                    )
            return list(_lines(path, reader, columns, config.limit))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}). Pass a CSV file with a header line."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} is not a CSV file in UTF-8 ({error}). Save it as one, with a header line."
        ) from error


def _lines(
    path: Path,
    reader: "csv.DictReader[str]",
    columns: dict[str, str | None],
    limit: int | None,
) -> Iterator[Line]:
    text, label, group, word = columns.values()
    begins = 2
    for number, row in enumerate(reader):
        if number == limit:
            return
        if None in row or None in row.values():
            raise InputError(
                f"Line {begins} of {path} has {'more' if None in row else 'fewer'} fields than the "
                "header. Put texts with commas or line ends in double quotes."
            )
        yield Line(
            begins,
            row[text or ""],
            row[label or ""],
            row[group] if group else "",
            row[word] if word else "",
        )
        begins = reader.line_num + 1


def _check_lengths(making: Making, path: Path, lines: list[Line]) -> None:
    """Refuse texts that the model cannot take, unless their beginning may go."""
    if making.config.truncate:
        return
    lengths = [len(ids) for ids in making.tokenizer.encode([line.text for line in lines])]
    long = [line for line, n in zip(lines, lengths, strict=True) if n > making.room]
    if long:
        longest = max(lengths) + len(making.bos)
        raise InputError(
            f"{len(long)} of the {len(lines)} texts of {path} are longer than the "
            f"{making.context_size} tokens that a context has, the first in line "
            f"{long[0].number}; the longest has {longest}. Pass --truncate to keep the last "
            f"{making.room} tokens of each, or shorten them."
        )


def _with_text(made: Draft, name: str, lines: list[Line], making: Making) -> Iterator[Line]:
    """Lines with a text and a label; the others are counted."""
    for line in lines:
        if not line.text.strip():
            made.dropped[f"{name}: {EMPTY}"] += 1
        elif not line.label.strip():
            made.dropped[f"{name}: no label"] += 1
        else:
            yield line


# --- classes and splits ---


def _classes(path: Path, lines: list[Line]) -> list[str]:
    """The labels in sorted order; InputError for one alone, and for rare ones."""
    texts: dict[str, set[str]] = {}
    for line in lines:
        texts.setdefault(line.label, set()).add(line.text)
    classes = sorted(texts)
    if len(classes) < 2:
        raise InputError(
            f"{path} has {f'the one label {classes[0]!r}' if classes else 'no labelled text'}, and "
            "a probe needs two. Pass another --label-column or a file with both."
        )
    rare = [f"{name} ({len(texts[name])})" for name in classes if len(texts[name]) < LEAST_TEXTS]
    if rare:
        raise InputError(
            f"{path} has fewer than {LEAST_TEXTS} different texts of {few(rare)}, and a probe "
            "needs that many of each label. Add texts, or leave those labels out."
        )
    return classes


def _train_texts(lines: list[Line], seed: int) -> set[str]:
    """The texts that are trained on: four fifths of those of each class."""
    first: dict[str, str] = {}  # a text with two labels counts for the first
    for line in lines:
        first.setdefault(line.text, line.label)
    chosen: set[str] = set()
    for label in sorted(set(first.values())):
        texts = [text for text, its_label in first.items() if its_label == label]
        order = permutation(stream_key(seed, "csv", "split", label), len(texts))
        chosen |= {texts[i] for i in order[: int(TRAIN_SHARE * len(texts))]}
    return chosen


def _check_counts(made: Draft, path: Path) -> None:
    """What cannot be a row has gone by now: what is left must still do."""
    for label, name in enumerate(made.tasks[0].classes):
        n_train, n_test = made.count(TRAIN, label), made.count(TEST, label)
        if n_train < 2 or n_test < 1:
            raise InputError(
                f"Of label {name!r} of {path}, {n_train} texts to train on and {n_test} to test "
                f"with are left, after leaving out: {said(made.dropped)}. Add texts."
            )


def said(counts: dict[str, int]) -> str:
    """Counts by reason, as text."""
    return ", ".join(f"{n} ({reason})" for reason, n in sorted(counts.items())) or "none"


# --- rows ---


def _add(made: Draft, making: Making, lines: list[Line], split: int) -> None:
    task = made.tasks[0]
    labels = {name: i for i, name in enumerate(task.classes)}
    groups = {name: i for i, name in enumerate(task.groups or ())}

    def labelled(line: Line) -> Labelled:
        group = groups[line.group] if task.groups is not None else -1
        return Labelled(line.text, labels[line.label], split, group)

    if made.pooling != "marked":
        add_texts(made, making, map(labelled, lines))
        return
    for line in lines:
        tokens_T, ends_T = making.tokenizer.encode_with_ends(line.text)
        cut = max(len(tokens_T) - making.room, 0)
        found = _last_token_of(line, ends_T) - cut
        position_P = np.array([found + len(making.bos)], np.int32)
        if not line.word or line.text.rfind(line.word) < 0:
            made.dropped[f"{task.name}: marked word not in the text"] += 1
        elif found < 0:
            made.dropped[f"{task.name}: marked word in the part that was cut"] += 1
        elif position_P[0] == 0:
            made.dropped[f"{task.name}: {ONLY_SINK}"] += 1
        else:
            made.truncated[task.name] += cut > 0
            whole_T = np.concatenate([making.bos, tokens_T[cut:]])
            made.add(whole_T, position_P, labelled(line))


def _last_token_of(line: Line, ends_T: NDArray[np.int64]) -> int:
    """Token with the last character of the word where it is in the text for the last time."""
    end = line.text.rfind(line.word) + len(line.word)
    return int(np.searchsorted(ends_T, end))
