"""Repair of a store: what is damaged is made once more, and nothing else is touched.

Everything but the tokens follows from something that the store holds. `source` and `masked` follow
from the tokens and the recipe, zarr.json from the sizes, the statistics from the rows; activations
need the model, but not the text. Rows of a shard are scattered over all contexts of its block, so
the whole block runs through the model and only its damaged shards are written. Tokens are copied
from a store beside it that has the same ones.

On the hardware and versions of the harvest the bytes are the same. Elsewhere a shard may come out
with other roundings: then it is compared with rows of the store that are whole, kept if the
difference is smaller than what a lossy codec costs, and noted in the manifest (docs/store-format.md).
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..storage import provenance, zarr_metadata
from ..storage.builder import StoreBuilder, statistics_entry
from ..storage.card import write_card
from ..storage.corpus import CORPUS_JSON, Corpus
from ..storage.errors import InputError, StoreError
from ..storage.files import (
    check_no_links,
    file_digest,
    fsync_folder,
    remove_leftovers,
    write_json,
    write_whole,
)
from ..storage.lock import sole_writer
from ..storage.manifest import (
    COMMITS,
    COMPLETE,
    TOKENISING,
    Manifest,
    began_by,
    content_digest,
    read_manifest,
    write_manifest,
)
from ..storage.repair import ASIDE, moments_of_rows
from ..storage.signed import SIGNATURE_IS_GONE, remove_signature
from ..storage.verify import (
    OTHER,
    SHARD,
    TOKENS,
    Damage,
    content_below,
    find_damage,
    stored_files,
    verify_store,
    wrong_in_manifest,
)
from ..storage.writer import write_vectors
from .block_buffer import FOLDER as BLOCK_FOLDER
from .progress import progress
from .repair_rows import RowRepair
from .tokens import TextTokenizer

_TOKENIZER, _LOST = "tokenizer.json", "statistics/relative_error/c/0"

Say = Callable[[str], None]


def repair(
    path: Path,
    *,
    model: str | None = None,
    device: str | None = None,
    say: Say = print,
    show_progress: bool = True,
) -> None:
    """Make what is damaged in a store once more.

    model: where the model is, None for where the harvest had it; device: None for the kind that it
    was harvested on, if that is here. Can be killed at any instant and called again. Raises
    StoreError when something cannot be made again, InputError for another model, DiskError.
    """
    manifest = read_manifest(path)
    if manifest.get("state") == TOKENISING:
        raise InputError(
            f"Store {path} has no shards yet that could be repaired. Run the `sae-pipe harvest` "
            "command that began it once more; it goes on where it stopped."
        )
    with sole_writer(path, "Store"):
        check_no_links(path)
        remove_leftovers(path, deep=True)
        shutil.rmtree(path / ASIDE, ignore_errors=True)
        manifest = read_manifest(path)
        job = _Repair(path, manifest, model, device, say, show_progress=show_progress)
        if manifest.get("state") == COMPLETE:
            job.run()
        else:
            job.withdraw()
        shutil.rmtree(path / ASIDE, ignore_errors=True)


class _Repair:
    """One repair, whose caller holds the store's lock."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        model: str | None,
        device: str | None,
        say: Say,
        *,
        show_progress: bool,
    ) -> None:
        self.path, self.manifest, self._say, self._show = path, manifest, say, show_progress
        self._rows = RowRepair(path, manifest, model, device, say, show_progress=show_progress)
        self._changed = self._rows.changed
        self._copied = 0  # files of the tokens

    def run(self) -> None:
        """Repair a complete store, what is cheap first."""
        damages = self._look()
        if not damages:
            self._say(f"{self.path} is whole: there is nothing to repair.")
            return
        for damage in damages:
            self._say(f"{damage.file.name}: {damage.what}")
        before = self.manifest["digest"]
        damages = self._set_records_right(damages)
        damages = self._copy_tokens(damages)
        names = {damage.file.name for damage in damages if damage.file.kind == OTHER}
        self._make_metadata(names)
        shards = [damage for damage in damages if damage.file.kind == SHARD]
        if shards:
            self._rows.check_recipe()
        self._rows.make_positions([d for d in shards if d.file.array != "activations"])
        rows_changed = self._rows.make_activations(
            [d for d in shards if d.file.array == "activations"]
        )
        self._make_statistics(names, rows_changed=rows_changed)
        if self._changed:
            self._note(before)
        shutil.rmtree(self.path / BLOCK_FOLDER, ignore_errors=True)
        self._look_again([d for d in damages if d.file.name not in {_TOKENIZER, _LOST}])
        # Last, what may turn out to be lost and which no row needs.
        if _TOKENIZER in names:
            self._copy_tokenizer()
        if _LOST in names:
            raise StoreError(
                f"{self.path / _LOST} is damaged: it says what the lossy codec has cost, which "
                "cannot be counted without the rows before encoding. Fetch that file again; "
                "nothing that reads rows needs it. Everything else is repaired."
            )
        self._say(self._closing(damages))

    def withdraw(self) -> None:
        """Of an unfinished store: damaged shards lose their commit records, and so do not exist."""
        damages = self._look()
        shards = {(d.file.split, d.file.shard) for d in damages if d.file.kind == SHARD}
        others = [damage for damage in damages if damage.file.kind != SHARD]
        for split, shard in sorted(shards):
            (self.path / COMMITS / split / f"{shard:08d}.json").unlink(missing_ok=True)
        if others:
            self._copy_tokens(others)
        if not damages:
            self._say(f"The sealed shards of {self.path} are whole: there is nothing to repair.")
            return
        self._say(
            f"{self.path} is unfinished: {len(shards)} damaged shards do not count as sealed any "
            f"more. Run the `sae-pipe {began_by(self.manifest)}` command that began it once more; it "
            "makes them again."
        )

    def _look(self) -> list[Damage]:
        files = stored_files(self.path, self.manifest)
        total = sum(file.bytes for file in files)
        with progress(total, "verify", "B", show=self._show) as bar:
            return verify_store(self.path, self.manifest, files, bar.update)

    # --- the records, the tokens, the small files ---

    def _set_records_right(self, damages: list[Damage]) -> list[Damage]:
        """Sizes in the manifest that are not those of files with the right digest."""
        wrong = [damage for damage in damages if damage.is_record_wrong]
        for damage in wrong:
            file = damage.file
            if file.kind == SHARD:
                records = self.manifest[file.split]["shards"][file.shard]["files"]
                records[file.array]["bytes"] = (self.path / file.name).stat().st_size
            elif file.name in self.manifest.get("files", {}):
                size = (self.path / file.name).stat().st_size
                self.manifest["files"][file.name]["bytes"] = size
        what = wrong_in_manifest(self.path, self.manifest)
        if what is not None:
            raise StoreError(
                f"manifest.json of {self.path} is not the one that was written: {what}. Nothing "
                "else in the store says what is right: fetch that file again, or harvest the store "
                "again."
            )
        if wrong:
            self._write_manifest()
            self._say("The manifest's sizes are those of the files again.")
        return [damage for damage in damages if not damage.is_record_wrong]

    def _copy_tokens(self, damages: list[Damage]) -> list[Damage]:
        """Damaged files of the tokens come from a store beside this one that has the same tokens.

        Returns what else is damaged, which is known once corpus.json is there again.
        """
        others = [damage for damage in damages if damage.file.kind != TOKENS]
        if len(others) == len(damages):
            return damages
        twins = self._twins()
        if any(damage.file.name.endswith(CORPUS_JSON) for damage in damages):
            for twin in twins[:1]:
                data = (twin / CORPUS_JSON).read_bytes()
                self._copied += 1
                write_whole(self.path / "corpus" / CORPUS_JSON, data)
        tokens = [f for f in stored_files(self.path, self.manifest) if f.kind == TOKENS]
        lacking = find_damage(content_below(self.path), tokens)
        if not twins or (lacking and not tokens):
            raise self._tokens_are_lost(damages)
        for damage in lacking:
            below = damage.file.name.removeprefix("corpus/")
            sources = (twin / below for twin in twins)
            whole = next((s for s in sources if _has_digest(s, damage.file.sha256)), None)
            if whole is None:
                raise self._tokens_are_lost([damage])
            write_whole(self.path / damage.file.name, whole.read_bytes())
            self._copied += 1
            self._say(f"{damage.file.name}: copied from {whole.parents[len(Path(below).parts)]}")
        return others

    def _twins(self) -> list[Path]:
        """Corpora of the stores beside this one that have the same digest."""
        found = []
        for file in sorted(self.path.absolute().parent.glob(f"*/corpus/{CORPUS_JSON}")):
            if file.parent.parent == self.path.absolute():
                continue
            try:
                corpus = Corpus(file.parent, check_files=False)
            except StoreError:
                continue
            if corpus.digest == self.manifest["corpus"]["digest"]:
                found.append(file.parent)
        return found

    def _tokens_are_lost(self, damages: list[Damage]) -> StoreError:
        name = next(d.file.name for d in damages if d.file.kind == TOKENS)
        return StoreError(
            f"The tokens of {self.path} are damaged ({name}), and no store beside it has the same "
            "ones whole. Put a store of the same text into that folder and run this again, fetch "
            "the file again, or harvest the store again."
        )

    def _make_metadata(self, names: set[str]) -> None:
        """zarr.json files: functions of the sizes and the codec."""
        wanted = sorted(name for name in names if name.split("/")[-1] == "zarr.json")
        if not wanted:
            return
        builder = StoreBuilder(self.path, self.manifest)
        members, corpus = builder.zarr_members(*builder.layouts())
        for name in wanted:
            if name == "zarr.json":
                write_json(self.path / name, zarr_metadata.group({**members, **corpus}))
            elif name.removesuffix("/zarr.json") in members:
                write_json(self.path / name, members[name.removesuffix("/zarr.json")])
            self._record_other(name)

    def _copy_tokenizer(self) -> None:
        """tokenizer.json: from a store beside this one, or from the model."""
        digest = self.manifest["files"][_TOKENIZER]["sha256"]
        target = self.path / _TOKENIZER
        beside = sorted(self.path.absolute().parent.glob(f"*/{_TOKENIZER}"))
        whole = next((file for file in beside if _has_digest(file, digest)), None)
        if whole is not None:
            write_whole(target, whole.read_bytes())
            return
        self._rows.check_recipe()
        name, commit = self._rows.model_name()
        aside = self.path / ASIDE / target.name
        TextTokenizer.load(name, commit).save(aside)
        if not _has_digest(aside, digest):
            raise StoreError(
                f"{target} is damaged, and the tokenizer of {name} is another one now. Fetch that "
                "file again; the rows do not need it. Everything else is repaired."
            )
        os.replace(aside, target)
        fsync_folder(self.path)

    def _record_other(self, name: str) -> None:
        """Note the digest of a file that is right by what it was made from, if it is another."""
        file, entry = self.path / name, self.manifest["files"][name]
        digest = file_digest(file)
        if digest != entry["sha256"]:
            self._changed[name] = {"was": entry["sha256"], "is": digest}
            entry |= {"bytes": file.stat().st_size, "sha256": digest}

    # --- statistics, the manifest, the last look ---

    def _make_statistics(self, names: set[str], *, rows_changed: bool) -> None:
        """Mean and variance of the rows, read from the shards."""
        vectors = [f"statistics/{name}/c/0" for name in ("mean", "variance")]
        if not rows_changed and not names & set(vectors):
            return
        builder = StoreBuilder(self.path, self.manifest)
        train, _ = builder.layouts()
        with progress(train.n_rows, "statistics", "rows", show=self._show) as bar:
            records = self.manifest["train"]["shards"]
            cuts = self.manifest["recipe"].get("extended_at", ())
            moments = moments_of_rows(
                self.path, train, builder.codec, records, bar.update, cuts=cuts
            )
        write_vectors(
            self.path,
            {"statistics/mean": moments.mean, "statistics/variance": moments.variance},
        )
        for name in vectors:
            self._record_other(name)
        if rows_changed or self._changed.keys() & set(vectors):
            self.manifest["statistics"] = statistics_entry(moments)

    def _note(self, before: str) -> None:
        """Record in the manifest what is not bit for bit what it was."""
        self.manifest["digest"] = content_digest(self.manifest)
        difference = self._rows.difference
        entry = {
            "repaired": provenance.now(),
            "files": self._changed,
            "relative_difference": difference.relative if difference.rows else None,
            "digest_before": before,
            "hardware": provenance.hardware(),
            "device": str(self._rows.device) if self._rows.device else None,
            "versions": provenance.versions(),
        }
        self.manifest["provenance"].setdefault("repairs", []).append(entry)
        write_card(self.path, self.manifest)
        self._write_manifest()

    def _write_manifest(self) -> None:
        """Write it anew; the signature of the one before goes first."""
        if remove_signature(self.path):
            self._say(SIGNATURE_IS_GONE)
        write_manifest(self.path, self.manifest)

    def _look_again(self, damages: list[Damage]) -> None:
        """What was made again has the digests that the manifest records now."""
        made = {damage.file.name for damage in damages}
        files = [f for f in stored_files(self.path, self.manifest) if f.name in made]
        for damage in find_damage(content_below(self.path), files):
            raise StoreError(
                f"{self.path / damage.file.name} was made again, but {damage.what}: the disk does "
                "not keep what is written to it. Copy the store to another one."
            )

    def _closing(self, damages: list[Damage]) -> str:
        same = self._copied + len([d for d in damages if d.file.name not in self._changed])
        if not self._changed:
            return f"{self.path} is whole again: {same} files, bit for bit as they were harvested."
        return (
            f"{self.path} is whole again: {same} files as they were harvested, and "
            f"{len(self._changed)} with new digests, which the manifest lists under `repairs`."
        )


def _has_digest(file: Path, digest: str) -> bool:
    try:
        return file_digest(file) == digest
    except OSError:
        return False
