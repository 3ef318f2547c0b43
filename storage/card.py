"""The card of a store: README.md, what it is, how it was made, licences, how to cite and read it.

A pure function of the manifest, without times and hardware: equal stores have equal cards. No digest
covers it. A line names the SHA-256 of the rest, so that a card that somebody has edited, or written
himself, is known for his and left alone. Whatever a manifest says is escaped.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import licences
from .files import write_whole
from .manifest import Manifest
from .shown import shown, shown_in_markdown

README = "README.md"
CARD_LIMIT_BYTES = 1 << 20
_LONGEST = 300  # characters of a name
_MARK = re.compile(r"<!-- sae-pipe card ([0-9a-f]{64}): [^\n]*-->\n\n")
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")

Pairs = Sequence[tuple[str, object]]


def card(manifest: Manifest, where: str = "acts.zarr") -> str:
    """The README.md of a complete store. where: what the examples open."""
    head = "\n".join([*_front_matter(manifest), ""])
    body = "\n\n".join(
        [
            _title(manifest),
            "## What it holds",
            _table(_content(manifest)),
            "## How it was made",
            _table(_making(manifest)),
            "manifest.json has all of it: the whole recipe, versions, and the digest of every file.",
            *_reading(manifest, where),
            "## Licence",
            "\n".join(f"- {line}" for line in _licences(manifest)),
            "## Cite it",
            "Cite the model and the text as their publishers ask, and this store by its digest: "
            f"`{_hex(manifest.get('digest'))}`.",
        ]
    )
    text = f"{head}\n{body}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    mark = f"<!-- sae-pipe card {digest}: written anew until somebody edits this file. -->\n\n"
    return f"{head}\n{mark}{body}\n"


def is_generated(text: str) -> bool:
    """Whether a README.md is a card as it was written, by whatever version, and nobody's own."""
    found = _MARK.search(text)
    if found is None:
        return False
    rest = text[: found.start()] + text[found.end() :]
    return hashlib.sha256(rest.encode()).hexdigest() == found[1]


def own_readme(folder: Path) -> bytes | None:
    """The README.md of a folder if it is somebody's own; None for a card, a link or none."""
    file = folder / README
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > CARD_LIMIT_BYTES:
            return None
        data = file.read_bytes()
    except OSError:
        return None
    return None if is_generated(data.decode(errors="replace")) else data


def write_card(folder: Path, manifest: Manifest) -> bool:
    """Write the card of a complete store; False where somebody's own README.md stays instead."""
    file = folder / README
    if file.is_symlink() or (file.exists() and not _is_card(file)):
        return False
    write_whole(file, card(manifest).encode())
    return True


def _is_card(file: Path) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > CARD_LIMIT_BYTES:  # a pipe never ends
            return False
        return is_generated(file.read_text(errors="replace"))
    except OSError:
        return False


def text_source(recipe: Any) -> str | None:
    """Where the text of a store comes from, as its recipe names it; None where it does not."""
    parts = _at(recipe, "corpus", "source", "parts")
    if not isinstance(parts, list) or not parts:
        return None
    named = [_part(part) for part in parts[:3]]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return ", ".join(named) + more


def _part(part: Any) -> str:
    dataset, revision = _at(part, "dataset"), _at(part, "revision")
    if dataset is None:
        return str(_at(part, "name"))
    return f"{dataset} at {str(revision)[:12]}" if revision else str(dataset)


# --- sections ---


def _front_matter(manifest: Manifest) -> list[str]:
    """YAML that the Hub reads; every value is a number, of a fixed form, or a JSON string."""
    licence = manifest.get("licence")
    model = _at(manifest, "recipe", "model", "name")
    lines = ["---", f"pretty_name: {_yaml_string(_heading(manifest))}"]
    # In quotation marks: `no` and `1.0` would be something else.
    chosen = f"license: {json.dumps(licence)}"
    lines.append(chosen if _is_licence(licence) else "# license: choose one")
    if isinstance(model, str) and licences.HUB_ID.fullmatch(model):
        lines.append(f"base_model: {json.dumps(model)}")
    lines += ["tags:", "- sparse-autoencoder", "- activations", "- sae-pipe"]
    n_rows = _number(manifest, "train", "layout", "n_rows")
    return [*lines, "size_categories:", f"- {size_category(n_rows)}", "viewer: false", "---"]


