"""First letters of words: absorption's concept (Chanin et al. 2024, arXiv 2409.14507).

Words are the alphabetic tokens of the vocabulary with a leading space that the tokenizer gives back
as that one token. Each has a prompt of ten lines of other words and one of its own, as published,

    {word} has the first letter: {LETTER}

where the last line ends with the colon; every word has its leading space, also at the begin of a
line. The row is that of the word in the last line.

Draws (docs/store-format.md, "Draws"): of the words in alphabetical order, those that come first in
permutation `letters/split`, four fifths, are split train and the rest test; items stand in the
order of permutation `letters/order`, of which `--limit` takes the first. The lines before a word
are of training words, by draws of the key `letters/lines/WORD`: a word's prompt depends on nothing
but the tokenizer and the seed.
"""

import re
from string import ascii_uppercase

import numpy as np

from ...storage.counter import draw, permutation, stream_key
from ...storage.errors import InputError
from ...storage.evalset import TEST, TRAIN, Task
from .base import Draft, Labelled, Making, Tokens, few

LINES = 10
TRAIN_SHARE = 0.8
SUFFIX = " has the first letter:"
# Fewer training words of a letter teach a probe nothing that could be judged.
_FEW_WORDS = 20
_WORD = re.compile(r" [A-Za-z]+")


def draft(making: Making) -> Draft:
    """The words, each with its prompt; one task of 26 classes."""
    ids = vocabulary_words(making)
    words = list(ids)
    if len(words) <= LINES + 1:
        raise InputError(
            f"The tokenizer of {making.info.source} has {len(words)} words of one token with a "
            f"leading space, and a prompt alone needs {LINES + 1}. Pass another model."
        )
    split_key = stream_key(making.seed, "letters", "split")
    is_train = np.zeros(len(words), np.bool_)
    is_train[permutation(split_key, len(words))[: int(TRAIN_SHARE * len(words))]] = True
    pool = [word for word, train in zip(words, is_train, strict=True) if train]
    order = permutation(stream_key(making.seed, "letters", "order"), len(words))
    chosen = order[: making.config.limit]

    made = Draft(suite="letters", pooling="marked")
    made.tasks.append(Task("first_letter", list(ascii_uppercase), None, ""))
    lines = {word: _line(word) for word in words}
    prompts = [_lines_before(words[i], pool, making.seed, lines) + f" {words[i]}" for i in chosen]
    with_word = making.tokenizer.encode(prompts)
    whole = making.tokenizer.encode([prompt + SUFFIX for prompt in prompts])
    for i, before_T, tokens_T in zip(chosen, with_word, whole, strict=True):
        if not np.array_equal(tokens_T[: len(before_T)], before_T) or before_T[-1] != ids[words[i]]:
            made.dropped["first_letter: not one token in its prompt"] += 1
            continue
        split = TRAIN if is_train[i] else TEST
        _add(made, making, words[i], split, len(before_T) - 1, tokens_T)
    if not made.n_items:
        why = "; ".join(f"{key.partition(': ')[2]}: {n}" for key, n in made.dropped.items())
        raise InputError(
            f"None of the {len(chosen)} prompts can be used with model {making.info.source} "
            f"({why}). Pass another model."
        )
    _say_counts(made, len(words))
    return made


def vocabulary_words(making: Making) -> dict[str, int]:
    """Words of one token with a leading space, in alphabetical order, and the token's id."""
    tokenizer = making.tokenizer
    found = {text[1:]: i for i, text in enumerate(tokenizer.token_texts()) if _WORD.fullmatch(text)}
    words = sorted(found)
    encoded = tokenizer.encode([f" {word}" for word in words])
    return {
        word: found[word]
        for word, ids in zip(words, encoded, strict=True)
        if ids.tolist() == [found[word]]
    }


def _line(word: str) -> str:
    return f" {word}{SUFFIX} {word[0].upper()}\n"


def _lines_before(word: str, pool: list[str], seed: int, lines: dict[str, str]) -> str:
    """Ten lines of different training words, none of them the word itself."""
    key = stream_key(seed, "letters", "lines", word)
    chosen: list[str] = []
    counter = 0
    while len(chosen) < LINES:
        drawn = draw(key, np.arange(counter, counter + 2 * LINES)) % np.uint64(len(pool))
        counter += 2 * LINES
        for other in (pool[i] for i in drawn.tolist()):
            if other != word and other not in chosen and len(chosen) < LINES:
                chosen.append(other)
    return "".join(lines[each] for each in chosen)


def _add(
    made: Draft, making: Making, word: str, split: int, position: int, tokens_T: Tokens
) -> None:
    """position: of the word in the prompt's tokens without BOS."""
    if len(tokens_T) > making.room:
        made.dropped[f"first_letter: prompt longer than {making.context_size} tokens"] += 1
        return
    position_P = np.array([len(making.bos) + position], np.int32)
    labelled = Labelled(word, ascii_uppercase.index(word[0].upper()), split)
    made.add(np.concatenate([making.bos, tokens_T]), position_P, labelled)


def _say_counts(made: Draft, n_words: int) -> None:
    """How many words of which letters: what is rare is named, here and in the task's note."""
    rare = [
        f"{letter} ({n})"
        for label, letter in enumerate(ascii_uppercase)
        if (n := made.count(TRAIN, label)) < _FEW_WORDS
    ]
    note = f"fewer than {_FEW_WORDS} training words: {', '.join(rare)}" if rare else ""
    made.tasks[0] = Task("first_letter", list(ascii_uppercase), None, note)
    made.lines.append(f"words     {made.n_items:,} of the {n_words:,} of the vocabulary")
    if rare:
        made.lines.append(f"letters   with fewer than {_FEW_WORDS} training words: {few(rare, 26)}")
