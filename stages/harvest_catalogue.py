"""What a catalogue has already of what a harvest is asked for: a store of its recipe, or its tokens.

Only for finding: nothing is written there, and a catalogue that cannot be searched stops no harvest.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..storage import ActivationStore, StoreEntry, list_stores, open_store
from ..storage.address import Address, Place, place
from ..storage.corpus import Corpus
from ..storage.errors import SaePipeError, StoreError
from ..storage.files import json_digest
from ..storage.listing import corpus_key
from ..storage.manifest import COMPLETE, TOKENISING, read_manifest
from .harvest_config import Target

Say = Callable[[str], object]
Found = Callable[[Target, StoreEntry], object]
Recipe = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A token corpus that a harvest can take as it is.

    corpus: the corpus, whose files are fetched as they are read where it is not here; recipe: what
    it was made from; store: the store that it belongs to, open, where that is at an address.
    """

    corpus: Corpus
    recipe: Recipe
    store: ActivationStore | None = None

    @property
    def place(self) -> Place:
        """The store that it belongs to."""
        return self.corpus.path.parent if self.store is None else self.store.place

    def bring(self) -> Path:
        """The folder of the corpus, complete, its files on the disk and compared with their digests."""
        if self.store is not None:
            try:
                self.corpus.verify()
            except SaePipeError as error:
                raise StoreError(
                    f"The tokens of {self.place} cannot be taken from there: {error} Run the same "
                    "command again, or with --catalog '' to make them anew."
                ) from error
            for name in self.corpus.info["files"]:
                _sync(self.corpus.path / name)  # the cache does not, and a store relies on it
        return self.corpus.path


@dataclass(frozen=True)
class Catalogue:
    """The stores of a catalogue, as they were when the harvest began."""

    entries: list[StoreEntry] = field(default_factory=list)

    @classmethod
    def search(cls, where: Place | None, say: Say) -> "Catalogue":
        """List a catalogue; one that cannot be listed is told of, and has nothing."""
        if where is None:
            return cls()
        try:
            return cls(list_stores(where, warn=lambda line: None))
        except SaePipeError as error:
            say(f"catalogue {where} could not be searched, so the harvest goes on without: {error}")
            return cls()

    def holds(self, target: Target, recipe: Recipe, say: Say, found: Found) -> bool:
        """Whether there is a complete store of a recipe; `say` and `found` are told of it.

        One that is being made is told of, and does not count.
        """
        digest = json_digest(recipe)
        same = [e for e in self.entries if e.recipe == digest and not e.is_sampled]
        complete = next((entry for entry in same if entry.state == COMPLETE), None)
        if complete is not None:
            made = f", made {complete.made}" if complete.made else ""
            say(
                f"{complete.address} already holds this recipe{made}; fit from it, or pass --again."
            )
            found(target, complete)
            return True
        for entry in same:
            say(
                f"catalogue {entry.address} is being made from this recipe, begun {entry.made} "
                f"({entry.progress}). This harvest goes on beside it."
            )
        return False

    def tokens(
        self, config: Recipe, fingerprint: str, fits: Callable[[Recipe], bool]
    ) -> Tokens | None:
        """A corpus that was cut like this by this tokenizer, from a text that fits.

        config, fingerprint: see `corpus_key`; fits: told the recipe of a corpus. What is damaged or
        cannot be reached is passed over.
        """
        key = corpus_key(config, fingerprint)
        for entry in self.entries:
            if entry.corpus_key == key and entry.state != TOKENISING:
                try:
                    found = _tokens_of(place(entry.address), fits)
                except (SaePipeError, OSError, KeyError, TypeError, AttributeError):
                    continue  # damaged: not ours to judge here, and of no use
                if found is not None:
                    return found
        return None


def _tokens_of(where: Place, fits: Callable[[Recipe], bool]) -> Tokens | None:
    store = open_store(where) if isinstance(where, Address) else None
    manifest = read_manifest(where) if store is None else store.manifest
    if not fits(manifest["recipe"]["corpus"]):
        return None
    corpus = Corpus(f"{where}/corpus") if store is None else store.corpus
    recipe = corpus.info["recipe"]
    if corpus.digest != manifest["corpus"]["digest"] or not fits(recipe):
        return None
    return Tokens(corpus=corpus, recipe=recipe, store=store)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
