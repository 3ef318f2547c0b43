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

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, SaePipeError, StoreError
from .evalset_arrays import unpacked
from .files import file_digest, is_plain_name, is_sha256, json_digest, plain_size, read_plain
from .plain_json import parse_plain_json
from .shard import checked_frame, packed_limit

CORPUS_JSON = "corpus.json"
CORPUS_FORMAT = 1
INFO_LIMIT_BYTES = 1 << 26
MOST_POSITIONS = 1 << 20  # of a context
_METADATA_LIMIT_BYTES = 1 << 16
_CHUNK_VALUES = 4 * 2**20  # 16 MiB of uint32
SPLITS = ("train", "heldout")

Fetch = Callable[[list[str]], object]


def chunk_contexts(context_size: int) -> int:
    """Contexts in one chunk of a (C, T) array: about 16 MiB before compression."""
    return max(1, _CHUNK_VALUES // context_size)


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
        self.folder, self.split = folder, split
        try:
            config = info["recipe"]["config"]
            self._bos_id: int | None = info["recipe"]["tokenizer"]["bos_id"]
            self._keep_first = bool(config["keep_first"])
            self.n_contexts = _whole(info["splits"][split]["contexts"], 2**32)
            self.n_rows = _whole(info["splits"][split]["rows"], 2**48)
            self.context_size = _whole(config["context_size"], MOST_POSITIONS)
            if self.context_size == 0 or type(self._bos_id) not in (int, type(None)):
                raise ValueError(f"context_size {self.context_size}, bos_id {self._bos_id!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder, f"{CORPUS_JSON} lacks its sizes ({error})") from error
        self._is_looked_at: set[str] = set()
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
        step, inner = chunk_contexts(self.context_size), self._inner(name)
        chunks = range(start // step, -(-stop // step))
        try:
            self._look_at(name)
            if len(chunks) > len(self._there):  # before lists or arrays as long as that are made
                raise ValueError(f"{CORPUS_JSON} lists fewer files than its sizes ask for")
            files = [f"{self.split}/{name}/c/{i}" + "/0" * len(inner) for i in chunks]
            missing = next((file for file in files if file not in self._there), None)
            if missing is not None:
                raise ValueError(f"{CORPUS_JSON} does not list {missing}")
            self._have(files)
            out = np.empty((stop - start, *inner), np.uint32)
            for i, file in zip(chunks, files, strict=True):
                values = self._decode(file, (step, *inner))
                first, last = max(start, i * step), min(stop, (i + 1) * step)
                out[first - start : last - start] = values[first - i * step : last - i * step]
        except SaePipeError:
            raise  # some are ValueErrors or OSErrors too: of a file that could not be fetched
        except (ValueError, OSError) as error:
            raise _damaged(self.folder, f"{path} cannot be read ({error})") from error
        return out

    def _inner(self, name: str) -> tuple[int, ...]:
        return (self.context_size,) if name in ("tokens", "document") else ()

    def _look_at(self, name: str) -> None:
        """ValueError unless an array's metadata are those that are written, before its first chunk.

        zarr-python is not asked: it takes whatever codec they name, and there are ones that unpickle.
        """
        if name in self._is_looked_at:
            return
        file, inner = f"{self.split}/{name}/zarr.json", self._inner(name)
        self._have([file])
        found = parse_plain_json(read_plain(self.folder, file, _METADATA_LIMIT_BYTES))
        found = found if isinstance(found, dict) else {}
        wanted = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.n_contexts, *inner],
            "data_type": "uint32",
        }
        wrong = [key for key, value in wanted.items() if found.get(key) != value]
        codecs = found.get("codecs")
        codecs = codecs if isinstance(codecs, list) else []
        names = [each.get("name") for each in codecs if isinstance(each, dict)]
        grid = {"chunk_shape": [chunk_contexts(self.context_size), *inner]}
        chunks = found.get("chunk_grid")
        if not isinstance(chunks, dict) or chunks.get("configuration") != grid:
            wrong.append("chunk_grid")
        if names != ["bytes", "zstd", "crc32c"]:
            wrong.append("codecs")
        if wrong:
            raise ValueError(f"its zarr.json has another {' and '.join(wrong)} than is written")
        self._is_looked_at.add(name)

    def _decode(self, file: str, shape: tuple[int, ...]) -> NDArray[np.uint32]:
        """The values of a chunk; memory is taken once its frame says that it holds so many."""
        n_bytes = 4 * math.prod(shape)
        frame = checked_frame(memoryview(read_plain(self.folder, file, packed_limit(n_bytes))))
        return np.frombuffer(unpacked(frame, n_bytes), "<u4").reshape(shape)

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
                n_bytes = plain_size(self.path, name)
            except SaePipeError:
                raise
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
    if not (path / CORPUS_JSON).is_file():
        raise StoreError(
            f"{path} is not a token corpus: it has no {CORPUS_JSON}. "
            "Pass the `corpus` folder of a store that `sae-pipe harvest` wrote."
        )
    try:
        info: Any = parse_plain_json(read_plain(path, CORPUS_JSON, INFO_LIMIT_BYTES))
        version = info["format"]
    except SaePipeError:
        raise
    except (ValueError, KeyError, TypeError, OSError):
        raise _damaged(path, f"{CORPUS_JSON} is not the JSON that was written") from None
    if isinstance(version, int) and version > CORPUS_FORMAT:
        raise StoreError(
            f"Corpus {path} has format version {version}, but this sae-pipe reads up to "
            f"{CORPUS_FORMAT}. Upgrade sae-pipe."
        )
    if info.get("digest") != corpus_digest(info):
        raise _damaged(path, f"{CORPUS_JSON} does not match its own digest")
    try:
        _check_files(info["files"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{CORPUS_JSON} lists files that cannot be ({error})") from error
    return dict(info)


def _check_files(files: dict[str, dict[str, Any]]) -> None:
    """KeyError, TypeError or ValueError unless all are files below the corpus, with their records."""
    for name, entry in files.items():
        if not is_plain_name(name) or name == CORPUS_JSON:
            raise ValueError(f"one named {name[:200]!r}")
        _whole(entry["bytes"], 2**48)
        if not is_sha256(entry["sha256"]):
            raise ValueError(f"{name} without a SHA-256")


def _whole(value: Any, most: int) -> int:
    """A count; ValueError for anything else, true and false among it."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"a count of {str(value)[:40]}")
    return value


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"Corpus {path} is damaged: {what}. Run `sae-pipe store repair` on its store, which copies "
        "it from a store beside it that has the same tokens, or harvest into a new folder."
    )
