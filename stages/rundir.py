"""The folder of one run, and what survives a crash in it.

    config.json          the recipe with everything resolved, the store's digest, the SAE's shape
    metrics.jsonl        one JSON object a line, each step at most once, in order
    checkpoint/          checkpoint.json names the last state-STEP.safetensors; gone at the end
    sae.safetensors      the weights, on raw activations
    curve.png            the training curves
    summary.json         written last: a run that has one is complete

Every file but metrics.jsonl is written whole or not at all; of metrics.jsonl a resumed run keeps
the lines up to its checkpoint.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..storage import provenance
from ..storage.errors import InputError, StoreError
from ..storage.files import (
    disk_error,
    is_leftover,
    read_plain,
    remove_leftovers,
    write_json,
    write_whole,
)
from ..storage.plain_json import parse_plain_json
from .sae.weights import (
    CONFIG_LIMIT_BYTES,
    FORMAT,
    FORMAT_VERSION,
    is_run_config,
    load_config,
    read_config,
    read_safetensors,
)

METRICS_LIMIT_BYTES = 1 << 28
_STATE = re.compile(r"state-[0-9]{1,20}\.safetensors", re.ASCII)

Line = dict[str, Any]


class RunFolder:
    """Reads and writes a run folder. Who writes holds its lock (`storage.lock.sole_writer`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.checkpoint_folder = path / "checkpoint"

    def check_place(self) -> None:
        """InputError when something that is not a run of ours stands there; touches nothing.

        StoreError when it is a run, but a damaged one.
        """
        try:
            self._check_links()
            if self.config_file.is_file():
                is_ours = is_run_config(load_config(self.path))
            elif self.path.is_dir():
                # What a fit leaves that was killed before it had a config.json.
                is_ours = all(
                    entry.name == ".lock" or self._is_first_leftover(entry.name)
                    for entry in self.path.iterdir()
                )
            else:
                is_ours = not self.path.exists()
        except OSError as error:
            raise disk_error(error, self.path) from error
        if not is_ours:
            raise InputError(
                f"{self.path} exists and is not a run of sae-pipe. "
                "Pass another --out, or move it away."
            )

    def _check_links(self) -> None:
        """InputError for a link that would lead what is written here somewhere else."""
        for place in (self.metrics_file, self.checkpoint_folder):
            if place.is_symlink():
                raise InputError(
                    f"{place} is a symbolic link, and nothing is written through one. Put what it "
                    "leads to in its place, or pass another --out."
                )

    def _is_first_leftover(self, name: str) -> bool:
        return is_leftover(name) and name.startswith(f".{self.config_file.name}.")

    def remove_leftovers(self) -> None:
        """Remove what killed writers left. The caller knows that the folder is a run of ours."""
        remove_leftovers(self.path, deep=False)
        remove_leftovers(self.checkpoint_folder, deep=False)

    def begin(self, recipe: dict[str, Any], details: dict[str, Any]) -> None:
        """Write config.json, unless it is there, which `check_same` has looked at.

        recipe: what decides the weights, compared; details: the rest, recorded only.
        """
        if self.config_file.is_file():
            return
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "recipe": recipe,
            **details,
            "provenance": {
                "begun": provenance.now(),
                "command": provenance.command_line(),
                "versions": provenance.versions(),
                "hardware": provenance.hardware(),
            },
        }
        write_json(self.config_file, config)

    def recipe(self) -> dict[str, Any]:
        """What decides the weights of the run that was begun here; empty when none was."""
        if not self.config_file.is_file():
            return {}
        found = read_config(self.path).get("recipe")
        # Recipes of one process have not always said so.
        return {"world_size": 1} | found if isinstance(found, dict) else {}

    def check_same(self, recipe: dict[str, Any]) -> None:
        """InputError that shows the difference when config.json is there with another recipe.

        StoreError when it is damaged.
        """
        if not self.config_file.is_file():
            return
        wanted = json.loads(json.dumps(recipe))  # tuples become lists, as they come back
        found = self.recipe()
        differing = [
            f"{name}={found.get(name)!r} there and {wanted.get(name)!r} here"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.path} holds a run of another configuration: {'; '.join(differing)}. "
                "Pass another --out, or the configuration of that run."
            )

    def summary(self) -> dict[str, Any] | None:
        """The summary of a complete run, None of an unfinished one."""
        if not self.summary_file.is_file():
            return None
        return dict(_load_json(self.summary_file))

    def write_checkpoint(
        self, state: Mapping[str, Tensor], progress: dict[str, Any], *, keep: int = 1
    ) -> None:
        """Add a checkpoint: the new state is whole on disk before the oldest one goes.

        progress: plain values that go on with the run; must have `step`. keep: how many of the last
        stay. Raises DiskError.
        """
        name = f"state-{progress['step']:010d}.safetensors"
        tensors = {key: value.cpu().contiguous() for key, value in state.items()}
        write_whole(self.checkpoint_folder / name, save(tensors, {"format": "pt"}))
        older = [each for each in self._checkpoints() if each["step"] < progress["step"]]
        older = older[: keep - 1]
        newest = {"state": name, **progress}
        write_json(
            self.checkpoint_folder / "checkpoint.json",
            newest | ({"older": older} if older else {}),
        )
        kept = {name, *(each["state"] for each in older)}
        for old in self.checkpoint_folder.glob("state-*.safetensors"):
            if old.name not in kept:
                old.unlink()

    def read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest state whose file is there, and its progress; None when there is none yet.

        So a run goes on from an older checkpoint once the newer files are removed.
        """
        found = self._checkpoints()
        if not found:
            return None
        there = (e for e in found if (self.checkpoint_folder / e["state"]).is_file())
        progress = next(there, found[0])
        return read_safetensors(self.checkpoint_folder / progress["state"]), progress

    def _checkpoints(self) -> list[dict[str, Any]]:
        """State and progress of those that are kept, the newest first."""
        file = self.checkpoint_folder / "checkpoint.json"
        if not file.is_file():
            return []
        newest = dict(_load_json(file))
        older = newest.pop("older", [])
        found = [newest, *(older if isinstance(older, list) else [None])]
        if not all(isinstance(each, dict) and _is_state(each.get("state")) for each in found):
            raise StoreError(
                f"{file} is damaged: it names no state of this run. Remove the folder it is in to begin "
                "the run anew."
            )
        return found

    def remove_checkpoint(self) -> None:
        """Free the space of a complete run's checkpoint; nothing is lost if that fails."""
        with suppress(OSError):
            for file in self.checkpoint_folder.glob("state-*.safetensors"):
                file.unlink()
            (self.checkpoint_folder / "checkpoint.json").unlink(missing_ok=True)
            self.checkpoint_folder.rmdir()

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after a step, and what a crash or a power cut left at the end."""
        if self.metrics_file.is_file():
            kept = [line for line in self.read_metrics() if line["step"] <= step]
            write_whole(self.metrics_file, b"".join(_as_line(line) for line in kept))

    def append_metrics(self, lines: list[Line], *, durably: bool) -> None:
        """Add lines. durably: they survive a power cut, at the price of waiting for the disk.

        A kill loses nothing either way. Asked for before each checkpoint, so that none is ahead of
        its metrics, and not in between: on a busy disk it takes as long as a training step.
        """
        try:
            with self.metrics_file.open("ab") as file:
                file.write(b"".join(_as_line(line) for line in lines))
                file.flush()
                if durably:
                    os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.metrics_file) from error

    def read_metrics(self) -> list[Line]:
        """All lines up to the first that is not whole.

        A kill cuts the last one off. A power cut may leave anything, zeros among them, in place of
        what was written after the last checkpoint.
        """
        if not self.metrics_file.is_file():
            return []
        if self.metrics_file.stat().st_size > METRICS_LIMIT_BYTES:
            raise StoreError(
                f"{self.metrics_file} has more than the {METRICS_LIMIT_BYTES:,} bytes that a run writes. "
                "It was not read: fetch or fit the run again."
            )
        *whole, _ = self.metrics_file.read_bytes().split(b"\n")
        return list(itertools.takewhile(_is_whole, map(_parse, whole)))


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: NaN and Inf, which it does not know, become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _parse(line: bytes) -> Any:
    try:
        return parse_plain_json(line)
    except ValueError:
        return None


def _is_state(name: object) -> bool:
    return isinstance(name, str) and _STATE.fullmatch(name) is not None


def _is_whole(line: Any) -> bool:
    return isinstance(line, dict) and type(line.get("step")) is int


def _as_line(line: Line) -> bytes:
    return json.dumps(plain(line), allow_nan=False).encode() + b"\n"


def _load_json(file: Path) -> dict[str, Any]:
    try:
        found = parse_plain_json(read_plain(file.parent, file.name, CONFIG_LIMIT_BYTES))
    except ValueError as error:
        raise StoreError(
            f"{file} is damaged: it is not JSON ({error}). Remove the run folder and fit again."
        ) from error
    if not isinstance(found, dict):
        raise StoreError(
            f"{file} is damaged: it is no JSON object. Remove the run folder and fit again."
        )
    return found