def _yaml_string(text: str) -> str:
    """A string of YAML that is no markup where the front matter is shown as Markdown.

    JSON would write an emoji as two halves, which YAML does not put together.
    """
    escaped = json.dumps(shown(text), ensure_ascii=False)[1:-1]
    return '"' + re.sub(r"[<>&`*\[\]|#]", lambda c: f"\\u{ord(c[0]):04x}", escaped) + '"'


def size_category(n_rows: float) -> str:
    """The Hub's name for so many rows, such as 1M<n<10M."""
    limits = [10 ** (3 + i) for i in range(len(_SIZES))]
    above = sum(n_rows >= limit for limit in limits)
    if above == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if above == len(limits) else f"{_SIZES[above - 1]}<n<{_SIZES[above]}"


def _heading(manifest: Manifest) -> str:
    recipe = manifest.get("recipe")
    model, hook, layer = (_at(recipe, *p) for p in (("model", "name"), ("hook",), ("layer",)))
    place = "" if layer is None else f", layer {layer}"
    place += "" if hook is None else f", {hook}"
    return f"Activations of {model or 'an unnamed model'}{place}"[:_LONGEST]


def _title(manifest: Manifest) -> str:
    rows, heldout, d_in = (
        _number(manifest, *path)
        for path in (
            ("train", "layout", "n_rows"),
            ("heldout", "layout", "n_rows"),
            ("train", "layout", "d_in"),
        )
    )
    return (
        f"# {_escaped(_heading(manifest))}\n\n"
        f"An activation store: {rows:,.0f} training rows and {heldout:,.0f} held-out rows of "
        f"{d_in:,.0f} values each, shuffled, in one Zarr v3 group. Sparse autoencoders are trained "
        "on such rows."
    )


def _content(manifest: Manifest) -> Pairs:
    recipe, encoding = manifest.get("recipe"), manifest.get("encoding")
    error = _at(encoding, "error", "relative")
    stored = f"{manifest.get('codec')}, {_at(encoding, 'dtype') or 'bfloat16'}"
    if isinstance(error, float):
        stored += f"; {error:.3g} of the variance is lost"
    return [
        ("model", _at(recipe, "model", "name")),
        ("model revision", _at(recipe, "model", "revision")),
        ("layer, hook point", _of_hook(recipe)),
        ("input masking", _masking(recipe)),
        ("text", text_source(recipe)),
        ("context size", _at(recipe, "corpus", "config", "context_size")),
        ("values", stored),
        ("mean of squared norms", f"{_number(manifest, 'statistics', 'mean_squared_norm'):.6g}"),
        ("digest", manifest.get("digest")),
    ]


def _of_hook(recipe: Any) -> str | None:
    layer, hook = _at(recipe, "layer"), _at(recipe, "hook")
    return None if layer is None else f"{layer}, {hook or 'not said'}"


def _masking(recipe: Any) -> str | None:
    p, string = _at(recipe, "mask", "p"), _at(recipe, "mask", "string")
    if type(p) not in (int, float) or not 0 <= p <= 1:
        return None
    if p == 0:
        return "none"
    return f"each token replaced by {string!r} with p = {p:g}; held-out rows are not masked"


def _making(manifest: Manifest) -> Pairs:
    recipe, made = manifest.get("recipe"), manifest.get("provenance")
    versions = _at(made, "versions")
    named = versions.items() if isinstance(versions, dict) else ()
    imported = _at(recipe, "imported")
    before = _at(
        recipe, "recoded_from"
    )  # otherwise the rows are those of a harvest with this codec
    given = f"{_at(imported, 'name')} ({_at(imported, 'kind')})" if imported else None
    return [
        ("computed in", _at(recipe, "dtype")),
        ("seed", _at(recipe, "seed")),
        ("first positions kept", _at(recipe, "keep_first")),
        ("masked rows left out", _at(recipe, "drop_masked")),
        ("duplicate documents", _at(recipe, "corpus", "config", "dedup")),
        ("imported from", given),
        ("rounded before as", before),
        ("in the store", _of_store(_at(made, "recoded")) if before else None),
        ("extended at row", _rows(_at(recipe, "extended_at"))),
        ("a part of", _of_store(_at(made, "sampled"))),
        ("made with", ", ".join(f"{name} {version}" for name, version in named) or None),
    ]


