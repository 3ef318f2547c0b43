"""The token corpus: contexts of token ids in a globally permuted order, as Zarr v3 arrays.

A folder (the `corpus` group of a store) with the groups `train` and `heldout`, each of which holds

    tokens    uint32 (C, T)  token ids; what stands at positions >= length is padding
    document  uint32 (C, T)  ordinal of the raw record, in the source, that the token comes from
    length    uint32 (C,)    how many positions are tokens
    origin    uint32 (C,)    index of the context in the order of the text, before the permutation

and `corpus.json`: format, recipe, counts, the size and SHA-256 of every other file, and a digest
over all that. A chunk that is missing is an error here, where a plain Zarr reader shows zeros.
"""

# C contexts, T positions in a context.

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from .errors import InputError, SaePipeError, StoreError
from .files import file_digest, json_digest

CORPUS_JSON = "corpus.json"
CORPUS_FORMAT = 1
INFO_LIMIT_BYTES = 1 << 28
SPLITS = ("train", "heldout")

Fetch = Callable[[list[str]], object]


def row_positions(
    tokens_CT: NDArray[np.uint32],
    lengths_C: NDArray[np.uint32],
    *,
    bos_id: int | None,
    keep_first: bool,
) -> NDArray[np.bool_]:
    """Which positions yield a row, bool (C, T): the one place where this rule stands.

    Padding never does. Unless `keep_first`, neither does the first position of a context or a BOS
    token: both are attention sinks, whose norms are tens of times the others.
    """
    positions_T = np.arange(tokens_CT.shape[1])
    rows_CT: NDArray[np.bool_] = positions_T < lengths_C[:, None]
    if not keep_first:
        rows_CT[:, :1] = False
        if bos_id is not None:
            rows_CT &= tokens_CT != bos_id
    return rows_CT


