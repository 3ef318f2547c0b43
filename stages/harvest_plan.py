"""The plan of a harvest: a short measured warm-up on its own text, and what follows from it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage.corpus import Corpus
from ..storage.disk import free_bytes, human_bytes
from ..storage.errors import InputError
from ..storage.layout import Layout
from .harvest_config import Target
from .harvest_job import HarvestJob, estimated_tokens
from .harvest_run import Crew, Host
from .plan import Plan

_MEMORY_SHARE = 0.7  # of a machine's memory, for blocks
_SAMPLE_CONTEXTS = 64


def make_plan(job: HarvestJob, crew: Crew, new: list[Target]) -> tuple[Plan, dict[str, Any]]:
    """What the new stores will take, and how their rows will be computed (for their manifests)."""
    batch_contexts = job.config.batch_contexts
    if batch_contexts is None:
        batch_contexts = crew.batch_contexts(job.corpus.context_size)
    rows = job.config.tokens or job.corpus.train_rows or _rows_of_text(job)
    layout = job.config.layout(rows, job.info.d_model)
    plan = _plan(job, crew, new, batch_contexts, layout, job.corpus.heldout_rows)
    execution = {
        "device": str(job.device),
        "batch_contexts": batch_contexts,
        "tokens_per_s": plan.rates.tokens_per_s,
    }
    return plan, execution


def make_extension_plan(
    job: HarvestJob, crew: Crew, todo: list[Target], batch_contexts: int, there: Layout
) -> Plan:
    """What more rows will take. there: the smallest of the layouts that the stores have."""
    assert job.config.tokens is not None
    layout = replace(there, n_rows=job.config.tokens)
    return _plan(job, crew, todo, batch_contexts, layout, 0, rows_before=there.n_rows)


def _plan(
    job: HarvestJob,
    crew: Crew,
    todo: list[Target],
    batch_contexts: int,
    layout: Layout,
    heldout_rows: int,
    rows_before: int = 0,
) -> Plan:
    rates = crew.rates(_sample(job, min(batch_contexts, _SAMPLE_CONTEXTS)))
    hosts = crew.hosts()
    n_workers = sum(host.workers for host in hosts)
    layers = {target.layer for target in todo}
    value_bytes = job.config.stored_as.values.bytes
    block_bytes = layout.block_rows * layout.d_in * value_bytes * len(layers)
    block_seconds = layout.block_rows / rates.tokens_per_s
    on_disk = crew.keeps_notes and block_seconds > job.config.note_every_s
    _check_memory(2 * block_bytes, len(layers), hosts)
    return Plan(
        n_stores=len(todo),
        n_passes=len({target.mask_p for target in todo}),
        rows=layout.n_rows - rows_before,
        heldout_rows=heldout_rows,
        d_in=job.info.d_model,
        context_size=job.corpus.context_size,
        layout=layout,
        rates=rates,
        n_workers=n_workers,
        memory_bytes=2 * block_bytes * n_workers,
        work_bytes=2 * block_bytes if on_disk else 0,
        free_bytes=free_bytes(todo[0].path.absolute()),
        folder=todo[0].path.absolute().parent,
        rows_before=rows_before,
    )


def _check_memory(of_worker: int, n_layers: int, hosts: Sequence[Host]) -> None:
    """InputError, with the flag that would make it fit, when the blocks need too much memory.

    of_worker: bytes of the blocks that one process holds.
    """
    for host in hosts:
        needed, room = of_worker * host.workers, host.memory_bytes * _MEMORY_SHARE
        if needed > room:
            several = f" in each of {host.workers} worker processes" if host.workers > 1 else ""
            raise InputError(
                f"Two blocks for each of {n_layers} layers{several} need {human_bytes(needed)} of "
                f"memory, and {host.name} has {human_bytes(host.memory_bytes)}. Pass --block-gb "
                f"{room / (2 * n_layers * host.workers) / 1e9:.2g} or less, or fewer --layer at "
                f"once{' or fewer workers' if several else ''}."
            )


def _rows_of_text(job: HarvestJob) -> int:
    assert job.source is not None
    return max(estimated_tokens(job.source) or 0, 1)


def _sample(job: HarvestJob, contexts: int) -> NDArray[np.uint32]:
    """The first contexts of the text, repeated if the text is shorter: (contexts, context_size)."""
    size = job.corpus.context_size
    corpus = job.lent.corpus if job.lent is not None else None
    if job.corpus_at is not None:
        corpus = Corpus(job.corpus_at)
    if corpus is not None:
        table = corpus.train
        tokens = table.tokens(0, min(contexts, table.n_contexts)).reshape(-1)
    else:
        tokens = _first_tokens(job, contexts * size)
    return np.resize(tokens, (contexts, size))


def _first_tokens(job: HarvestJob, count: int) -> NDArray[np.uint32]:
    assert job.source is not None
    parts: list[NDArray[np.uint32]] = []
    problems: dict[str, int] = {}
    found = 0
    for record in job.source.records():
        if record.text is None:
            problems[str(record.problem)] = problems.get(str(record.problem), 0) + 1
            continue
        # A book would be tokenised whole for the sake of its first pages.
        parts += job.tokenizer.encode([record.text[: count * 16]])
        found += len(parts[-1])
        if found >= count:
            break
    if found == 0:
        counted = ", ".join(f"{n} {problem}" for problem, n in sorted(problems.items()))
        raise InputError(
            f"Dataset {job.source.name!r} holds no usable text: of {sum(problems.values())} "
            f"records, {counted or 'none was read'}. Pass another --dataset."
        )
    return np.concatenate(parts)[:count]
