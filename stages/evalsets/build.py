"""Building an evaluation set: texts become tokens, those go through the model once, rows to disk.

Everything that can be wrong is found before anything is written. The same call goes on with what
it began, to the same bytes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...storage import open_store, provenance
from ...storage.disk import check_room, human_bytes
from ...storage.errors import InputError
from ...storage.evalset import COMPLETE, MANIFEST, EvalSet, open_evalset, read_manifest
from ...storage.evalset_writer import CHUNK_ROWS, EvalSetWriter, Origin
from ...storage.files import is_leftover
from ...storage.lock import sole_writer
from ..devices import pick_device, pick_dtype
from ..harvest_config import check_same
from ..hooks import HookedModel
from ..models import check_layer, inspect_model, load_truncated
from ..progress import progress
from ..tokens import TextTokenizer
from .base import Draft, Making
from .config import EvalSetConfig
from .core import serves_itself
from .forward import batch_tokens, rows_from

Say = Callable[[str], object]

# A chunk of rows is committed at once: where a row takes many tokens, chunks have fewer.
_CHUNK_TOKENS, _LEAST_CHUNK_ROWS = 1 << 17, 16


def build(config: EvalSetConfig, *, say: Say = print, show_progress: bool = True) -> EvalSet | None:
    """Make the set that `config` asks for, or go on with it.

    None when a store's own held-out rows serve. Raises InputError, StoreError, DiskError,
    NetworkError and NonFiniteError, each one sentence for the user.
    """
    begun = _begun(config)
    if begun is not None and begun["state"] == COMPLETE:
        evalset = open_evalset(config.out)
        say(f"{config.out} is complete: {evalset.n_items:,} items of this recipe. Nothing to do.")
        return evalset
    device = pick_device(config.device)
    info = inspect_model(config.model, _pinned_revision(config, begun))
    check_layer(info, (config.layer,), config.hook)
    tokenizer = TextTokenizer.load(info.source, info.commit)
    making = Making(config=config, info=info, tokenizer=tokenizer, show_progress=show_progress)
    if config.store is not None and serves_itself(store := open_store(config.store), making):
        say(
            f"Store {config.store} has {store.heldout.n_rows:,} held-out rows of this model, layer "
            "and hook point: nothing has to be built. Pass the store itself to `sae-pipe eval` as "
            "--store."
        )
        return None
    dtype = pick_dtype(config.dtype, device)
    draft: Draft = config.kind.draft(making)
    _say_plan(draft, making, say)
    if begun is None:
        check_room(config.out, _n_rows(draft) * info.d_model * 4)
    model = load_truncated(info, (config.layer,), config.hook, device, dtype)
    with sole_writer(config.out, "Evaluation set"):
        evalset = _write(making, draft, model, begun)
    say(
        f"{config.out} is complete: {evalset.n_items:,} items, {evalset.n_rows:,} rows of "
        f"{evalset.d_in}."
    )
    return evalset


def _write(
    making: Making, draft: Draft, model: HookedModel, begun: Mapping[str, Any] | None
) -> EvalSet:
    """The set on disk. begun: its manifest when this run came to it, None for a new one."""
    out = making.config.out
    if begun is None and (out / MANIFEST).is_file():
        raise InputError(
            f"Evaluation set {out} was begun by another process just now. Run the same command "
            "again to see whether it is the same recipe."
        )
    execution = _execution(model, draft, begun)
    origin = Origin(
        recipe=_recipe(making, draft, model.dtype),
        tokenizer_json=making.tokenizer.json,
        request=making.config.request(),
        dropped=_sorted(draft.dropped),
        truncated=_sorted(draft.truncated),
        execution=execution,
    )
    writer = EvalSetWriter(
        out, origin, draft.contents(), d_in=model.d_model, chunk_rows=_chunk_rows(draft)
    )
    this_run = {
        "started": provenance.now(),
        "hardware": provenance.hardware(),
        "device": _device_name(model.device),
        "versions": provenance.versions(),
    }
    writer.record_run(this_run)
    _fill(writer, model, draft, execution["batch_tokens"], show_progress=making.show_progress)
    return writer.finish()


def _begun(config: EvalSetConfig) -> dict[str, Any] | None:
    """The manifest of what an earlier run has begun here with the same flags."""
    path = config.out
    if not (path / MANIFEST).is_file():
        if path.is_dir() and all(e.name == ".lock" or is_leftover(e.name) for e in path.iterdir()):
            return None
        if path.exists():
            raise InputError(
                f"{path} exists and is not an evaluation set. Pass another --out, or move it away."
            )
        return None
    manifest = read_manifest(path)
    if manifest["state"] != COMPLETE:
        with sole_writer(path, "Evaluation set"):  # said now, not after minutes of tokenising
            manifest = read_manifest(path)
    check_same(path, manifest["request"], config.request(), "Evaluation set")
    return manifest


def _pinned_revision(config: EvalSetConfig, begun: Mapping[str, Any] | None) -> str | None:
    """A branch may have moved since a set was begun; the commit that it was is kept."""
    if begun is None or str(begun["recipe"]["model"]["revision"]).startswith("sha256:"):
        return config.revision
    return str(begun["recipe"]["model"]["revision"])


def _recipe(making: Making, draft: Draft, dtype: torch.dtype) -> dict[str, Any]:
    """What decides about the rows: this is hashed and compared."""
    config, info, tokenizer = making.config, making.info, making.tokenizer
    is_folder = info.commit is None
    options = ("limit", "tasks", "text_column", "label_column", "group_column", "marked_column")
    return {
        "model": {
            "name": Path(info.source).name if is_folder else info.source,
            "revision": info.revision,
            "architecture": info.architecture,
        },
        "hook": config.hook,
        "layer": config.layer,
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "bos_id": tokenizer.bos_id,
            "prepends_bos": tokenizer.prepends_bos,
        },
        "context_size": draft.context_size or making.context_size,
        "suite": draft.suite,
        "pooling": draft.pooling,
        "seed": making.seed,
        "options": {
            name: list(value) if isinstance(value, tuple) else value
            for name in options
            if (value := getattr(config, name))
        },
        "data": draft.data,
    }


def _execution(model: HookedModel, draft: Draft, begun: Mapping[str, Any] | None) -> dict[str, Any]:
    """Another batch size may sum in another order, so a begun set keeps its own."""
    if begun is not None:
        return dict(begun["execution"])
    longest = max(len(tokens_T) for tokens_T in draft.contexts)
    return {"device": model.device.type, "batch_tokens": batch_tokens(model, longest)}


def _fill(
    writer: EvalSetWriter, model: HookedModel, draft: Draft, n_tokens: int, *, show_progress: bool
) -> None:
    """Write every chunk that is missing."""
    if writer.next_chunk == writer.n_chunks:
        return
    first_row, last_row = writer.rows_of_chunk(writer.next_chunk)
    positions = draft.positions()
    lengths_C = np.array([len(tokens_T) for tokens_T in draft.contexts])
    end_C = np.cumsum([len(positions_P) for positions_P in positions])
    todo = int(lengths_C[end_C > first_row].sum())
    pending: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    n_pending = 0
    with progress(todo, "model", "tokens", show=show_progress) as bar:
        for rows_RD in rows_from(
            model,
            draft.contexts,
            positions,
            first_row=first_row,
            n_tokens=n_tokens,
            advance=bar.update,
        ):
            pending.append(rows_RD)
            n_pending += len(rows_RD)
            while writer.next_chunk < writer.n_chunks:
                first_row, last_row = writer.rows_of_chunk(writer.next_chunk)
                size = last_row - first_row
                if n_pending < size:
                    break
                together = np.concatenate(pending)
                writer.write(together[:size])
                pending, n_pending = [together[size:]], n_pending - size


def _chunk_rows(draft: Draft) -> int:
    """CHUNK_ROWS, halved until a chunk's rows take no more than _CHUNK_TOKENS tokens to compute."""
    n_tokens = sum(len(tokens_T) for tokens_T in draft.contexts)
    size = CHUNK_ROWS
    while size > _LEAST_CHUNK_ROWS and size * n_tokens > _CHUNK_TOKENS * _n_rows(draft):
        size //= 2
    return size


