"""What a harvest and an extension have in common: who runs the model, which rows, in which passes."""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..storage import ActivationStore
from ..storage.builder import StoreBuilder
from ..storage.corpus import Corpus
from ..storage.files import json_digest
from ..storage.manifest import Manifest
from ..storage.shuffle import HARVEST_ROWS, Shuffle, measure_shuffle
from ..storage.writer import SplitWriter
from .block_buffer import FOLDER as BLOCK_FOLDER
from .cluster import Cluster, Say, join_cluster, local_cluster
from .devices import pick_device
from .harvest_catalogue import Catalogue
from .harvest_config import HarvestConfig, Target, check_same
from .harvest_job import HarvestJob, resolve
from .harvest_run import Crew, OneProcess, Pass, encode_threads
from .harvest_workers import ManyWorkers
from .progress import progress
from .row_map import KeepRule, RowMap

Builders = dict[Target, StoreBuilder]
RowMaps = tuple[RowMap, RowMap]  # training rows, held-out rows


def job_of(
    config: HarvestConfig,
    begun: dict[Path, Manifest],
    catalogue: Catalogue,
    processes: ExitStack,
    say: Say,
) -> tuple[HarvestJob, Cluster | None]:
    """What is to be done, and the cluster that is to do it, if one was asked for.

    begun: manifests of what is there, by path.
    """
    cluster: Cluster | None = None
    if config.scheduler is not None:  # the device is the workers': none need be here
        cluster = processes.enter_context(join_cluster(config.scheduler, config.device, say))
    device = cluster.device if cluster is not None else pick_device(config.device)
    return resolve(config, begun, device, catalogue), cluster


def crew_of(
    job: HarvestJob, todo: list[Target], cluster: Cluster | None, processes: ExitStack, say: Say
) -> Crew:
    """Who does it."""
    config, layers = job.config, tuple(sorted({target.layer for target in todo}))
    if config.workers is not None and config.workers > 1:
        cluster = processes.enter_context(local_cluster(config.workers, config.device, say))
    if cluster is None:
        return OneProcess(job, layers)
    return ManyWorkers(job, layers, cluster, say)


def check_batch_contexts(job: HarvestJob, path: Path, manifest: Manifest) -> None:
    """Another batch size may sum in another order, so a begun store keeps its own."""
    asked = job.config.batch_contexts
    begun = manifest.get("execution", {}).get("batch_contexts", asked)
    if asked is not None and asked != begun:
        check_same(path, {"batch_contexts": begun}, {"batch_contexts": asked})


def row_maps(
    job: HarvestJob, corpus: Corpus, cuts: Mapping[Target, tuple[int, ...]]
) -> dict[Target, RowMaps]:
    """Training and held-out rows of every store.

    corpus: any of theirs, since one recipe is one content: it is counted once. cuts: numbers of rows
    at which each was extended, now for the last time; none for stores that are new.
    """
    rule = KeepRule(
        keep_first=job.config.keep_first,
        bos_id=job.tokenizer.bos_id,
        drop_masked=job.config.drop_masked,
    )
    unmasked, seed = replace(rule, drop_masked=False), job.config.seed
    heldout = RowMap(corpus.heldout, unmasked, job.mask(0.0), shuffle_seed=None)
    maps: dict[Target, RowMaps] = {}
    made: dict[tuple[float, tuple[int, ...]], RowMap] = {}
    for target, cuts_of in cuts.items():
        kind = target.mask_p, cuts_of
        if kind not in made:
            made[kind] = RowMap(
                corpus.train,
                rule,
                job.mask(target.mask_p),
                shuffle_seed=seed,
                counted_by=next(iter(made.values()), None),
                cuts=cuts_of,
                first_row=cuts_of[-1] if cuts_of else 0,
            )
        maps[target] = made[kind], heldout
    return maps


def run_and_finish(
    crew: Crew, builders: Builders, maps: dict[Target, RowMaps], *, show_progress: bool
) -> None:
    """Make every row that is missing, and complete the stores."""
    with ThreadPoolExecutor(encode_threads(), thread_name_prefix="encode") as pool:
        writers = {target: builder.writers(pool) for target, builder in builders.items()}
        passes = _passes(builders, maps, writers)
        total = sum(job_pass.n_rows for job_pass in passes)
        execution = next(iter(builders.values())).manifest["execution"]
        with progress(total, "harvest", "rows", show=show_progress) as bar:
            bar.initial = bar.n = sum(job_pass.rows_done() for job_pass in passes)
            bar.refresh()
            crew.run(passes, execution["tokens_per_s"], bar)
        measure = _ShuffleMeasure()
        for target, builder in builders.items():
            builder.finish(*writers[target], measure)
            shutil.rmtree(builder.path / BLOCK_FOLDER, ignore_errors=True)


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
            key = (label, layout, contexts, rows.cuts)
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
