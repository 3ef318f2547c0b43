"""What a harvest is asked for, the stores it makes, and what tells one recipe from another."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..storage.address import Address, Place, expanded
from ..storage.codecs import Codec, get_codec
from ..storage.errors import InputError
from ..storage.layout import Layout, choose_layout
from ..storage.manifest import COMPLETE, Manifest
from .masking import DEFAULT_MASK_STRING
from .sources import TextConfig
from .taps import DEFAULT_HOOK

DEFAULT_TOKENS = 500_000_000  # as the paper trains (arXiv 2604.06495)
DEFAULT_CONTEXT_SIZE = 1024
MAX_HELDOUT_TOKENS = 1_000_000
# The same on every machine, because the block size decides about the order of the stored rows.
DEFAULT_BLOCK_BYTES = 2_000_000_000

Request = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """One harvest: a store for each pair of mask_p and layers.

    tokens: training rows of each store (None: 500 million, or all the text if it is shorter);
    heldout_tokens: held-out rows (None: a million or 1 %, the smaller); context_size: None for the
    smaller of 1024 and the model's maximum; batch_contexts: None to choose; store_dtype: the number
    format that values are rounded to; codec: how they are compressed; block_bytes: raw bytes
    of the blocks that the rows of one layer are shuffled in (two are in memory for each layer);
    note_every_s: a block that takes longer than this to fill is kept on disk and noted this often.
    workers: processes of this machine that make blocks (None or 1: this process does);
    scheduler: address of a Dask cluster whose workers make them instead.
    extend: add rows to complete stores, up to `tokens`, in place of making new ones.
    send_to: where the stores are to stand, in place of `out`, which is then the spool that they are
    sent from (`harvest_remote.py`). catalog: where stores of the same recipe, and tokens of the same
    text, are looked for; again: harvest all the same where the recipe is found.
    """

    model: str
    layers: tuple[int, ...]
    mask_p: tuple[float, ...] = (0.0,)
    out: Path = Path("acts.zarr")
    revision: str | None = None
    hook: str = DEFAULT_HOOK
    text: TextConfig = field(default_factory=TextConfig)
    dedup: str = "exact"
    context_size: int | None = None
    pack: bool = True
    mask_string: str = DEFAULT_MASK_STRING
    drop_masked: bool = False
    keep_first: bool = False
    tokens: int | None = None
    heldout_tokens: int | None = None
    seed: int = 0
    codec: str = "lossless"
    store_dtype: str = "bfloat16"
    device: str = "auto"
    dtype: str = "auto"
    batch_contexts: int | None = None
    block_bytes: int = DEFAULT_BLOCK_BYTES
    shard_rows: int | None = None
    note_every_s: float = 60.0
    workers: int | None = None
    scheduler: str | None = None
    extend: bool = False
    send_to: Address | None = None
    catalog: Place | None = None
    again: bool = False

    def __post_init__(self) -> None:
        get_codec(self.codec, self.store_dtype)
        for p in self.mask_p:
            if not 0.0 <= p <= 1.0:  # also refuses NaN
                raise InputError(
                    f"Mask probability {p} is outside [0, 1]. "
                    "Pass --mask-p a number from 0 to 1, for example 0.3."
                )
        if self.drop_masked and 1.0 in self.mask_p:
            raise InputError(
                "With --mask-p 1 and --drop-masked no row is left. Leave one of them out."
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed is {self.seed}, and has to be from 0 to 2**63 - 1.")
        for flag, value in (
            ("--tokens", self.tokens),
            ("--batch-contexts", self.batch_contexts),
            ("--block-gb", self.block_bytes),
            ("--shard-rows", self.shard_rows),
            ("--workers", self.workers),
        ):
            if value is not None and value < 1:
                raise InputError(f"{flag} is {value}, and has to be at least 1.")
        if self.workers is not None and self.scheduler is not None:
            raise InputError(
                "--workers starts processes on this machine, and --scheduler takes those of a "
                "cluster that runs already. Pass one of them."
            )
        if self.extend and self.tokens is None:
            raise InputError(
                "--extend needs --tokens: the number of training rows that the store is to have, with "
                "those that it has."
            )
        if self.extend and self.send_to is not None:
            raise InputError(
                f"--extend adds rows to a store in a folder, and --out is {self.send_to}. Pull the "
                "store with `sae-pipe store pull`, extend it, and push it to another address."
            )
        if self.context_size is not None and self.context_size < 2:
            raise InputError(
                f"--context-size is {self.context_size}, and has to be at least 2: the first "
                "position of a context is left out."
            )
        if self.heldout_tokens is not None and self.heldout_tokens < 0:
            raise InputError(f"--heldout-tokens is {self.heldout_tokens}, and has to be 0 or more.")

    @property
    def stored_as(self) -> Codec:
        """The codec, before it has seen a row."""
        return get_codec(self.codec, self.store_dtype)

    def layout(self, n_rows: int, d_in: int) -> Layout:
        """The layout of the training rows."""
        return choose_layout(
            n_rows=n_rows,
            d_in=d_in,
            block_bytes=self.block_bytes,
            shard_rows=self.shard_rows,
            value_bytes=self.stored_as.values.bytes,
            chunk_rows=self.stored_as.chunk_rows(d_in),
        )


@dataclass(frozen=True)
class Target:
    """One store of a harvest."""

    path: Path
    layer: int
    mask_p: float


def targets(config: HarvestConfig) -> list[Target]:
    """The stores of a harvest: --out itself, or one name for each pair of layer and mask_p."""
    layers = tuple(dict.fromkeys(config.layers))
    ratios = tuple(dict.fromkeys(config.mask_p))
    if len(layers) * len(ratios) == 1:
        return [Target(config.out, layers[0], ratios[0])]
    # Resolved, because `.` and `..` have no name to put a layer behind.
    out = config.out if config.out.name else config.out.resolve()
    stem = out.name.removesuffix(".zarr")
    return [
        Target(out.with_name(f"{stem}-layer{layer}-p{_short(ratio)}.zarr"), layer, ratio)
        for ratio in ratios
        for layer in layers
    ]


def _short(ratio: float) -> str:
    """0 for 0.0, 0.3 for 0.3; different for different numbers."""
    return repr(float(ratio)).removesuffix(".0")


def request_of(config: HarvestConfig, target: Target) -> Request:
    """What was asked for, flag by flag, for one store: compared when the command runs again.

    Left out is what does not change a row: where it is written and how fast.
    """
    asked = asdict(config)
    for name in ("out", "layers", "mask_p", "device", "batch_contexts", "note_every_s"):
        del asked[name]
    for name in ("workers", "scheduler", "send_to", "catalog", "again", "extend"):
        del asked[name]
    text = asked.pop("text")
    text["dataset_revision"] = text.pop("revision")  # the model has a revision too
    asked["codec"] = config.stored_as.spelling
    # A local path is one place however it is spelt and from wherever the command is run.
    asked["model"] = _whole_path(config.model)
    text["dataset"] = _whole_path(config.text.dataset)
    return {"layer": target.layer, "mask_p": target.mask_p, **asked, **text}


def _whole_path(name: str) -> str:
    path = expanded(name)
    return str(path.resolve()) if os.path.exists(path) else name


def check_same(
    path: Place, begun: dict[str, Any], asked: dict[str, Any], what: str = "Store"
) -> None:
    """InputError with every difference when a store, or what else, was begun with another recipe."""
    differences = [
        f"{name.replace('.', ' ')} is {old} there and {new} here"
        for name, old, new in _differences(begun, asked)
    ]
    if differences:
        raise InputError(
            f"{what} {path} was begun with another recipe: {'; '.join(differences)}. "
            "Pass the same flags to go on with it, or another --out."
        )


def check_request(path: Path, manifest: Manifest, asked: Request) -> None:
    """`check_same` of what was asked for; says how a store that is only too small can grow."""
    begun, tokens = manifest["request"], asked["tokens"]
    is_only_larger = (
        manifest["state"] == COMPLETE
        and [name for name, _, _ in _differences(begun, asked)] == ["tokens"]
        and tokens is not None
        and tokens > manifest["train"]["layout"]["n_rows"]
    )
    if is_only_larger:
        raise InputError(
            f"Store {path} was begun with another recipe: tokens is {begun['tokens']} there and "
            f"{tokens} here. Pass --extend to add the rows that are missing, the same flags to go on "
            "with it, or another --out."
        )
    check_same(path, begun, asked)


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            below = f"{name}.{key}" if name else key
            found += _differences(old.get(key), new.get(key), below)
        return found
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return [] if list(old) == list(new) else [(name, list(old), list(new))]
    return [] if old == new else [(name, old, new)]
