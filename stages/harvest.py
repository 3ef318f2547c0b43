"""Stage one: a language model over text, its activations into shuffled stores.

text -> token corpus (contexts, permuted once) -> blocks of contexts -> masked forward pass -> rows
permuted inside the block -> shards. One pass over the corpus serves every layer; each mask ratio
has a pass of its own over the same contexts. The same command goes on with what it began.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..storage import ActivationStore, open_store, provenance
from ..storage.builder import StoreBuilder, is_begun
from ..storage.corpus import Corpus
from ..storage.disk import link_tree
from ..storage.errors import InputError
from ..storage.files import is_leftover, json_digest, remove_leftovers
from ..storage.info import sealed_shards
from ..storage.layout import choose_layout
from ..storage.lock import sole_writer
from ..storage.manifest import COMPLETE, MANIFEST, TOKENISING
from ..storage.shuffle import HARVEST_ROWS, Shuffle, measure_shuffle, verdict
from ..storage.values import Floats
from ..storage.writer import SplitWriter
from .block_buffer import FOLDER as BLOCK_FOLDER
from .cluster import Cluster, join_cluster, local_cluster
from .corpus import build_corpus, work_folder
from .devices import pick_device
from .harvest_catalogue import Catalogue, Found
from .harvest_config import HarvestConfig, Target, check_same, request_of, targets
from .harvest_job import HarvestJob, resolve
from .harvest_plan import make_plan
from .harvest_run import Crew, OneProcess, Pass, encode_threads
from .harvest_workers import ManyWorkers
from .plan import Plan
from .progress import progress
from .row_map import KeepRule, RowMap

Say = Callable[[str], None]
Planned = Callable[[Plan], object]
Builders = dict[Target, StoreBuilder]
RowMaps = tuple[RowMap, RowMap]  # training rows, held-out rows


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
        job, crew, todo = _job_and_crew(config, todo, builders, catalogue, processes, say, found)
        if crew is not None:
            _do(job, crew, todo, builders, locks, say, show_progress, dry_run, planned)


def _job_and_crew(
    config: HarvestConfig,
    todo: list[Target],
    builders: Builders,
    catalogue: Catalogue,
    processes: ExitStack,
    say: Say,
    found: Found,
) -> tuple[HarvestJob, Crew | None, list[Target]]:
    """What is to be done, checked against what was begun, who does it, and what of it is left: what
    the catalogue does not hold."""
    cluster: Cluster | None = None
    if config.scheduler is not None:  # the device is the workers': none need be here
        cluster = processes.enter_context(join_cluster(config.scheduler, config.device, say))
    device = cluster.device if cluster is not None else pick_device(config.device)
    begun = {target.path: builder.manifest for target, builder in builders.items()}
    job = resolve(config, begun, device, catalogue)
    for target, builder in builders.items():
        check_same(target.path, builder.manifest["recipe"], job.recipe(target))
    if not config.again:
        todo = [
            target
            for target in todo
            if target in builders or not catalogue.holds(target, job.recipe(target), say, found)
        ]
    if not todo:
        return job, None, todo
    layers = tuple(sorted({target.layer for target in todo}))
    if config.workers is not None and config.workers > 1:
        cluster = processes.enter_context(local_cluster(config.workers, config.device, say))
    if cluster is None:
        return job, OneProcess(job, layers), todo
    return job, ManyWorkers(job, layers, cluster, say), todo


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
        _check_batch_contexts(job, target, builder)
    if dry_run:
        return
    _begin(job, crew, todo, builders, locks)
    _add_corpus(job, builders, new, show_progress=show_progress, say=say)
    maps = _row_maps(job, builders)
    samples = _calibration(job, crew, new, maps, execution)
    for target in new:
        _lay_out(job, builders[target], maps[target], execution, samples.get(target))
    _run(crew, builders, maps, show_progress=show_progress)
    for target, builder in builders.items():
        train, heldout = builder.layouts()
        asked = job.corpus.heldout_rows
        fewer = f" ({asked:,} were asked for, but the text is short)"
        say(f"order     {verdict(builder.manifest['shuffle'])}")
        say(
            f"{target.path} is complete: {train.n_rows:,} training and {heldout.n_rows:,} held-out "
            f"rows{fewer if heldout.n_rows < asked else ''}."
        )


def _check_batch_contexts(job: HarvestJob, target: Target, builder: StoreBuilder) -> None:
    """Another batch size may sum in another order, so a begun store keeps its own."""
    asked = job.config.batch_contexts
    begun = builder.manifest.get("execution", {}).get("batch_contexts", asked)
    if asked is not None and asked != begun:
        check_same(target.path, {"batch_contexts": begun}, {"batch_contexts": asked})


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
        check_same(target.path, builder.manifest["request"], request_of(config, target))
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
    this_run = {
        "started": provenance.now(),
        "hardware": provenance.hardware(),
        **crew.about(),
        "versions": provenance.versions(),
    }
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
    existing = job.corpus_at
    if job.lent is not None:
        say(f"tokens    those of {job.lent.place}, which has the same text")
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
        link_tree(existing, target.path / "corpus")
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


def _row_maps(job: HarvestJob, builders: Builders) -> dict[Target, RowMaps]:
    """Training and held-out rows of every store."""
    rule = KeepRule(
        keep_first=job.config.keep_first,
        bos_id=job.tokenizer.bos_id,
        drop_masked=job.config.drop_masked,
    )
    unmasked, seed = replace(rule, drop_masked=False), job.config.seed
    # One recipe, one content: any of the corpora stands for all, and is counted once.
    corpus = Corpus(next(iter(builders)).path / "corpus")
    heldout = RowMap(corpus.heldout, unmasked, job.mask(0.0), shuffle_seed=None)
    maps: dict[Target, RowMaps] = {}
    by_ratio: dict[float, RowMap] = {}
    for target in builders:
        p = target.mask_p
        if p not in by_ratio:
            other = next(iter(by_ratio.values()), None)
            by_ratio[p] = RowMap(
                corpus.train, rule, job.mask(p), shuffle_seed=seed, counted_by=other
            )
        maps[target] = by_ratio[p], heldout
    return maps


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


# --- the run ---


def _run(
    crew: Crew, builders: Builders, maps: dict[Target, RowMaps], *, show_progress: bool
) -> None:
    with ThreadPoolExecutor(encode_threads(), thread_name_prefix="encode") as pool:
        writers = {target: builder.writers(pool) for target, builder in builders.items()}
        passes = _passes(builders, maps, writers)
        total = sum(job_pass.layout.n_rows for job_pass in passes)
        execution = next(iter(builders.values())).manifest["execution"]
        with progress(total, "harvest", "rows", show=show_progress) as bar:
            bar.initial = bar.n = sum(job_pass.rows_done() for job_pass in passes)
            bar.refresh()
            crew.run(passes, execution["tokens_per_s"], bar)
        measure = _ShuffleMeasure()
        for target, builder in builders.items():
            builder.finish(*writers[target], measure)
            shutil.rmtree(target.path / BLOCK_FOLDER, ignore_errors=True)


class _ShuffleMeasure:
    """`measure_shuffle` of finished stores; those of several layers have the same rows."""

    def __init__(self) -> None:
        self._measured: dict[str, Shuffle] = {}

    def __call__(self, store: ActivationStore) -> Shuffle:
        entry = store.manifest["train"]
        files = [shard["files"]["source"]["sha256"] for shard in entry["shards"]]
        same = json_digest([store.manifest["corpus"], entry["layout"], files])
        if same not in self._measured:
            self._measured[same] = measure_shuffle(store, max_rows=HARVEST_ROWS)
        return self._measured[same]


def _passes(
    builders: Builders,
    maps: dict[Target, RowMaps],
    writers: dict[Target, tuple[SplitWriter, SplitWriter]],
) -> list[Pass]:
    """Held-out rows once for all mask ratios, then one pass for each ratio; stores of another
    layout (begun by another command) have passes of their own."""
    heldout: dict[Any, Pass] = {}
    training: dict[Any, Pass] = {}
    for target, builder in builders.items():
        labels = f"train-p{target.mask_p}", "heldout"
        contexts = int(builder.manifest["execution"]["batch_contexts"])
        for group, label, rows, layout, writer in zip(
            (training, heldout),
            labels,
            maps[target],
            builder.layouts(),
            writers[target],
            strict=True,
        ):
            key = (label, layout, contexts)
            if key not in group:
                group[key] = Pass(
                    label=label,
                    rows=rows,
                    layout=layout,
                    batch_contexts=contexts,
                    values=writer.codec.values,
                    writers={},
                )
            group[key].writers.setdefault(target.layer, []).append(writer)
    return [*heldout.values(), *training.values()]