def _n_rows(draft: Draft) -> int:
    return sum(len(positions_P) for positions_P in draft.positions())


def _say_plan(draft: Draft, making: Making, say: Say) -> None:
    n_tokens = sum(len(tokens_T) for tokens_T in draft.contexts)
    n_bytes = _n_rows(draft) * making.info.d_model * 4
    tasks = f"{len(draft.tasks)} task{'s' * (len(draft.tasks) != 1)}, " if draft.tasks else ""
    say(
        f"items     {tasks}{draft.n_items:,} items, {_n_rows(draft):,} rows, {n_tokens:,} tokens, "
        f"{human_bytes(n_bytes)}"
    )
    for line in draft.lines:
        say(line)
    for what, counts in (("left out", draft.dropped), ("cut", draft.truncated)):
        for reason, n in sorted(by_reason(counts).items()):
            say(f"{what.ljust(9)} {reason}: {n}")
    for task in draft.tasks:
        if task.note and len(draft.tasks) > 1:
            say(f"note      {task.name}: {task.note}")


def by_reason(counts: Mapping[str, int]) -> dict[str, str]:
    """Counts of "task: reason" by reason, with the tasks that have most."""
    reasons: dict[str, dict[str, int]] = {}
    for key, n in counts.items():
        task, _, reason = key.partition(": ")
        if n:
            reasons.setdefault(reason or "longer than a context", {})[task] = n
    return {
        reason: f"{sum(tasks.values()):,} in {_most(tasks)}" for reason, tasks in reasons.items()
    }


def _most(tasks: Mapping[str, int]) -> str:
    ordered = sorted(tasks, key=lambda task: (-tasks[task], task))
    if len(ordered) == 1:
        return ordered[0]
    most = ", ".join(f"{task} {tasks[task]:,}" for task in ordered[:3])
    return f"{len(ordered)} tasks ({'most in ' if len(ordered) > 3 else ''}{most})"


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {key: n for key, n in sorted(counts.items()) if n}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