def corpus_digest(info: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of corpus.json without the digest itself."""
    return json_digest({name: value for name, value in info.items() if name != "digest"})


class TokenTable:
    """The contexts of one split. Ranges are [start, stop) in the stored order."""

    def __init__(
        self, folder: Path, split: str, info: dict[str, Any], fetch: Fetch | None = None
    ) -> None:
        """fetch: called with the names of files, below the corpus, before they are read."""
        config = info["recipe"]["config"]
        self.folder, self.split = folder, split
        self._bos_id: int | None = info["recipe"]["tokenizer"]["bos_id"]
        self._keep_first = bool(config["keep_first"])
        self.n_contexts = int(info["splits"][split]["contexts"])
        self.n_rows = int(info["splits"][split]["rows"])
        self.context_size = int(config["context_size"])
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._fetch, self._there = fetch, info["files"]

    def tokens(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Token ids, uint32 (stop - start, context_size)."""
        return self._read("tokens", start, stop)

    def lengths(self, start: int, stop: int) -> NDArray[np.uint32]:
        """How many positions of each context are tokens, uint32 (stop - start,)."""
        return self._read("length", start, stop)

    def documents(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Ordinal of the record that each token comes from, uint32 (stop - start, context_size)."""
        return self._read("document", start, stop)

    def origins(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Index of each context in the order of the text, uint32 (stop - start,)."""
        return self._read("origin", start, stop)

    def rows(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which positions yield a row, bool (stop - start, context_size); see `row_positions`."""
        return row_positions(
            self.tokens(start, stop),
            self.lengths(start, stop),
            bos_id=self._bos_id,
            keep_first=self._keep_first,
        )

    def context(self, i: int) -> NDArray[np.uint32]:
        """The token ids of one context without its padding, uint32 (length,)."""
        return self.tokens(i, i + 1)[0, : int(self.lengths(i, i + 1)[0])]

    def _read(self, name: str, start: int, stop: int) -> NDArray[np.uint32]:
        if not 0 <= start <= stop <= self.n_contexts:
            raise InputError(
                f"Contexts {start} to {stop} of {self.split} were asked for, but corpus "
                f"{self.folder} has {self.n_contexts}. Pass 0 <= start <= stop <= that."
            )
        path = self.folder / self.split / name
        try:
            if name not in self._arrays:
                self._have([f"{self.split}/{name}/zarr.json"])
                self._arrays[name] = zarr.open_array(path, mode="r")
            self._have(self._chunks(name, start, stop))
            values = np.asarray(self._arrays[name][start:stop], dtype=np.uint32)
        except SaePipeError:
            raise  # some are ValueErrors or OSErrors too: of a file that could not be fetched
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            # zarr and its codecs raise all of these for damaged bytes.
            raise _damaged(self.folder, f"{path} cannot be read ({error})") from error
        return values

    def _chunks(self, name: str, start: int, stop: int) -> list[str]:
        """The files that hold a range."""
        array = self._arrays[name]
        numbers = range(start // array.chunks[0], -(-stop // array.chunks[0]))
        return [f"{self.split}/{name}/c/{i}" + "/0" * (array.ndim - 1) for i in numbers]

    def _have(self, names: list[str]) -> None:
        if self._fetch is not None:
            self._fetch([name for name in names if name in self._there])


class Corpus:
    """A complete token corpus, opened for reading; StoreError when it is missing or damaged.

    info: the parsed corpus.json; digest: identity of the content; train, heldout: the contexts.
    """

    def __init__(
        self, path: Path | str, *, check_files: bool = True, fetch: Fetch | None = None
    ) -> None:
        """check_files: look whether every file is there with its size; fetch: of a corpus elsewhere,
        called with the names of files before they are read.
        """
        self.path, self._fetch = Path(path), fetch
        self.info = _read_info(self.path)
        self.digest: str = self.info["digest"]
        if check_files:
            self._check_files()

    @cached_property
    def train(self) -> TokenTable:
        """The contexts that training rows come from."""
        return TokenTable(self.path, "train", self.info, self._fetch)

    @cached_property
    def heldout(self) -> TokenTable:
        """The contexts of documents that no training row comes from."""
        return TokenTable(self.path, "heldout", self.info, self._fetch)

    def _check_files(self) -> None:
        """Every recorded file is there with its size: one stat a file, so that opening is cheap."""
        for name, recorded in self.info["files"].items():
            try:
                n_bytes = (self.path / name).stat().st_size
            except OSError:
                raise _damaged(self.path, f"{name} is missing") from None
            if n_bytes != recorded["bytes"]:
                what = f"{name} has {n_bytes} bytes instead of {recorded['bytes']}"
                raise _damaged(self.path, what)

    def verify(self) -> None:
        """Read every file and compare its SHA-256; StoreError names the first that differs."""
        if self._fetch is not None:
            self._fetch(list(self.info["files"]))
        self._check_files()
        for name, recorded in self.info["files"].items():
            if file_digest(self.path / name) != recorded["sha256"]:
                raise _damaged(self.path, f"{name} does not have the SHA-256 recorded for it")


def _read_info(path: Path) -> dict[str, Any]:
    file = path / CORPUS_JSON
    if not file.is_file():
        raise StoreError(
            f"{path} is not a token corpus: it has no {CORPUS_JSON}. "
            "Pass the `corpus` folder of a store that `sae-pipe harvest` wrote."
        )
    try:
        if file.stat().st_size > INFO_LIMIT_BYTES:
            raise ValueError("too large")
        info: Any = json.loads(file.read_bytes())
        version = info["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(path, f"{CORPUS_JSON} is not the JSON that was written") from None
    if isinstance(version, int) and version > CORPUS_FORMAT:
        raise StoreError(
            f"Corpus {path} has format version {version}, but this sae-pipe reads up to "
            f"{CORPUS_FORMAT}. Upgrade sae-pipe."
        )
    if info.get("digest") != corpus_digest(info):
        raise _damaged(path, f"{CORPUS_JSON} does not match its own digest")
    return dict(info)


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"Corpus {path} is damaged: {what}. Run `sae-pipe store repair` on its store, which copies "
        "it from a store beside it that has the same tokens, or harvest into a new folder."
    )
