"""More tokens for stores that are complete: `sae-pipe harvest --tokens N --extend`.

The rows that are there stay where they are, bit for bit, and so do their numbers: rows are counted
through the contexts of the corpus, which gets its new contexts at the end. All that is new is made
in a folder of the store and put to its place when it is complete (`storage/extension.py`), so that
the store can be read, and the same command gone on with, at any time.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage import ActivationStore, open_store, provenance
from ..storage.builder import is_begun
from ..storage.corpus import Corpus
from ..storage.errors import InputError
from ..storage.extending_writer import check_can_be_filled_up
from ..storage.extension import (
    ExtensionBuilder,
    extension_begun,
    is_being_switched,
    remove_staging,
    staging_of,
    switch,
)
from ..storage.files import check_no_links, remove_leftovers
from ..storage.layout import Layout
from ..storage.lock import sole_writer
from ..storage.manifest import COMPLETE, began_by, read_manifest_of_any_state
from ..storage.shuffle import verdict
from ..storage.verify import is_harvested
from .corpus import take_corpus
from .corpus_extend import TextEnded, corpus_of, extend_corpus, extended_recipe
from .harvest_catalogue import Catalogue
from .harvest_config import HarvestConfig, Target, check_same, request_of
from .harvest_job import HarvestJob, corpus_beside, corpus_rows, reopen_text
from .harvest_passes import check_batch_contexts, crew_of, job_of, row_maps, run_and_finish
from .harvest_plan import make_extension_plan
from .harvest_run import Crew
from .plan import Plan

Say = Callable[[str], None]
# Of a recipe: what an extension changes.
_GROWS = ("rows", "extended_at")
_SMALL_SHARDS = 8  # times smaller than those of a new store


@dataclass(frozen=True)
class _Growing:
    """A store that is to grow, and its extension if that was begun."""

    store: ActivationStore
    begun: ExtensionBuilder | None

    @property
    def recipe(self) -> dict[str, Any]:
        return self.store.recipe

    def cuts(self) -> tuple[int, ...]:
        """Numbers of rows at which the store will have been extended."""
        return (*self.recipe.get("extended_at", ()), self.store.n_rows)


def extend(
    config: HarvestConfig,
    wanted: list[Target],
    say: Say,
    planned: Callable[[Plan], object],
    *,
    show_progress: bool,
    dry_run: bool,
) -> None:
    """Give every store `config.tokens` training rows. Raises and goes on as `harvest` does."""
    with ExitStack() as locks:
        growing: dict[Target, _Growing] = {}
        for target in wanted:
            found = _look(config, target, locks, say, dry_run=dry_run)
            if found is not None:
                growing[target] = found
        if not growing:
            return
        _check_one_corpus(growing)

        with ExitStack() as processes:  # workers end before the stores' locks are given up
            begun = {target.path: each.store.manifest for target, each in growing.items()}
            job, cluster = job_of(config, begun, Catalogue(), processes, say)
            for target, each in growing.items():
                check_same(target.path, _lasting(each.recipe), _lasting(job.recipe(target)))
            crew = crew_of(job, list(growing), cluster, processes, say)
            _Extend(job, crew, growing, say, show_progress=show_progress).run(
                planned, dry_run=dry_run
            )


def _lasting(recipe: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name not in _GROWS}


# --- what is there ---


def _look(
    config: HarvestConfig, target: Target, locks: ExitStack, say: Say, *, dry_run: bool
) -> _Growing | None:
    """The store of a target if it has to grow; InputError or StoreError if it cannot."""
    path, tokens = target.path, config.tokens
    assert tokens is not None
    if not is_begun(path):
        raise InputError(
            f"There is no store at {path} that could be extended. Leave out --extend to harvest one."
        )
    locks.enter_context(sole_writer(path, "Store"))
    check_no_links(path)
    remove_leftovers(path, deep=True)
    if is_being_switched(path):
        switch(path)
    manifest = read_manifest_of_any_state(path)
    if manifest.get("state") != COMPLETE:
        raise InputError(
            f"Store {path} is not finished: its state is {manifest.get('state')!r}. Run the "
            f"`sae-pipe {began_by(manifest)}` command that began it once more, and extend it then."
        )
    _check_kind(path, manifest)
    asked = request_of(config, target)
    check_same(path, manifest["request"] | {"tokens": tokens}, asked)
    store = open_store(path)  # a shard that has gone is found here
    Corpus(path / "corpus")  # and a file of the tokens here
    begun = extension_begun(path)
    if begun is not None:
        _check_same_size(path, begun, tokens)
        if begun.state == COMPLETE:
            switch(path)
            store, begun = open_store(path), None
        elif corpus_of(begun.path / "corpus", begun.manifest["recipe"]["corpus"]) is None:
            remove_staging(path)  # nothing can be made of it without its tokens
            begun = None
    if tokens in (store.n_rows, store.manifest["request"]["tokens"]):
        say(f"{path} is complete: {store.n_rows:,} rows of this recipe. Nothing to do.")
        if not dry_run:
            remove_staging(path)
        return None
    if tokens < store.n_rows:
        raise InputError(
            f"Store {path} has {store.n_rows:,} training rows, and --tokens is {tokens:,}: a store is "
            "never made smaller. Pass a larger number, or fit from a part of it."
        )
    return _Growing(store, begun)


def _check_kind(path: Path, manifest: dict[str, Any]) -> None:
    """InputError for what has no recipe that could be gone on with."""
    if "sampled" in manifest.get("provenance", {}):
        raise InputError(
            f"Store {path} is a part of another store, and cannot be extended. Pull more of that one, "
            "or all of it."
        )
    if "request" not in manifest or not is_harvested(manifest):
        raise InputError(
            f"Store {path} was not harvested by sae-pipe, or was recoded with loss since, so no rows "
            "can be added to it. Harvest a store, and extend that."
        )


def _check_same_size(path: Path, begun: ExtensionBuilder, tokens: int) -> None:
    there = begun.manifest["request"]["tokens"]
    if there != tokens:
        raise InputError(
            f"The extension of {path} to {there:,} rows was begun and is not finished, and --tokens is "
            f"{tokens:,}. Pass --tokens {there} to finish it first, or remove {staging_of(path)} to "
            "give it up."
        )


def _check_one_corpus(growing: dict[Target, _Growing]) -> None:
    """Stores that are extended together have the same tokens, before and after."""
    first, *others = growing.items()
    for target, each in others:
        digests = [grown.store.manifest["corpus"]["digest"] for grown in (first[1], each)]
        if digests[0] != digests[1]:
            raise InputError(
                f"Stores {first[0].path} and {target.path} have different tokens, so that one pass "
                "cannot extend both. Extend them one after the other."
            )


# --- the work ---


class _Extend:
    """Stores with the same tokens that grow together; the caller holds their locks."""

    def __init__(
        self,
        job: HarvestJob,
        crew: Crew,
        growing: dict[Target, _Growing],
        say: Say,
        *,
        show_progress: bool,
    ) -> None:
        self._job, self._crew, self._growing, self._say = job, crew, growing, say
        self._show = show_progress
        config = job.config
        assert config.tokens is not None
        self._tokens = config.tokens
        self._there = next(iter(growing.values())).store.corpus
        self._train_rows = corpus_rows(config, job.corpus.context_size, self._tokens)
        self._corpus_recipe = extended_recipe(self._there, self._train_rows)

    def run(self, planned: Callable[[Plan], object], *, dry_run: bool) -> None:
        new = [target for target, each in self._growing.items() if each.begun is None]
        for target, each in self._growing.items():
            check_batch_contexts(self._job, target.path, each.store.manifest)
            check_can_be_filled_up(each.store.train_reader, each.store.codec, target.path)
        if new:
            plan = self._plan(new)
            planned(plan)
            for line in plan.lines():
                self._say(line)
            self._say_if_shards_are_small(plan.layout)
            plan.check_disk()
        for target, each in self._growing.items():
            if each.begun is not None:
                self._say(f"{target.path} goes on being extended: {each.begun.progress()}")
        if dry_run:
            return
        corpus = self._corpora()
        cuts = {target: each.cuts() for target, each in self._growing.items()}
        maps = row_maps(self._job, corpus, cuts)
        builders = {
            target: each.begun or self._begin(target, each, maps[target][0].available_rows)
            for target, each in self._growing.items()
        }
        this_run = provenance.this_run(self._crew.about())
        for builder in builders.values():
            builder.record_run(this_run)
        run_and_finish(self._crew, dict(builders), maps, show_progress=self._show)
        for target, builder in builders.items():
            added = builder.layouts()[0].n_rows - self._growing[target].store.n_rows
            self._say(f"order     {verdict(builder.manifest['shuffle'])}")
            self._say(
                f"{target.path} is complete: {builder.layouts()[0].n_rows:,} training rows, of which "
                f"{added:,} are new."
            )

    def _plan(self, new: list[Target]) -> Plan:
        stores = [self._growing[target].store for target in new]
        smallest = min(stores, key=lambda store: store.n_rows)
        contexts = int(smallest.manifest["execution"]["batch_contexts"])
        layout = smallest.train_reader.layout
        return make_extension_plan(self._job, self._crew, new, contexts, layout)

    def _say_if_shards_are_small(self, layout: Layout) -> None:
        """Rows are stored where they are, so a store that was small keeps its many small files."""
        fresh = self._job.config.layout(layout.n_rows, layout.d_in).shard_rows
        if fresh >= _SMALL_SHARDS * layout.shard_rows:
            self._say(
                f"shards    keep their {layout.shard_rows:,} rows; those of a new store of this size "
                f"would have {fresh:,}, and be {fresh // layout.shard_rows} times fewer files"
            )

    def _corpora(self) -> Corpus:
        """Have the longer corpus in the extension of every store: made once, shared by links."""
        folders = [staging_of(target.path) / "corpus" for target in self._growing]
        there = [folder for folder in folders if corpus_of(folder, self._corpus_recipe)]
        source = there[0] if there else self._source(folders[0])
        for folder in folders:
            if folder != source and folder not in there:
                remove_staging(folder.parent.parent)
                folder.parent.mkdir()
                take_corpus(source, folder, self._corpus_recipe, source.parent)
        return Corpus(folders[0])

    def _source(self, folder: Path) -> Path:
        """The corpus to be shared; made in `folder` if there is none."""
        if self._corpus_recipe == self._there.info["recipe"]:
            return self._there.path  # its last context has rows to spare
        beside = corpus_beside(self._job.config, self._corpus_recipe)
        if beside is not None:
            self._say(f"tokens    those of {beside.parent}, which has the same text")
            return beside
        self._make_corpus(folder)
        return folder

    def _make_corpus(self, folder: Path) -> None:
        store = next(iter(self._growing.values())).store
        text = reopen_text(self._job.config, store.path, store.recipe)
        try:
            corpus = extend_corpus(
                folder,
                self._there,
                self._train_rows,
                text,
                self._job.tokenizer,
                show_progress=self._show,
            )
        except TextEnded as error:
            raise self._too_short(error, store) from error
        contexts = corpus.train.n_contexts - self._there.train.n_contexts
        self._say(f"text      {contexts:,} contexts more, behind {self._there.train.n_contexts:,}")

    def _too_short(self, error: TextEnded, store: ActivationStore) -> InputError:
        """What the text gives at most, in the words of --tokens."""
        context_size = self._job.corpus.context_size
        fitting, too_many = store.n_rows, self._tokens
        while too_many - fitting > 1:
            tried = (fitting + too_many) // 2
            if corpus_rows(self._job.config, context_size, tried) <= error.rows:
                fitting = tried
            else:
                too_many = tried
        unchanged = f"Store {store.path} is as it was"
        if fitting == store.n_rows:
            return InputError(
                f"Dataset {error.name!r} holds no text for more than the {store.n_rows:,} training "
                f"rows that are there. {unchanged}."
            )
        return InputError(
            f"Dataset {error.name!r} has text for {fitting:,} training rows, those that are there "
            f"included, and {self._tokens:,} were asked for. {unchanged}. Pass --tokens {fitting} or "
            "less (the tokens are kept, so that this will be quick)."
        )

    def _begin(self, target: Target, each: _Growing, available: int) -> ExtensionBuilder:
        n_rows = min(available, self._tokens)
        recipe = each.recipe | {
            "rows": self._tokens,
            "corpus": self._corpus_recipe,
            "extended_at": list(each.cuts()),
        }
        request = request_of(self._job.config, target)
        return ExtensionBuilder.begin_extension(each.store, request, recipe, n_rows)
