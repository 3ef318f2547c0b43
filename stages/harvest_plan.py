"""The plan of a harvest: a short measured warm-up on its own text, and what follows from it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage import provenance
from ..storage.corpus import Corpus
from ..storage.errors import InputError
from ..storage.layout import choose_layout
from .backoff import find_batch_size
from .harvest_config import Target
from .harvest_job import HarvestJob, estimated_tokens
from .hooks import HookedModel
from .plan import Plan, free_bytes, human_bytes, measure

_MEMORY_SHARE = 0.7  # of the machine's memory, for blocks
_SAMPLE_CONTEXTS = 64


def make_plan(
    job: HarvestJob, model: HookedModel, new: list[Target]
) -> tuple[Plan, dict[str, Any]]:
    """What the new stores will take, and how their rows will be computed (for their manifests)."""
    batch_contexts = job.config.batch_contexts
    if batch_contexts is None:
        batch_contexts = find_batch_size(model, job.corpus.context_size)
    sample = _sample(job, min(batch_contexts, _SAMPLE_CONTEXTS))
    rates = measure(model, sample, job.config)
    layers = {target.layer for target in new}
    rows = job.config.tokens or job.corpus.train_rows or _rows_of_text(job)
    layout = choose_layout(
        n_rows=rows,
        d_in=job.info.d_model,
        block_bytes=job.config.block_bytes,
        shard_rows=job.config.shard_rows,
    )
    block_bytes = layout.block_rows * layout.d_in * 2 * len(layers)
    block_seconds = layout.block_rows / rates.tokens_per_s
    on_disk = block_seconds > job.config.note_every_s
    _check_memory(2 * block_bytes, len(layers))
    plan = Plan(
        n_stores=len(new),
        n_passes=len({target.mask_p for target in new}),
        rows=rows,
        heldout_rows=job.corpus.heldout_rows,
        d_in=job.info.d_model,
        context_size=job.corpus.context_size,
        layout=layout,
        rates=rates,
        memory_bytes=2 * block_bytes,
        work_bytes=2 * block_bytes if on_disk else 0,
        free_bytes=free_bytes(new[0].path.absolute()),
        folder=new[0].path.absolute().parent,
    )
    execution = {
        "device": str(job.device),
        "batch_contexts": batch_contexts,
        "tokens_per_s": rates.tokens_per_s,
    }
    return plan, execution


def _check_memory(needed: int, n_layers: int) -> None:
    """InputError, with the flag that would make it fit, when the blocks need too much memory."""
    room = provenance.memory_bytes() * _MEMORY_SHARE
    if needed > room:
        raise InputError(
            f"Two blocks for each of {n_layers} layers need {human_bytes(needed)} of memory, and "
            f"this machine has {human_bytes(provenance.memory_bytes())}. Pass --block-gb "
            f"{room / (2 * n_layers) / 1e9:.2g} or less, or fewer --layer at once."
        )


def _rows_of_text(job: HarvestJob) -> int:
    assert job.source is not None
    return max(estimated_tokens(job.source) or 0, 1)


def _sample(job: HarvestJob, contexts: int) -> NDArray[np.uint32]:
    """The first contexts of the text, repeated if the text is shorter: (contexts, context_size)."""
    size = job.corpus.context_size
    if job.corpus_at is not None:
        table = Corpus(job.corpus_at).train
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
