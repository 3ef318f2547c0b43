"""An evaluation set on disk, opened for reading: labelled items, and the activations at their rows.

Rows belong to items. An item is one labelled text or word or, where there are no labels, the part
of one document in one context. Rows are float32, unmasked, unshuffled, and those of an item are
consecutive. Pooling says how many an item has, and what becomes of them:

    last, marked   one: the last token, or the last token of a marked word
    mean           its tokens; latents are averaged over them after encoding, as are activations
    all            its tokens; each stands for itself, and there are no labels

Format: docs/store-format.md. Written by `storage/evalset_writer.py`.
"""

# N rows, I items, D d_in

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, SaePipeError, StoreError
from .evalset_arrays import ACTIVATIONS, ARRAYS, Sizes, chunk_path, decode_chunk
from .files import file_digest, is_plain_name, is_sha256, json_digest, plain_size, read_plain
from .plain_json import parse_plain_json

FORMAT = "sae-pipe evaluation set"
FORMAT_VERSION = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
MANIFEST_LIMIT_BYTES = 1 << 26
BUILDING, COMPLETE = "building", "complete"
POOLINGS = ("last", "mean", "marked", "all")
TRAIN, TEST, OOD = 0, 1, 2
SPLITS = ("train", "test", "ood")  # by the number that items/split has
# What the digest is taken of.
_CONTENT = (
    "recipe", "suite", "pooling", "d_in", "n_rows", "n_items", "text_bytes", "chunk_rows", "tasks",
    "files",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What items are labelled for. classes: names by label; groups: names by group, None without a
    second label; note: what a reader of its scores has to know, or "".
    """

    name: str
    classes: list[str]
    groups: list[str] | None
    note: str


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an evaluation set, whatever its state.

    Raises StoreError: no such folder, no evaluation set, damaged, or of a newer format.
    """
    file = path / MANIFEST
    if not file.is_file():
        what = f"{path} is not an evaluation set: it has no {MANIFEST}"
        what = what if path.is_dir() else f"There is no evaluation set at {path}"
        raise StoreError(f"{what}. Pass the folder that `sae-pipe eval-set build --out` wrote.")
    try:
        manifest = parse_plain_json(read_plain(path, MANIFEST, MANIFEST_LIMIT_BYTES))
    except SaePipeError:
        raise
    except (ValueError, OSError) as error:
        raise damaged(path, f"{MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(
            f"{path} is not an evaluation set: {MANIFEST} does not name the format {FORMAT!r}. "
            "Pass the folder that `sae-pipe eval-set build --out` wrote."
        )
    version = manifest.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise StoreError(
            f"Evaluation set {path} has format version {version}, and this sae-pipe reads up to "
            f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade sae-pipe."
        )
    try:
        _check_form(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"{MANIFEST}: {error}") from error
    return manifest


def open_evalset(path: str | Path) -> "EvalSet":
    """Open a complete evaluation set.

    Raises StoreError: there is none, it is unfinished, a file is missing or of another size, its
    manifest is damaged, or its format is newer than this package.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.get("state") != COMPLETE:
        raise StoreError(
            f"Evaluation set {path} is not finished: its state is {manifest.get('state')!r}. Run "
            "the `sae-pipe eval-set build` command that began it once more; it goes on where it "
            "stopped."
        )
    return EvalSet(path, manifest)


def content_digest(manifest: dict[str, Any]) -> str:
    """The identity of a set's content: recipe, sizes, tasks and the SHA-256 of every file.

    Times, hosts, versions and counts of what was left out are not part of it.
    """
    return json_digest({name: manifest[name] for name in _CONTENT})


def sizes_of(manifest: dict[str, Any]) -> Sizes:
    """The lengths of a manifest; KeyError, TypeError or ValueError when they cannot be."""
    names = ("n_rows", "n_items", "text_bytes", "d_in", "chunk_rows")
    return Sizes(**{name: manifest[name] for name in names})


def damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"Evaluation set {path} is damaged: {what}. Remove it and build or fetch it again."
    )


class EvalSet:
    """A complete evaluation set. Open one with `open_evalset`.

    name: the folder's name without its suffix; digest: identity of the content; model, layer, hook:
    of the recipe; first_row: rows of item i are first_row[i]:first_row[i + 1].
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.name = path.name.removesuffix(".zarr") or "evalset"
        try:
            self._sizes = sizes_of(manifest)
            self.recipe: dict[str, Any] = manifest["recipe"]
            self.suite, self.pooling = str(manifest["suite"]), str(manifest["pooling"])
            self.model, self.hook = str(self.recipe["model"]["name"]), str(self.recipe["hook"])
            self.layer: int = self.recipe["layer"]
            self.tasks = [_task(entry) for entry in manifest["tasks"]]
            self._files: dict[str, dict[str, Any]] = manifest["files"]
            self.digest = str(manifest["digest"])
            if self.pooling not in POOLINGS:
                raise ValueError(f"its pooling is {self.pooling!r}")
            _check_files(self._files, self._sizes)
            if content_digest(manifest) != self.digest:
                raise ValueError("it does not match its own digest")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(path, f"{MANIFEST}: {error}") from error
        self.n_rows, self.n_items = self._sizes.n_rows, self._sizes.n_items
        self.d_in = self._sizes.d_in
        self._check_sizes()

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Activations of rows start to stop, float32 (stop - start, d_in).

        Raises InputError for rows that are not there, and StoreError, naming the file, for damage.
        """
        if not 0 <= start <= stop <= self.n_rows:
            raise InputError(
                f"Rows {start} to {stop} were asked for, and evaluation set {self.path} has "
                f"{self.n_rows}. Pass 0 <= start <= stop <= that."
            )
        out_ND = np.empty((stop - start, self.d_in), np.float32)
        size = self._sizes.chunk_rows
        for chunk in range(start // size, -(-stop // size)):
            first = chunk * size
            part = slice(max(start, first), min(stop, first + size))
            values = self._decode(ACTIVATIONS, chunk)
            out_ND[part.start - start : part.stop - start] = values[
                part.start - first : part.stop - first
            ]
        return out_ND

    def items_of(self, task: int) -> NDArray[np.int64]:
        """Items of a task, ascending and without a gap, int64."""
        return np.flatnonzero(self.item_task == task)

    def text(self, item: int) -> str:
        """The text of an item, or its word."""
        if not 0 <= item < self.n_items:
            raise InputError(
                f"Item {item} was asked for, and evaluation set {self.path} has {self.n_items}. "
                "Pass 0 or more and less than that."
            )
        ends_I = self._text_ends
        start = int(ends_I[item - 1]) if item else 0
        return self._text_U[start : int(ends_I[item])].tobytes().decode("utf-8", "replace")

    # --- items ---

    @cached_property
    def item_task(self) -> NDArray[np.int32]:
        """Task of each item, int32 (n_items,); -1 where there are no tasks."""
        task_I: NDArray[np.int32] = self._vector("items/task")
        is_whole = task_I[0] == (0 if self.tasks else -1) and task_I[-1] == len(self.tasks) - 1
        steps = np.diff(task_I)
        if not is_whole or (steps < 0).any() or (steps > 1).any():
            raise damaged(self.path, "items/task is not the tasks one after another")
        return task_I

    @cached_property
    def item_label(self) -> NDArray[np.int32]:
        """Class of each item, int32 (n_items,): index into its task's classes; -1 for none."""
        return self._labels("items/label", [len(task.classes) for task in self.tasks])

    @cached_property
    def item_group(self) -> NDArray[np.int32]:
        """Second label of each item, int32 (n_items,): index into its task's groups; -1: none."""
        return self._labels("items/group", [len(task.groups or ()) for task in self.tasks])

    @cached_property
    def item_split(self) -> NDArray[np.uint8]:
        """0 train, 1 test, 2 out of distribution, uint8 (n_items,)."""
        split_I: NDArray[np.uint8] = self._vector("items/split")
        if split_I.max() > OOD:
            raise damaged(self.path, f"items/split has {split_I.max()}")
        return split_I

    @cached_property
    def item_document(self) -> NDArray[np.int64]:
        """Equal where items must be resampled together: equal texts, one document. (n_items,)"""
        return self._vector("items/document")

    @cached_property
    def _text_ends(self) -> NDArray[np.int64]:
        ends_I: NDArray[np.int64] = self._vector("items/text_end")
        is_ascending = ends_I[0] >= 0 and (np.diff(ends_I) >= 0).all()
        if not is_ascending or ends_I[-1] != self._sizes.text_bytes:
            raise damaged(self.path, "items/text_end does not cut items/text")
        return ends_I

    @cached_property
    def _text_U(self) -> NDArray[np.uint8]:
        return self._vector("items/text")

    # --- rows ---

    @cached_property
    def row_item(self) -> NDArray[np.int64]:
        """Item of each row, int64 (n_rows,), ascending."""
        item_N: NDArray[np.int64] = self._vector("rows/item")
        steps = np.diff(item_N)
        is_whole = item_N[0] == 0 and item_N[-1] == self.n_items - 1
        if not is_whole or (steps < 0).any() or (steps > 1).any():
            raise damaged(self.path, "rows/item is not the items one after another")
        return item_N

    @cached_property
    def row_token(self) -> NDArray[np.uint32]:
        """Token id of each row, uint32 (n_rows,)."""
        return self._vector("rows/token")

    @cached_property
    def row_position(self) -> NDArray[np.int32]:
        """Position of each row in the tokens that the model was given, int32 (n_rows,)."""
        return self._vector("rows/position")

    @cached_property
    def first_row(self) -> NDArray[np.int64]:
        """Rows of item i are first_row[i]:first_row[i + 1]; int64 (n_items + 1,)."""
        return np.searchsorted(self.row_item, np.arange(self.n_items + 1)).astype(np.int64)

    # --- files ---

    @property
    def tokenizer_json(self) -> Path:
        """The tokenizer that the tokens are of, in the format of the tokenizers library."""
        return self.path / TOKENIZER

    def verify(self) -> None:
        """Read every file and compare its SHA-256; StoreError names the first that differs."""
        for name, entry in self._files.items():
            if file_digest(self.path / name) != entry["sha256"]:
                raise damaged(self.path, f"{name} does not have the SHA-256 recorded for it")

    def _labels(self, name: str, n_values: list[int]) -> NDArray[np.int32]:
        """Labels, each inside the names that its task has."""
        label_I: NDArray[np.int32] = self._vector(name)
        limit_I = np.array([*n_values, 0])[self.item_task]
        if (label_I < -1).any() or (label_I >= limit_I).any():
            raise damaged(self.path, f"{name} has labels that no task names")
        return label_I

    def _vector(self, name: str) -> NDArray[Any]:
        out = np.empty(self._sizes.shape(name), ARRAYS[name].dtype)
        size = self._sizes.chunk_shape(name)[0]
        for chunk in range(self._sizes.n_chunks(name)):
            part = out[chunk * size : (chunk + 1) * size]
            part[:] = self._decode(name, chunk)[: len(part)]
        return out

    def _decode(self, name: str, chunk: int) -> NDArray[Any]:
        file = chunk_path(name, chunk)
        try:
            return decode_chunk(self.path / file, self._sizes, name)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise damaged(self.path, f"{file}: {reason}") from error

    def _check_sizes(self) -> None:
        """Every recorded file is there with its size: one stat a file, so that opening is cheap."""
        for name, entry in self._files.items():
            try:
                found = plain_size(self.path, name)
            except SaePipeError:
                raise
            except OSError:
                raise damaged(self.path, f"{name} is missing") from None
            if found != entry["bytes"]:
                raise damaged(
                    self.path, f"{name} has {found:,} bytes instead of {entry['bytes']:,}"
                )


def _check_form(manifest: dict[str, Any]) -> None:
    """KeyError, TypeError or ValueError unless it has what is there from the beginning."""
    for name in ("request", "recipe", "dropped", "truncated", "execution", "provenance"):
        if not isinstance(manifest[name], dict):
            raise TypeError(f"its {name} is {manifest[name]!r}")
    model = manifest["recipe"]["model"]
    if not isinstance(model, dict) or not isinstance(manifest["provenance"]["runs"], list):
        raise TypeError("its recipe or provenance is not an object")
    for name in ("name", "revision"):
        if name not in model:
            raise KeyError(name)
    if type(manifest["recipe"]["layer"]) is not int or not isinstance(manifest["tasks"], list):
        raise TypeError("its layer is no number or its tasks are no list")
    for name in ("state", "suite", "pooling"):
        if not isinstance(manifest[name], str):
            raise TypeError(f"its {name} is {manifest[name]!r}")
    for task in manifest["tasks"]:
        _task(task)
    for counts in (manifest["dropped"], manifest["truncated"]):
        if not all(type(n) is int for n in counts.values()):
            raise TypeError("it counts what is no number")
    sizes_of(manifest)


def _task(entry: dict[str, Any]) -> Task:
    """A task of a manifest; KeyError, TypeError or ValueError when it cannot be one."""
    name, classes, groups, note = (entry[key] for key in ("name", "classes", "groups", "note"))
    for names in (classes, [] if groups is None else groups, [name, note]):
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise TypeError(f"a task has {names!r}")
    return Task(name, classes, groups, note)


def _check_files(files: dict[str, dict[str, Any]], sizes: Sizes) -> None:
    """ValueError unless the files are those that the sizes ask for, all inside the folder."""
    for name, entry in files.items():
        if not is_plain_name(name) or name == MANIFEST:
            raise ValueError(f"it names the file {name!r}")
        if type(entry["bytes"]) is not int or entry["bytes"] < 1 or not is_sha256(entry["sha256"]):
            raise ValueError(f"file {name} has {entry!r}")
    n_chunks = {name: sizes.n_chunks(name) for name in ARRAYS}
    if sum(n_chunks.values()) > len(files):  # before any list as long as that is made
        raise ValueError(f"its sizes ask for more than the {len(files)} files it lists")
    for name, n in n_chunks.items():
        for chunk in range(n):
            if chunk_path(name, chunk) not in files:
                raise ValueError(f"{chunk_path(name, chunk)} is not among its files")
    if TOKENIZER not in files:
        raise ValueError(f"{TOKENIZER} is not among its files")
