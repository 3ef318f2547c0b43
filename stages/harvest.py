"""Stage one: a language model over text, its activations into shuffled stores.

text -> token corpus (contexts, permuted once) -> blocks of contexts -> masked forward pass -> rows
permuted inside the block -> shards. One pass over the corpus serves every layer; each mask ratio
has a pass of its own over the same contexts. The same command goes on with what it began.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..storage import open_store, provenance
from ..storage.builder import StoreBuilder, is_begun
from ..storage.corpus import Corpus
from ..storage.errors import InputError
from ..storage.files import is_leftover, remove_leftovers
from ..storage.info import sealed_shards
from ..storage.layout import choose_layout
from ..storage.lock import sole_writer
from ..storage.manifest import COMPLETE, MANIFEST, TOKENISING
from ..storage.shuffle import verdict
from ..storage.values import Floats
from .corpus import build_corpus, take_corpus, work_folder
from .harvest_catalogue import Catalogue, Found
from .harvest_config import (
    HarvestConfig,
    Target,
    check_request,
    check_same,
    request_of,
    targets,
)
from .harvest_extend import extend
from .harvest_job import HarvestJob
from .harvest_passes import (
    Builders,
    RowMaps,
    check_batch_contexts,
    crew_of,
    job_of,
    row_maps,
    run_and_finish,
)
from .harvest_plan import make_plan
from .harvest_run import Crew
from .plan import Plan

Say = Callable[[str], None]
Planned = Callable[[Plan], object]


def harvest(
    config: HarvestConfig,
    *,
    say: Say = print,
    show_progress: bool = True,
    dry_run: bool = False,
    planned: Planned = lambda plan: None,
    found: Found = lambda target, entry: None,
) -> list[Path]:
    """Make the stores that `config` asks for, or go on with them; returns their paths.

    planned: told the plan of the stores that are not laid out yet, before it is checked; found: told
    of each store that is not begun, because the catalogue holds its recipe: its path is returned,
    but nothing is there. Raises InputError, StoreError, DiskError, NetworkError and NonFiniteError,
    each one sentence for the user. Whatever stops it, the same call goes on where it stopped, to the
    same bytes.
    """
    wanted = targets(config)
    if config.extend:
        extend(config, wanted, say, planned, show_progress=show_progress, dry_run=dry_run)
        return [target.path for target in wanted]
    with ExitStack() as locks:
        builders = _begun(config, wanted, locks)
        todo = []
        for target in wanted:
            if target in builders and builders[target].state == COMPLETE:
                store = open_store(target.path)  # a shard that has gone is found here
                Corpus(target.path / "corpus")  # and a file of the tokens here
                say(
                    f"{target.path} is complete: {store.n_rows:,} rows of this recipe. "
                    "Nothing to do."
                )
            else:
                todo.append(target)
        if todo:
            unfinished = {t: builders[t] for t in todo if t in builders}
            _harvest(config, todo, unfinished, locks, say, show_progress, dry_run, planned, found)
    return [target.path for target in wanted]


def _harvest(
    config: HarvestConfig,
    todo: list[Target],
    builders: Builders,
    locks: ExitStack,
    say: Say,
    show_progress: bool,
    dry_run: bool,
    planned: Planned,
    found: Found,
) -> None:
    laid_out = {target for target, builder in builders.items() if builder.state != TOKENISING}
    where = None if laid_out.issuperset(todo) else config.catalog
    catalogue = Catalogue.search(where, say)
    with ExitStack() as processes:  # workers end before the stores' locks are given up
        begun = {target.path: builder.manifest for target, builder in builders.items()}
        job, cluster = job_of(config, begun, catalogue, processes, say)
        for target, builder in builders.items():
            check_same(target.path, builder.manifest["recipe"], job.recipe(target))
        if not config.again:
            todo = [
                target
                for target in todo
                if target in builders or not catalogue.holds(target, job.recipe(target), say, found)
            ]
        if todo:
            crew = crew_of(job, todo, cluster, processes, say)
            _do(job, crew, todo, builders, locks, say, show_progress, dry_run, planned)


def _do(
    job: HarvestJob,
    crew: Crew,
    todo: list[Target],
    builders: Builders,
    locks: ExitStack,
    say: Say,
    show_progress: bool,
    dry_run: bool,
    planned: Planned,
) -> None:
    new = [t for t in todo if t not in builders or builders[t].state == TOKENISING]
    execution: dict[str, Any] = {}
    if new:
        plan, execution = make_plan(job, crew, new)
        planned(plan)
        for line in plan.lines():
            say(line)
        plan.check_disk()
    for target, builder in builders.items():
        say(f"{target.path} goes on: {sealed_shards(target.path, builder.manifest)}")
        check_batch_contexts(job, target.path, builder.manifest)
    if dry_run:
        return
    _begin(job, crew, todo, builders, locks)
    _add_corpus(job, builders, new, show_progress=show_progress, say=say)
    corpus = Corpus(next(iter(builders)).path / "corpus")
    maps = row_maps(job, corpus, dict.fromkeys(builders, ()))
    samples = _calibration(job, crew, new, maps, execution)
    for target in new:
        _lay_out(job, builders[target], maps[target], execution, samples.get(target))
    run_and_finish(crew, builders, maps, show_progress=show_progress)
    for target, builder in builders.items():
        train, heldout = builder.layouts()
        asked = job.corpus.heldout_rows
        fewer = f" ({asked:,} were asked for, but the text is short)"
        say(f"order     {verdict(builder.manifest['shuffle'])}")
        say(
            f"{target.path} is complete: {train.n_rows:,} training and {heldout.n_rows:,} held-out "
            f"rows{fewer if heldout.n_rows < asked else ''}."
        )


# --- stores: begun, given their tokens, laid out ---


def _begun(config: HarvestConfig, wanted: list[Target], locks: ExitStack) -> Builders:
    """The stores that an earlier run has begun with the same flags, locked."""
    builders: Builders = {}
    for target in wanted:
        if not is_begun(target.path):
            _check_free_place(target.path)
            continue
        builder = StoreBuilder.resume(target.path)
        if builder.state != COMPLETE:
            locks.enter_context(sole_writer(target.path, "Store"))
            builder = StoreBuilder.resume(target.path)  # as it is now that nobody else writes
            remove_leftovers(target.path, deep=True)
        if "request" not in builder.manifest:
            raise InputError(
                f"Store {target.path} was not made by a harvest, so it cannot be gone on with. "
                "Pass another --out."
            )
        check_request(target.path, builder.manifest, request_of(config, target))
        builders[target] = builder
    return builders


def _check_free_place(path: Path) -> None:
    """InputError when something that is not ours stands where the store shall be."""
    ours = {".lock", "corpus.building", "tokenizer.json"}
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        if all(name in ours or is_leftover(name) for name in names):
            return
    if path.exists():
        raise InputError(
            f"{path} exists and is not an activation store. Pass another --out, or move it away."
        )


def _begin(
    job: HarvestJob, crew: Crew, todo: list[Target], builders: Builders, locks: ExitStack
) -> None:
    """Write the manifests of new stores, and note this run in all of them."""
    this_run = provenance.this_run(crew.about())
    for target in todo:
        if target not in builders:
            locks.enter_context(sole_writer(target.path, "Store"))
            remove_leftovers(target.path, deep=False)
            if is_begun(target.path):
                raise InputError(
                    f"Store {target.path} was begun by another process just now. "
                    "Run the same command again to see whether it is the same recipe."
                )
            # Before the manifest: a store that is begun has all that it will not be given again.
            job.tokenizer.save(target.path / "tokenizer.json")
            request, recipe = request_of(job.config, target), job.recipe(target)
            builders[target] = StoreBuilder.begin(
                target.path, request, recipe, job.config.codec, job.config.store_dtype
            )
        builders[target].record_run(this_run)


def _add_corpus(
    job: HarvestJob, builders: Builders, new: list[Target], *, show_progress: bool, say: Say
) -> None:
    """Give every store the token corpus: built once, shared with the stores beside it and with those
    of the catalogue."""
    without = [target for target in builders if not (target.path / "corpus").is_dir()]
    for target in builders.keys() - without:
        # A kill right after the corpus was put to its place leaves what it was made from.
        shutil.rmtree(work_folder(target.path / "corpus"), ignore_errors=True)
    if not without:
        return
    existing, whose = job.corpus_at, None
    if job.lent is not None:
        whose = job.lent.place
        say(f"tokens    those of {whose}, which has the same text")
        existing = job.lent.bring()
    elif existing is None:
        assert job.source is not None
        first = without.pop(0)
        try:
            build_corpus(
                first.path / "corpus",
                job.corpus,
                job.source,
                job.tokenizer,
                show_progress=show_progress,
            )
        except InputError:
            # The text is not enough for these flags: the next command has other ones, and finds
            # the tokens that are done but no store of another recipe.
            for target in new:
                (target.path / MANIFEST).unlink(missing_ok=True)
                (target.path / "tokenizer.json").unlink(missing_ok=True)
            raise
        existing = first.path / "corpus"
        say(_about_text(Corpus(existing)))
    else:
        say(f"tokens    those of {existing.parent}, which has the same text")
    for target in without:
        whose = existing.parent if whose is None else whose
        take_corpus(existing, target.path / "corpus", job.corpus_recipe, whose)
        shutil.rmtree(work_folder(target.path / "corpus"), ignore_errors=True)


def _about_text(corpus: Corpus) -> str:
    """What became of the records of the text, by reason: nothing is left out silently."""
    documents = corpus.info["documents"]
    used = sum(split["documents"] for split in corpus.info["splits"].values())
    reasons = dict(documents["left_out"])
    reasons["too short for a row"] = sum(documents["too_short"].values())
    # Those that came when both splits were full, looked at or not.
    reasons["more than needed"] = documents["records_read"] - used - sum(reasons.values())
    left_out = ", ".join(f"{n:,} {why}" for why, n in sorted(reasons.items()) if n)
    return (
        f"text      {used:,} documents used of {documents['records_read']:,} records read; "
        f"left out: {left_out or 'none'}"
    )


def _lay_out(
    job: HarvestJob,
    builder: StoreBuilder,
    maps: RowMaps,
    execution: dict[str, Any],
    sample_RD: Floats | None,
) -> None:
    """Fix the sizes, now that it is known how many rows the text gives."""
    n_rows, n_heldout = (rows.available_rows for rows in maps)
    if job.config.tokens is not None:
        n_rows = min(n_rows, job.config.tokens)
    elif job.corpus.train_rows is not None:
        n_rows = min(n_rows, job.corpus.train_rows)
    d_in, codec = job.info.d_model, job.config.stored_as
    builder.lay_out(
        job.config.layout(n_rows, d_in),
        choose_layout(
            n_rows=min(n_heldout, job.corpus.heldout_rows),
            d_in=d_in,
            block_bytes=0,
            chunk_rows=codec.chunk_rows(d_in),
        ),
        execution,
        sample_RD,
    )


def _calibration(
    job: HarvestJob,
    crew: Crew,
    new: list[Target],
    maps: dict[Target, RowMaps],
    execution: dict[str, Any],
) -> dict[Target, Floats]:
    """The first rows of each new store, for codecs that are fitted to them: (R, D) by store."""
    samples: dict[Target, Floats] = {}
    if not job.config.stored_as.is_lossy:
        return samples
    for p in dict.fromkeys(target.mask_p for target in new):
        members = [target for target in new if target.mask_p == p]
        by_layer = crew.first_rows(
            maps[members[0]][0],
            tuple(sorted({target.layer for target in members})),
            int(execution["batch_contexts"]),
            job.config.stored_as.values,
        )
        samples |= {target: by_layer[target.layer] for target in members}
    return samples
