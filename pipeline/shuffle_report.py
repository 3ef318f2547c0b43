"""What `sae-pipe store verify --shuffle` prints: each measure beside what it should be."""

from typing import Any

from ..storage.address import Place
from ..storage.shuffle import Shuffle, verdict


def report(path: Place, measured: Shuffle) -> list[tuple[str, str]]:
    """Names and values; docs/numbers.md, "Shuffle", defines them."""
    spearman, batches = measured["spearman"], measured["batches"]
    pairs = [
        ("store", str(path)),
        ("rows", _rows(measured)),
        ("Spearman", f"of stored order and text {_with_error(spearman, 'text', 'standard_error')}"),
        (
            "",
            f"of reader's order and text {_with_error(spearman, 'reader', 'reader_standard_error')}",
        ),
        ("chi-square", "for a degree of freedom; 1 when rows are permuted one by one"),
    ]
    pairs += [("", _table(name, table)) for name, table in measured["chi_square"].items()]
    if not measured["chi_square"]:
        pairs.append(("", "too few contexts to tell"))
    if (runs := measured["runs"]) is not None:
        pairs += [
            ("stored runs", f"{runs['count']:,} of {runs['rows']:,} rows"),
            ("  contexts", _met(runs, "permuted in blocks")),
        ]
    order = (
        f"{batches['count']:,} of {batches['batch_size']:,} rows, in the reader's order of seed 0"
    )
    pairs.append(("batches", order))
    for name in ("contexts", "documents"):
        group = batches[name]
        pairs.append((f"  {name}", _met(group, "uniform") if group else _UNKNOWN))
    return [*pairs, ("verdict", verdict(measured))]


_UNKNOWN = "no tokens: documents are unknown"


def _rows(measured: Shuffle) -> str:
    once = measured["exactly_once"]
    said = [f"{once['repeated']:,} repeated"]
    if once["missing"] is not None:
        said.append(f"{once['missing']:,} missing")
    said.append(f"{once['foreign']:,} that should not be there")
    unknown = "" if once["missing"] is not None else " (missing ones cannot be told)"
    return f"{measured['rows_read']:,} of {measured['rows']:,} read: {', '.join(said)}{unknown}"


def _with_error(found: dict[str, Any], value: str, error: str) -> str:
    if found[value] is None or found[error] is None:
        return "-"
    return f"{found[value]:.4f} ± {found[error]:.4f}"


def _table(name: str, table: dict[str, Any]) -> str:
    parts = {"stored_ranges": "stored ranges", "shards": "shards"}[name]
    return (
        f"{table['source_ranges']} source ranges x {table['parts']} {parts}: "
        f"{table['per_dof']:.4g}; {table['expected']:.4g} expected of contexts that stay in their "
        f"blocks, standard error {table['standard_error_uniform']:.2g} to "
        f"{table['standard_error_at_most']:.2g}"
    )


def _met(group: dict[str, Any], kind: str) -> str:
    if group["met"] is None:
        return "too few rows to tell"
    text = f"{group['met']:.4g}"
    if group["standard_error"] is not None:
        text += f" ± {group['standard_error']:.2g}"
    text += f" met a row; {kind} {group['expected']:.4g}"
    if group["expected"]:
        text += f", ratio {group['met'] / group['expected']:.3f}"
    if group["standard_error"]:
        text += f", z {(group['met'] - group['expected']) / group['standard_error']:.1f}"
    if group.get("predicted") is not None:
        text += f"; predicted for these blocks {group['predicted']:.4g}"
    return text
