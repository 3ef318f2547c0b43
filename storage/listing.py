"""One store of a catalogue, as its manifest describes it, and which of them are asked for.

Manifests come from strangers: whatever is not of the form that ours have makes one damaged, and
nothing in an entry is longer than `_TEXT_LIMIT` characters or above 2**63.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .address import Place
from .codecs import CODECS
from .errors import InputError, StoreError
from .files import is_sha256, json_digest
from .layout import VALUE_BYTES, Layout
from .manifest import COMPLETE, EXTENDING, HARVESTING, TOKENISING, Manifest, layout_of

STATES = (TOKENISING, HARVESTING, EXTENDING, COMPLETE)
_TEXT_LIMIT = 500
_COUNT_LIMIT = 1 << 63

Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StoreEntry:
    """One store of a catalogue; None is what its manifest does not say.

    store: its path below the catalogue; address: a whole path or a URL; bytes: of all files but the
    tokens; ratio: how many times smaller the activations are than raw bfloat16; date: when it was
    finished, or last gone on with, ISO 8601 in UTC; recipe: SHA-256 of the canonical JSON of the
    manifest's `recipe`; is_sampled: whether it is only a part of a store of that recipe; corpus:
    digest of its tokens; corpus_key: see `corpus_key`; n_shards, n_sealed: of the training rows.
    """

    store: str
    address: str
    state: str
    model: str | None
    revision: str | None
    layer: int | None
    hook: str | None
    mask_p: float | None
    n_rows: int | None
    n_heldout_rows: int | None
    d_in: int | None
    bytes: int | None
    codec: str
    ratio: float | None
    owner: str | None
    date: str | None
    digest: str | None
    recipe: str
    is_sampled: bool
    corpus: str | None
    corpus_key: str | None
    n_shards: int | None
    n_sealed: int | None

    @property
    def progress(self) -> str:
        """The state in a word or two: complete, tokenising, 12 of 40 shards."""
        if self.state == HARVESTING and self.n_shards is not None and self.n_sealed is not None:
            return f"{self.n_sealed:,} of {self.n_shards:,} shards"
        return self.state

    @property
    def made(self) -> str:
        """By whom and when, as far as that is known: by ann on 2026-11-26."""
        by = f" by {self.owner}" if self.owner else ""
        on = f" on {self.date[:10]}" if self.date else ""
        return (by + on).strip()

    def as_json(self) -> dict[str, Any]:
        """What `store ls --json` prints."""
        shown = asdict(self)
        del shown["corpus_key"]
        return shown


# What a manifest alone says: all but where the store is and how far it has come.
FACTS = frozenset(each.name for each in fields(StoreEntry)) - {"store", "address", "n_sealed"}


@dataclass(frozen=True, kw_only=True)
class StoreFilter:
    """Which stores are asked for: those that have one of the values of each; () is any.

    models: a Hub id, or a bare name, which is that of a folder and of every owner's model; case
    does not matter. codecs: a name such as compact, or one with its parameter, compact:0.25.
    """

    models: Sequence[str] = ()
    layers: Sequence[int] = ()
    hooks: Sequence[str] = ()
    mask_p: Sequence[float] = ()
    states: Sequence[str] = ()
    codecs: Sequence[str] = ()

    def __post_init__(self) -> None:
        for flag, asked, known in (
            ("--state", self.states, STATES),
            ("--codec", [codec.partition(":")[0] for codec in self.codecs], tuple(CODECS)),
        ):
            for value in asked:
                if value not in known:
                    raise InputError(
                        f"{flag} is {value!r}, and has to be one of {', '.join(known)}."
                    )
        for p in self.mask_p:
            if not 0.0 <= p <= 1.0:  # also refuses NaN
                raise InputError(f"--mask-p is {p}, and has to be a number from 0 to 1.")

    def takes(self, entry: StoreEntry) -> bool:
        """Whether a store is asked for."""
        name, codec = (entry.model or "").casefold(), entry.codec.partition(":")[0]
        return (
            _is_any(self.models, lambda asked: asked.casefold() in (name, name.rpartition("/")[2]))
            and _is_any(self.layers, lambda asked: asked == entry.layer)
            and _is_any(self.hooks, lambda asked: asked == entry.hook)
            and _is_any(self.mask_p, lambda asked: asked == entry.mask_p)
            and _is_any(self.states, lambda asked: asked == entry.state)
            and _is_any(self.codecs, lambda asked: asked in (codec, entry.codec))
        )


def _is_any(asked: Sequence[Any], fits: Any) -> bool:
    return not asked or any(fits(value) for value in asked)


def corpus_key(config: Any, fingerprint: Any) -> str:
    """Equal for token corpora that were cut alike by the same tokenizer, from whatever text.

    config, fingerprint: `recipe.corpus.config` and `recipe.corpus.tokenizer.fingerprint`.
    """
    return json_digest([config, fingerprint])


def facts_of(manifest: Manifest, where: Place) -> Facts:
    """What a manifest says of its store, by the names in FACTS; StoreError when it is damaged."""
    try:
        return _facts(manifest, where)
    except (
        KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise StoreError(
            f"The manifest of {where} is damaged: it lacks what every store has, or has it in another "
            f"form ({error}). Fetch or harvest the store again."
        ) from error


def _facts(manifest: Manifest, where: Place) -> Facts:
    recipe, state, made = manifest["recipe"], manifest["state"], manifest["provenance"]
    if state not in STATES:
        raise ValueError(f"there is no state {str(state)[:50]!r}")
    model, mask = recipe.get("model") or {}, recipe.get("mask") or {}
    is_made = state in (COMPLETE, EXTENDING)
    started = [run["started"] for run in made["runs"][-1:]]
    tokens = recipe.get("corpus") or {}
    key = None
    if "tokenizer" in tokens:
        key = corpus_key(tokens["config"], tokens["tokenizer"]["fingerprint"])
    facts: Facts = {
        "state": state,
        "model": _text(model.get("name")),
        "revision": _text(model.get("revision")),
        "layer": _count(recipe.get("layer")),
        "hook": _text(recipe.get("hook")),
        "mask_p": _number(mask.get("p")),
        "n_rows": None,
        "n_heldout_rows": None,
        "d_in": None,
        "bytes": None,
        "codec": _text(manifest["codec"]) or "",
        "ratio": None,
        "owner": _text(made.get("owner")),
        "date": _text(made["finished"] if is_made else next(iter(started), None)),
        "digest": None,
        "recipe": json_digest(recipe),
        "is_sampled": "sampled" in made,
        "corpus": None,
        "corpus_key": key,
        "n_shards": None,
    }
    if state == TOKENISING:
        return facts
    train, heldout = layout_of(manifest["train"], where), layout_of(manifest["heldout"], where)
    facts |= {
        "n_rows": _count(train.n_rows),
        "n_heldout_rows": _count(heldout.n_rows),
        "d_in": _count(train.d_in),
        "corpus": _digest(manifest["corpus"]["digest"]),
        "n_shards": train.n_shards,
    }
    return facts | _sizes(manifest, train, heldout) if is_made else facts


def _sizes(manifest: Manifest, train: Layout, heldout: Layout) -> Facts:
    """What is known of a store all of whose shards are there."""
    shards = [s for split in ("train", "heldout") for s in manifest[split]["shards"]]
    files = [(array, file) for shard in shards for array, file in shard["files"].items()]
    of_rows = sum(_size(file) for array, file in files if array == "activations")
    others = [file for array, file in files if array != "activations"]
    others += manifest.get("files", {}).values()
    raw = (train.n_rows + heldout.n_rows) * train.d_in * VALUE_BYTES
    return {
        "bytes": _count(of_rows + sum(map(_size, others))),
        "ratio": round(raw / of_rows, 3) if of_rows else None,
        "digest": _digest(manifest["digest"]),
    }


def _size(file: dict[str, Any]) -> int:
    size = _count(file["bytes"])
    if size is None:
        raise ValueError("a file has no size")
    return size


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and len(value) <= _TEXT_LIMIT:
        value.encode()  # refuses halves of surrogate pairs
        return value
    raise ValueError(f"a name is {str(value)[:50]!r}")


def _count(value: Any) -> int | None:
    if value is None or (type(value) is int and 0 <= value < _COUNT_LIMIT):
        return value
    raise ValueError(f"a number is {str(value)[:50]}")


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"a number is {str(value)[:50]}")
    return float(value)


def _digest(value: Any) -> str | None:
    if value is None or is_sha256(value):
        return value  # type: ignore[no-any-return]
    raise ValueError(f"a digest is {str(value)[:50]!r}")