def _rows(numbers: Any) -> str | None:
    if not isinstance(numbers, list) or not numbers:
        return None
    return ", ".join(str(number) for number in numbers[:20])


def _of_store(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return None
    return f"{entry.get('store')}, digest {entry.get('digest')}"


def _reading(manifest: Manifest, where: str) -> list[str]:
    name = json.dumps(where, ensure_ascii=False)
    ours = (
        "from sae_pipe.storage import open_store\n\n"
        f"store = open_store({name})  # a folder or an address\n"
        "x = store.read(slice(0, 4))  # float32; a damaged or missing shard is an error"
    )
    plain = (
        "import zarr\n\n"
        f'store = zarr.open_group({name}, mode="r")\n'
        'rows = store["activations"][:1000]  # NaN where a shard is missing'
    )
    needs = "zarr 3.1.6 or newer"
    if str(manifest.get("codec")).startswith("compact"):
        needs += " and numcodecs"
    return [
        "## Read it",
        f"With sae-pipe:\n\n{_code(ours)}",
        f"Without it ({needs}):\n\n{_code(plain)}",
        "Plain readers compare each chunk with its checksum, but not the files with their SHA-256 in "
        "manifest.json, and a missing file is no error to them: `sae-pipe store verify` checks both. "
        "docs/reading-a-store.md of sae-pipe has recipes for dask, xarray, tensorstore and numpy.",
    ]


def _licences(manifest: Manifest) -> list[str]:
    recipe, licence = manifest.get("recipe"), manifest.get("licence")
    own = f"these rows: {licence}" if _is_licence(licence) else "these rows: not chosen yet"
    stored = ", whose tokens are stored with the rows" if _at(manifest, "corpus", "digest") else ""
    lines = [own, f"the model: {of_model(_at(recipe, 'model', 'name'))}"]
    return lines + [f"the text{stored}: {known}" for known in of_texts(recipe)]


def of_model(name: Any) -> str:
    """What is known of a model's licence, and where to look, as Markdown."""
    return _of(name, licences.of_model, "https://huggingface.co/")


def of_texts(recipe: Any) -> list[str]:
    """The same of each data set that the text of a store's recipe comes from."""
    parts = _at(recipe, "corpus", "source", "parts")
    names = [_at(part, "dataset") for part in parts[:3]] if isinstance(parts, list) else []
    named = [name for name in names if isinstance(name, str)]
    hub = "https://huggingface.co/datasets/"
    return [_of(name, licences.of_text, hub) for name in named] or [
        _of(None, licences.of_text, hub)
    ]


def _of(name: Any, known: Callable[[str], str | None], hub: str) -> str:
    if not isinstance(name, str):
        return "not recorded"
    licence, bare = known(name), name.partition(":")[0]
    page = f"{hub}{bare}" if licences.HUB_ID.fullmatch(bare) else None
    where = f"see {page}" if page else f"see where {_escaped(name)} was published"
    return (
        f"{_escaped(licence)}, as far as is known; {where}" if licence else f"not recorded; {where}"
    )


# --- Markdown ---


def _table(pairs: Pairs) -> str:
    lines = ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {_escaped(value)} |" for name, value in pairs if value is not None]
    return "\n".join(lines)


def _escaped(value: object) -> str:
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return shown_in_markdown(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def _code(lines: str) -> str:
    return f"```python\n{lines}\n```"


# --- a manifest may say anything ---


def _at(value: Any, *path: str) -> Any:
    """What stands at a path of names; None where something on the way is missing."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _number(value: Any, *path: str) -> float:
    found = _at(value, *path)
    return float(found) if type(found) in (int, float) and abs(found) < 2**63 else 0.0


def _hex(value: object) -> str:
    return re.sub(r"[^0-9a-f]", "", str(value))[:64]


def _is_licence(value: object) -> bool:
    return isinstance(value, str) and licences.is_identifier(value)
