"""The token corpus of a store: text -> documents -> tokens -> contexts, permuted once, globally.

Two steps. Tokenising goes into a cache in `<folder>.building`, batch by batch, and a killed run
goes on from its last batch. Assembling packs the cached documents, permutes the contexts and writes
the Zarr arrays (storage/corpus.py); it is short, and is done again after a crash. The folder itself
appears whole, by one rename.

The permutation is of contexts and over the whole corpus, so that every later slice of it is a fair
sample of the text.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..storage.corpus import Corpus
from ..storage.corpus_writer import complete, create_groups, write_split
from ..storage.counter import permutation, stream_key
from ..storage.disk import link_tree
from ..storage.errors import InputError, SaePipeError, StoreError
from ..storage.files import canonical_json, disk_error, fsync_folder
from ..storage.lock import sole_writer
from .dedup import get_dedup
from .packing import ContextRules, FlatFiles, Packer, Split
from .progress import progress
from .sources import TextSource
from .token_cache import TokenCache, has_documents
from .tokens import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What the corpus is to hold. train_rows None: all the text."""

    context_size: int
    pack: bool = True
    dedup: str = "exact"
    seed: int = 0
    train_rows: int | None
    heldout_rows: int
    keep_first: bool = False


def corpus_recipe(
    config: CorpusConfig, source: TextSource, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Everything that the corpus is a function of, as JSON."""
    return {
        "config": asdict(config),
        "source": source.identity,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "prepends_bos": tokenizer.prepends_bos,
        },
    }


def work_folder(folder: Path) -> Path:
    """Where a corpus is built before it is put to its place."""
    return folder.with_name(f"{folder.name}.building")


def build_corpus(
    folder: Path,
    config: CorpusConfig,
    source: TextSource,
    tokenizer: TextTokenizer,
    *,
    show_progress: bool,
) -> Corpus:
    """Build the corpus in `folder`, go on with one that was begun, or return the one that is there.

    The bytes are the same however often it was interrupted.
    """
    rules = _checked_rules(config, tokenizer)
    recipe = corpus_recipe(config, source, tokenizer)
    work = work_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        corpus = _existing(folder, recipe)
        shutil.rmtree(work, ignore_errors=True)  # a crash right after the rename leaves it
        return corpus
    with sole_writer(work, "Corpus"):
        try:
            with TokenCache(work, source, tokenizer, config.dedup) as cache:
                builder = _Builder(config, rules, source, cache)
                with progress(_rows_wanted(config), "tokenise", "rows", show=show_progress) as bar:
                    split = builder.tokenise(bar)
                new = builder.assemble(work, split.heldout_probability, recipe)
        except SaePipeError:
            if not has_documents(work):
                shutil.rmtree(work)
            raise
        put_in_place(new, folder)
        shutil.rmtree(work)
    return Corpus(folder)


def put_in_place(new: Path, folder: Path) -> None:
    """Make a finished corpus appear, by one rename."""
    try:
        os.replace(new, folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise disk_error(error, folder) from error


def take_corpus(source: Path, folder: Path, recipe: dict[str, Any], whose: object) -> None:
    """Share a finished corpus with another store, whole and of this recipe, or leave nothing.

    whose: the store that it belongs to, for messages. Raises StoreError when it became another one
    since it was chosen, DiskError.
    """

    def check(taken: Path) -> None:
        try:
            corpus = Corpus(taken)
            corpus.verify()
            is_same = corpus.info["recipe"] == recipe
        except StoreError:
            is_same = False
        if not is_same:
            raise StoreError(
                f"The tokens of {whose} became others while they were taken: it is being extended or "
                "repaired. Run the same command again."
            )

    link_tree(source, folder, check)


def _checked_rules(config: CorpusConfig, tokenizer: TextTokenizer) -> ContextRules:
    get_dedup(config.dedup)
    if config.train_rows is not None and config.train_rows < 1:
        raise InputError(
            f"{config.train_rows} training rows were asked for. Pass --tokens with 1 or more."
        )
    if config.heldout_rows < 0:
        raise InputError(
            f"{config.heldout_rows} held-out rows were asked for. "
            "Pass --heldout-tokens with 0 or more."
        )
    return ContextRules.of(
        tokenizer,
        context_size=config.context_size,
        pack=config.pack,
        keep_first=config.keep_first,
    )


def _rows_wanted(config: CorpusConfig) -> int | None:
    return None if config.train_rows is None else config.train_rows + config.heldout_rows


def _existing(folder: Path, recipe: dict[str, Any]) -> Corpus:
    corpus = Corpus(folder)
    there = corpus.info["recipe"]
    if canonical_json(there) == canonical_json(recipe):
        return corpus
    old, new = dict(_flat(there)), dict(_flat(recipe))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    differences = "; ".join(
        f"{name} is {old.get(name)!r} there and {new.get(name)!r} here" for name in names[:5]
    )
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    raise InputError(
        f"Corpus {folder} was built from another recipe: {differences}{more}. "
        "Pass another folder, or what it was built with."
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested JSON with dotted names."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield name, value
    for key, inner in items:
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def heldout_probability(train_rows: int | None, heldout_rows: int) -> float:
    """The share of documents that is dealt to the held-out side.

    A quarter more than the share of rows: then the held-out side is nearly always the first that is
    full, and costs a few surplus documents, where an equal chance would mean reading on through
    text that fills only the training side. For all the text (None), where the share is not known
    beforehand, 1 %.
    """
    if heldout_rows == 0:
        return 0.0
    if train_rows is None:
        return 0.01
    share = heldout_rows / (heldout_rows + train_rows)
    return min(1.25 * share, (1 + share) / 2)


class _Builder:
    def __init__(
        self, config: CorpusConfig, rules: ContextRules, source: TextSource, cache: TokenCache
    ) -> None:
        self._config, self._rules, self._source, self._cache = config, rules, source, cache

    def tokenise(self, bar: Any) -> Split:
        """Fill the cache until both sides have their rows; InputError when the text is too short."""
        config = self._config
        split = self._split(config, heldout_probability(config.train_rows, config.heldout_rows))
        for batch in self._cache.batches():
            split.add(batch)
            rows = split.train.rows + split.heldout.rows
            documents = split.train.documents + split.heldout.documents
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            bar.update(rows - bar.n)
            if split.is_full:
                return split
        # The text has ended.
        split = self._with_heldout(config, split)
        self._check(split)
        return split

    def _split(self, config: CorpusConfig, probability: float) -> Split:
        return Split(
            self._rules,
            seed=config.seed,
            train_rows=config.train_rows,
            heldout_rows=config.heldout_rows,
            heldout_probability=probability,
        )

    def _dealt(self, config: CorpusConfig, probability: float) -> Split:
        """All that is cached, dealt anew: tokenising is the cost, and that is done."""
        split = self._split(config, probability)
        for batch in self._cache.cached_batches():
            split.add(batch)
            if split.is_full:
                break
        return split

    def _with_heldout(self, config: CorpusConfig, split: Split) -> Split:
        """A short text may leave the held-out side without a row: then its share is doubled."""
        probability = split.heldout_probability
        while config.heldout_rows > 0 and split.heldout.rows == 0 and probability < 0.5:
            probability = min(2 * probability, 0.5)
            split = self._dealt(config, probability)
        return split

    def _check(self, split: Split) -> None:
        """One sentence for each way in which a text can be too short."""
        config, name = self._config, self._source.name
        left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(split.left_out.items()))
        documents = split.train.documents + split.heldout.documents
        if documents == 0 and split.train.too_short == 0:
            raise InputError(
                f"Dataset {name!r} holds no text: {split.records} records"
                f"{f', of which left out: {left_out}' if left_out else ''}. "
                "Pass another --dataset, --text-column or --filter."
            )
        tokens = split.train.tokens + split.heldout.tokens
        size = f"{documents} documents with {tokens} tokens"
        if split.train.rows == 0:
            raise InputError(
                f"Dataset {name!r} is too short: its {size} give no training row in contexts of "
                f"{config.context_size} tokens. Pass more text, a smaller --context-size or "
                "--heldout-tokens 0."
            )
        if config.heldout_rows > 0 and split.heldout.rows == 0:
            raise InputError(
                f"Dataset {name!r} is too short to hold out a part: its {size} give no held-out "
                f"row in contexts of {config.context_size} tokens. Pass more text, a smaller "
                "--context-size or --heldout-tokens 0."
            )
        if config.train_rows is not None and not split.train.is_full:
            raise InputError(
                f"Dataset {name!r} holds {split.train.rows} training rows, but {config.train_rows} "
                f"were asked for. Pass --tokens {self._affordable(split)} or less (the tokens are "
                "kept, so that this will be quick), or more text."
            )

    def _affordable(self, split: Split) -> int:
        """A number of training rows that the cached text does give, next to the held-out ones.

        Fewer training rows mean a larger held-out share, so it is tried and not calculated.
        """
        rows = split.train.rows
        while rows > 1:
            # Three digits: easy to type, and room for another held-out share.
            unit = int(10 ** max(0, len(str(rows)) - 3))
            rows = max(1, int(rows * 0.99) // unit * unit)
            config = replace(self._config, train_rows=rows)
            probability = heldout_probability(rows, config.heldout_rows)
            tried = self._with_heldout(config, self._dealt(config, probability))
            if tried.train.is_full:
                return rows
            rows = min(rows - 1, tried.train.rows)
        return 1

    def assemble(self, work: Path, probability: float, recipe: dict[str, Any]) -> Path:
        """Pack the cached documents and write the corpus to a folder inside `work`."""
        new = work / "corpus"
        shutil.rmtree(new, ignore_errors=True)
        split = self._split(self._config, probability)
        train, heldout = (FlatFiles(work, name, self._rules) for name in ("train", "heldout"))
        try:
            with train, heldout:
                for batch in self._cache.cached_batches():
                    split.add(batch, train_to=train, heldout_to=heldout)
                    if split.is_full:
                        break
            create_groups(new)
            for name, packer, flat in (
                ("train", split.train, train),
                ("heldout", split.heldout, heldout),
            ):
                self._write_split(new, name, packer, flat)
        except OSError as error:
            raise disk_error(error, work) from error
        complete(new, {"recipe": recipe, **_counts(split)})
        return new

    def _write_split(self, new: Path, name: str, packer: Packer, flat: FlatFiles) -> None:
        order = permutation(stream_key(self._config.seed, "contexts", name), packer.contexts)
        size = self._config.context_size
        write_split(
            new, name, packer.contexts, size, lambda start, stop: flat.gather(order[start:stop])
        )


def _counts(split: Split) -> dict[str, Any]:
    sides = {"train": split.train, "heldout": split.heldout}
    return {
        "documents": {
            "records_read": split.records,
            "left_out": dict(sorted(split.left_out.items())),
            "surplus": {name: side.surplus for name, side in sides.items()},
            "too_short": {name: side.too_short for name, side in sides.items()},
        },
        "heldout_probability": split.heldout_probability,
        "splits": {
            name: {
                "contexts": side.contexts,
                "rows": side.rows,
                "documents": side.documents,
                "tokens": side.tokens,
                "dropped_tokens": side.dropped_tokens,
            }
            for name, side in sides.items()
        },
    }
