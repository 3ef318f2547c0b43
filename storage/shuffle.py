"""How well a store is shuffled, measured on its source indices: numbers, and what they fail.

Four measures, because each misses something: every row is there once; the order of the rows does
not follow the text (Spearman), nor do parts of it hold more of some ranges of the text than others
(chi-square); rows that follow one another in the store, or come in one batch of the reader, meet
no more rows of their own contexts and documents than they may. Only `source` and the tokens are
read, never an activation. docs/numbers.md has the definitions.
"""

# N batches

import math
from collections.abc import Callable
from typing import Any

from .errors import InputError
from .shuffle_order import ServedBatches, StoredOrder, predicted_met, shards_to_read
from .shuffle_statistics import Ints, pair_probability, rows_met
from .shuffle_tokens import Contexts, Tokens
from .store import ActivationStore

BATCH_ROWS = 4096
MIN_BATCHES = 32  # small stores are judged by smaller batches
HARVEST_ROWS = 20_000_000  # of the stored order that a harvest reads for its manifest

Shuffle = dict[str, Any]


def measure_shuffle(
    store: ActivationStore,
    *,
    batch_size: int | None = None,
    max_rows: int | None = None,
    advance: Callable[[int], object] = lambda positions: None,
) -> Shuffle:
    """Measure the training rows; the held-out ones are in text order by design.

    batch_size: rows of a batch, 4096 or fewer in a small store by default; max_rows: read whole
    shards of about so many rows in all, evenly spread, and do not look for missing rows; advance:
    called with the number of positions that were looked at, `positions_to_read` in all. Returns
    what the manifest holds as `shuffle`; its `failures` are sentences, none when all is well.
    Memory: a bit for each position, about 40 bytes a context, and a shard.

    Raises InputError when the store does not say how large its contexts are, and StoreError for
    damaged shards and tokens.
    """
    layout, n_rows = store._train.layout, store.n_rows
    default = min(BATCH_ROWS, max(n_rows // MIN_BATCHES, 1))
    batch = default if batch_size is None else batch_size
    if not 1 <= batch <= max(n_rows, 1):
        raise InputError(
            f"A batch of {batch} rows cannot be had of {n_rows}. Pass --batch-size from 1 to that."
        )
    contexts = Contexts.of(store)
    cuts = store.recipe.get("extended_at", ())
    stored = StoredOrder(layout, contexts, shards_to_read(layout, max_rows), batch, cuts)
    stored.read(store, advance)
    served = ServedBatches(store, contexts, batch)
    tokens = Tokens(store, contexts, stored.seen, served.source_NB, advance, is_full=stored.is_full)
    counts_C = stored.counts_C if tokens.rows_C is None else tokens.rows_C
    same_context = pair_probability(counts_C)
    measured: Shuffle = {
        "rows": n_rows,
        "rows_read": stored.n_rows,
        "exactly_once": {
            "repeated": stored.seen.repeated,
            "missing": tokens.missing,
            "foreign": stored.seen.outside + tokens.foreign,
        },
        "spearman": stored.correlations() | served.correlation(contexts),
        "chi_square": stored.tables(),
        "runs": stored.runs(same_context * max(n_rows - 1, 0)),
        "batches": {
            "seed": 0,
            "batch_size": batch,
            "count": len(served.source_NB),
            "contexts": _met(served.source_NB // contexts.size, same_context)
            | {"predicted": predicted_met(layout, same_context * max(n_rows - 1, 0), batch)},
            "documents": None
            if tokens.documents_NB is None
            else _met(tokens.documents_NB, tokens.same_document),
        },
    }
    measured = _rounded(measured)
    return measured | {"failures": failures(measured)}


def positions_to_read(store: ActivationStore) -> int:
    """What `advance` is called with in all when every row is read."""
    contexts = Contexts.of(store)
    return store.n_rows + (contexts.n * contexts.size if contexts.table else 0)


def _met(groups_NB: Ints, probability: float) -> dict[str, Any]:
    """Rows met from the same group in batches, and in those of a uniform permutation."""
    n, batch = groups_NB.shape
    met_N = rows_met(groups_NB)
    return {
        "met": met_N.mean() if n else math.nan,
        "expected": probability * (batch - 1),
        "standard_error": met_N.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan,
    }


# --- the verdict ---


# One in 3.5 million stores that are well shuffled is beyond five standard errors.
STANDARD_ERRORS = 5.0
# A correlation of less explains less than a ten-thousandth of the order, however certain it is.
SPEARMAN_TOLERATED = 0.01
# A run of stored rows may meet half as many rows again as in the blocks that the layout declares.
RUNS_TOLERATED = 1.5
# Blocks are not a uniform permutation: a batch meets about L * B / W more. Twice what is
# unavoidable is allowed, and in any case one row in a batch of 4096. Blocks of 2 GB add 0.13 at
# d_in 768 and 0.6 at d_in 3584 (500 million rows, contexts of 1024, by `predicted_met`); the mixing
# buffers of other tools add 1.8 to 331 (docs/architecture.md).
BATCHES_TOLERATED_RATIO = 2.0
BATCHES_TOLERATED_EXCESS = 1.0 / 4096


def failures(measured: Shuffle) -> list[str]:
    """What a store fails, each a clause of a sentence; none when it is well shuffled.

    What could not be measured (too small a store, no tokens) fails nothing.
    """
    return [
        *_rows_that_are_wrong(measured["exactly_once"]),
        *_order_that_follows(measured["spearman"]),
        *_parts_that_differ(measured["chi_square"]),
        *_runs_that_meet(measured["runs"]),
        *_batches_that_meet(measured["batches"]),
    ]


def verdict(measured: Shuffle) -> str:
    """One line: shuffled, with what a batch meets, or what it fails."""
    if measured["failures"]:
        return "not shuffled: " + "; ".join(measured["failures"])
    batches = measured["batches"]
    met = [
        f"{group['met']:.3g} of their {name[:-1]} ({group['expected']:.3g} in a uniform permutation)"
        for name in ("contexts", "documents")
        if (group := batches[name]) is not None and group["met"] is not None
    ]
    if not met:
        return "too few rows to tell"
    return f"shuffled: rows of a batch of {batches['batch_size']:,} meet {' and '.join(met)}"


def _rows_that_are_wrong(once: dict[str, Any]) -> list[str]:
    named = {
        "repeated": "rows that stand in it more than once",
        "missing": "rows that are missing",
        "foreign": "rows that should not be there",
    }
    return [f"{what}: {once[name]:,}" for name, what in named.items() if once[name]]


def _order_that_follows(found: dict[str, Any]) -> list[str]:
    clauses = []
    for name, error, whose in (
        ("text", "standard_error", "the stored order"),
        ("reader", "reader_standard_error", "the reader's order"),
    ):
        rho = found[name]
        if rho is None or found[error] is None:
            continue
        allowed = max(STANDARD_ERRORS * found[error], SPEARMAN_TOLERATED)
        if abs(rho) > allowed:
            clauses.append(
                f"{whose} follows the text (Spearman {rho:.3f}, at most {allowed:.3f} is chance)"
            )
    return clauses


def _parts_that_differ(tables: dict[str, Any]) -> list[str]:
    clauses = []
    for name, table in tables.items():
        allowed = table["expected"] + STANDARD_ERRORS * table["standard_error_at_most"]
        if table["per_dof"] > allowed:
            clauses.append(
                f"its {name.replace('_', ' ')} hold different parts of the text (chi-square "
                f"{table['per_dof']:.3g} a degree of freedom, at most {allowed:.3g} is chance)"
            )
    return clauses


def _runs_that_meet(runs: dict[str, Any] | None) -> list[str]:
    if runs is None:
        return []
    allowed = RUNS_TOLERATED * runs["expected"] + STANDARD_ERRORS * runs["standard_error"]
    if runs["met"] <= allowed:
        return []
    return [
        f"rows are not permuted inside blocks ({runs['rows']:,} stored rows meet "
        f"{runs['met']:.3g} of their own context each, at most {allowed:.3g} is allowed)"
    ]


def _batches_that_meet(batches: dict[str, Any]) -> list[str]:
    clauses, size = [], batches["batch_size"]
    for name in ("contexts", "documents"):
        group = batches[name]
        if group is None or group["standard_error"] is None:
            continue
        allowed = max(
            BATCHES_TOLERATED_RATIO * group["expected"],
            group["expected"] + BATCHES_TOLERATED_EXCESS * size,
        )
        if group["met"] > allowed + STANDARD_ERRORS * group["standard_error"]:
            clauses.append(
                f"rows of a batch of {size:,} meet {group['met']:.3g} of their own {name[:-1]} "
                f"each (at most {allowed:.3g} is allowed)"
            )
    return clauses


def _rounded(value: Any) -> Any:
    """Six digits, enough for any reader; what is not a number is null, as JSON has it."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
