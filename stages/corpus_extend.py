"""More contexts behind those of a token corpus, from the text behind what it was made of.

The contexts that are there keep their numbers, and the held-out ones are taken over as they are. The
records behind the last one that gave a training context are tokenised, dealt to a side by the same
draw, packed, and permuted among themselves; those before are read again only so that duplicates of
them are found. As in `corpus.py`, tokens go into a cache beside the folder, and the folder appears
whole.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage.corpus import Corpus, TokenTable
from ..storage.corpus_writer import complete, create_groups, write_split
from ..storage.counter import permutation, stream_key
from ..storage.disk import link_tree
from ..storage.errors import InputError, StoreError
from ..storage.files import disk_error
from ..storage.lock import sole_writer
from .corpus import put_in_place, work_folder
from .packing import ContextRules, FlatFiles, Split
from .progress import progress
from .sources import TextSource
from .token_cache import TokenCache
from .tokens import TextTokenizer

Recipe = dict[str, Any]


def extended_recipe(there: Corpus, train_rows: int) -> Recipe:
    """The recipe of a corpus with at least so many training rows; its own if it has them."""
    recipe = dict(there.info["recipe"])
    if there.train.n_rows < train_rows:
        step = {"contexts": there.train.n_contexts, "train_rows": train_rows}
        recipe["extensions"] = [*recipe.get("extensions", []), step]
    return recipe


def corpus_of(folder: Path, recipe: Recipe) -> Corpus | None:
    """The corpus in a folder, if it is whole and of this recipe."""
    try:
        corpus = Corpus(folder)
    except StoreError:
        return None
    return corpus if corpus.info["recipe"] == recipe else None


def extend_corpus(
    folder: Path,
    there: Corpus,
    train_rows: int,
    source: TextSource,
    tokenizer: TextTokenizer,
    *,
    show_progress: bool,
) -> Corpus:
    """Make in `folder` the corpus `there` with at least train_rows training rows, more than it has.

    Goes on with what was begun, to the same bytes. Raises `TextEnded` when the text is too short;
    its tokens are kept.
    """
    recipe = extended_recipe(there, train_rows)
    work = work_folder(folder)
    found = corpus_of(folder, recipe)
    if found is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(work, "Corpus"):
            job = _Extension(there, train_rows, recipe, source, tokenizer)
            put_in_place(job.run(work, show_progress=show_progress), folder)
        found = Corpus(folder)
    shutil.rmtree(work, ignore_errors=True)
    return found


class TextEnded(InputError):
    """The text holds fewer rows than are wanted. rows: that all of it gives, those before included."""

    def __init__(self, rows: int, name: str) -> None:
        super().__init__(f"Dataset {name!r} holds {rows:,} training rows.")
        self.rows, self.name = rows, name


@dataclass(frozen=True)
class _Extension:
    there: Corpus
    train_rows: int
    recipe: Recipe
    source: TextSource
    tokenizer: TextTokenizer

    def run(self, work: Path, *, show_progress: bool) -> Path:
        """Tokenise and assemble; returns the finished folder inside `work`."""
        first = _first_unused_record(self.there.train)
        dedup = self.recipe["config"]["dedup"]
        with TokenCache(work, self.source, self.tokenizer, dedup, first_record=first) as cache:
            split = self._tokenise(cache, show_progress=show_progress)
            return self._assemble(work, cache, split, first)

    def _tokenise(self, cache: TokenCache, *, show_progress: bool) -> Split:
        split = self._split()
        wanted = self.train_rows - self.there.train.n_rows
        with progress(wanted, "tokenise", "rows", show=show_progress) as bar:
            for batch in cache.batches():
                split.add(batch)
                bar.set_postfix_str(f"{split.train.documents:,} more documents", refresh=False)
                bar.update(split.train.rows - bar.n)
                if split.is_full:
                    return split
        raise TextEnded(self.there.train.n_rows + split.train.rows, self.source.name)

    @property
    def _rules(self) -> ContextRules:
        config = self.recipe["config"]
        return ContextRules.of(
            self.tokenizer,
            context_size=config["context_size"],
            pack=config["pack"],
            keep_first=config["keep_first"],
        )

    def _split(self) -> Split:
        """Documents that are drawn to be held out are so for good: they are counted as surplus."""
        return Split(
            self._rules,
            seed=self.recipe["config"]["seed"],
            train_rows=self.train_rows - self.there.train.n_rows,
            heldout_rows=0,
            heldout_probability=float(self.there.info["heldout_probability"]),
        )

    def _assemble(self, work: Path, cache: TokenCache, counted: Split, first: int) -> Path:
        new, info = work / "corpus", self.there.info
        shutil.rmtree(new, ignore_errors=True)
        split, flat = self._split(), FlatFiles(work, "train", self._rules)
        try:
            with flat:
                for batch in cache.cached_batches():
                    split.add(batch, train_to=flat)
                    if split.is_full:
                        break
            assert split.train.contexts == counted.train.contexts
            create_groups(new)
            shutil.rmtree(new / "heldout")
            link_tree(self.there.path / "heldout", new / "heldout")
            self._write_train(new, flat, split.train.contexts)
        except OSError as error:
            raise disk_error(error, work) from error
        before = {name: value for name, value in info.items() if name not in _WRITTEN}
        added = {
            "first_record": first,
            "records_read": split.records,
            "left_out": dict(sorted(split.left_out.items())),
            "surplus": split.heldout.surplus,
            "too_short": split.train.too_short,
        }
        counts = {
            "contexts": split.train.contexts,
            "rows": split.train.rows,
            "documents": split.train.documents,
            "tokens": split.train.tokens,
            "dropped_tokens": split.train.dropped_tokens,
        }
        train = {name: n + counts[name] for name, n in info["splits"]["train"].items()}
        complete(
            new,
            before
            | {
                "recipe": self.recipe,
                "splits": info["splits"] | {"train": train},
                "extensions": [*info.get("extensions", []), added],
            },
        )
        return new

    def _write_train(self, new: Path, flat: FlatFiles, n_added: int) -> None:
        """The contexts that are there, then the new ones, permuted among themselves."""
        there, size = self.there.train, self.there.train.context_size
        number = len(self.recipe["extensions"])
        key = stream_key(self.recipe["config"]["seed"], "contexts", "train", number)
        order = permutation(key, n_added)

        def contexts(start: int, stop: int) -> dict[str, NDArray[np.uint32]]:
            middle = min(max(start, there.n_contexts), stop)
            old = {
                "tokens": there.tokens(start, middle) if start < middle else _none(size),
                "document": there.documents(start, middle) if start < middle else _none(size),
                "length": there.lengths(start, middle) if start < middle else _none(),
                "origin": there.origins(start, middle) if start < middle else _none(),
            }
            added = flat.gather(order[middle - there.n_contexts : stop - there.n_contexts])
            added["origin"] = added["origin"] + np.uint32(there.n_contexts)
            return {name: np.concatenate([old[name], added[name]]) for name in old}

        write_split(new, "train", there.n_contexts + n_added, size, contexts, there=there)


_WRITTEN = ("format", "files", "digest")  # by `complete`


def _none(*width: int) -> NDArray[np.uint32]:
    return np.empty((0, *width), np.uint32)


def _first_unused_record(there: TokenTable) -> int:
    """Ordinal of the record behind the last one that a training context has a token of."""
    if there.n_contexts == 0:
        return 0
    origins_C = there.origins(0, there.n_contexts)
    last = int(np.argmax(origins_C))
    return int(there.documents(last, last + 1).max()) + 1
