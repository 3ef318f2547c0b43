"""Rows of a damaged store made again: `source` and `masked` from the tokens, activations by the model.

# R rows of a shard
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..storage import provenance
from ..storage.builder import StoreBuilder
from ..storage.corpus import Corpus
from ..storage.errors import InputError, StoreError
from ..storage.files import file_digest, write_whole
from ..storage.layout import Layout
from ..storage.manifest import Manifest
from ..storage.repair import Difference, ShardRepairer
from ..storage.verify import SPLITS, Damage, StoredFile, is_harvested
from ..storage.writer import plain_frame
from .devices import DTYPES, available_devices, pick_device
from .harvest_run import BlockPipeline, Pass, encode_threads
from .hooks import HookedModel
from .masking import MaskConfig
from .models import inspect_model, load_truncated
from .progress import progress
from .row_map import KeepRule, RowMap

# --codec compact costs this much, and fits do not notice it. Between the whole of float32 and
# bfloat16 arithmetic the rows of a model of 4 layers differ by 0.0001 of their variance.
MOST_DIFFERENCE = 0.005
_MEMORY_SHARE = 0.7

Say = Callable[[str], None]


class RowRepair:
    """Makes damaged shards of one store once more; the caller holds its lock.

    manifest: changed in place where a digest is another one now, and not written; changed: those
    files, with the digest that was and the one that is; difference: of rows computed now and then.
    """

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
        """model, device: as in `repair`."""
        self.path, self.manifest, self._say, self._show = path, manifest, say, show_progress
        self._model, self._device = model, device
        self.changed: dict[str, dict[str, str]] = {}
        self.difference = Difference()
        self.device: torch.device | None = None

    def check_recipe(self) -> None:
        """StoreError unless the recipe says how the rows were made."""
        if not is_harvested(self.manifest):
            raise StoreError(
                f"Store {self.path} was not harvested by sae-pipe, or was recoded with loss since, "
                "so its rows cannot be made again. Fetch the damaged files again, or import or "
                "recode it again."
            )

    # --- source and masked ---

    def _row_map(self, split: str) -> RowMap:
        recipe = self.manifest["recipe"]
        mask, is_train = recipe["mask"], split == "train"
        rule = KeepRule(
            keep_first=recipe["keep_first"],
            bos_id=recipe["corpus"]["tokenizer"]["bos_id"],
            drop_masked=recipe["drop_masked"] and is_train,
        )
        config = MaskConfig(
            p=mask["p"] if is_train else 0.0,
            mask_id=mask["id"],
            seed=recipe["seed"],
            special_ids=tuple(mask["special_ids"]),
        )
        corpus = Corpus(self.path / "corpus")
        table = corpus.train if is_train else corpus.heldout
        return RowMap(
            table,
            rule,
            config,
            shuffle_seed=recipe["seed"] if is_train else None,
            cuts=tuple(recipe.get("extended_at", ())) if is_train else (),
        )

    def make_positions(self, damages: list[Damage]) -> None:
        """`source` and `masked` follow from the tokens and the recipe: no model is needed."""
        by_block: dict[tuple[str, int], list[Damage]] = {}
        layouts = dict(zip(SPLITS, StoreBuilder(self.path, self.manifest).layouts(), strict=True))
        for damage in damages:
            layout = layouts[damage.file.split]
            block = damage.file.shard * layout.shard_rows // layout.block_rows
            by_block.setdefault((damage.file.split, block), []).append(damage)
        maps = {split: self._row_map(split) for split in {split for split, _ in by_block}}
        for (split, block), members in sorted(by_block.items()):
            layout, rows = layouts[split], maps[split].block(layouts[split], block)
            source_R, masked_R = rows.stored(rows.source_R), rows.stored(rows.masked_R)
            for file in (damage.file for damage in members):
                first, last = layout.rows_of_shard(file.shard)
                part = slice(first - rows.first_row, last - rows.first_row)
                values_R = source_R[part] if file.array == "source" else masked_R[part]
                frame = plain_frame(file.array, values_R, layout.shard_rows)
                write_whole(self.path / file.name, frame)
                digest = file_digest(self.path / file.name)
                if digest != file.sha256:  # the same numbers, compressed by another version
                    size = (self.path / file.name).stat().st_size
                    self._record_shard(file, {"bytes": size, "sha256": digest})

    def _record_shard(self, file: StoredFile, record: dict[str, Any]) -> None:
        entry = self.manifest[file.split]["shards"][file.shard]["files"]
        self.changed[file.name] = {"was": file.sha256, "is": record["sha256"]}
        entry[file.array] = record

    # --- activations ---

    def make_activations(self, damages: list[Damage]) -> bool:
        """Run the damaged blocks through the model; True when rows are not bit for bit the same."""
        if not damages:
            return False
        model = self._load()
        builder = StoreBuilder(self.path, self.manifest)
        layouts = dict(zip(SPLITS, builder.layouts(), strict=True))
        redo: dict[str, set[int]] = {split: set() for split in SPLITS}
        for damage in damages:
            redo[damage.file.split].add(damage.file.shard)
        with ThreadPoolExecutor(encode_threads(), thread_name_prefix="encode") as pool:
            repairers = {
                split: ShardRepairer(
                    self.path,
                    folder,
                    layouts[split],
                    builder.codec,
                    pool,
                    records=self.manifest[split]["shards"],
                    redo=redo[split],
                    compare=_whole_neighbours(layouts[split], redo[split]),
                    difference=self.difference,
                )
                for split, folder in SPLITS.items()
            }
            try:
                self._run_blocks(model, [self._pass(s, repairers[s]) for s in SPLITS if redo[s]])
                if any(r.differing for r in repairers.values()):
                    if self.difference.rows == 0:
                        self._compare_elsewhere(model, repairers, redo)
                    self._check_difference(repairers)
                    for split, repairer in repairers.items():
                        self._accept(split, repairer, damages)
            finally:
                for repairer in repairers.values():
                    repairer.close()
        return any(r.differing for r in repairers.values())

    def model_name(self) -> tuple[str, str | None]:
        """Name or folder of the model, and the Hub's commit."""
        recipe = self.manifest["recipe"]["model"]
        name = self._model or self.manifest.get("request", {}).get("model") or recipe["name"]
        is_folder = str(recipe["revision"]).startswith("sha256:") or Path(name).is_dir()
        return str(name), None if is_folder else str(recipe["revision"])

    def _load(self) -> HookedModel:
        recipe = self.manifest["recipe"]
        name, commit = self.model_name()
        info = inspect_model(name, commit)
        if info.revision != recipe["model"]["revision"]:
            raise InputError(
                f"Model {name} is not the one that {self.path} was harvested from: its revision is "
                f"{info.revision[:23]}, and the store's is {recipe['model']['revision'][:23]} of "
                f"{recipe['model']['name']}. Pass that one with --model."
            )
        harvested_on = str(self.manifest["execution"]["device"]).partition(":")[0]
        default = harvested_on if harvested_on in available_devices() else "auto"
        self.device = pick_device(self._device or default)
        return load_truncated(
            info, (recipe["layer"],), recipe["hook"], self.device, DTYPES[recipe["dtype"]]
        )

    def _pass(self, split: str, writer: ShardRepairer) -> Pass:
        return Pass(
            label=f"repair-{split}",
            rows=self._row_map(split),
            layout=writer.layout,
            batch_contexts=int(self.manifest["execution"]["batch_contexts"]),
            values=writer.codec.values,
            writers={self.manifest["recipe"]["layer"]: [writer]},
        )

    def _run_blocks(self, model: HookedModel, passes: list[Pass]) -> None:
        for each in passes:
            layout = each.layout
            needed = 2 * layout.block_rows * layout.d_in * each.values.bytes
            if needed > _MEMORY_SHARE * provenance.memory_bytes():
                raise InputError(
                    f"Two blocks of {self.path} need {needed / 1e9:.1f} GB of memory, and this "
                    f"machine has {provenance.memory_bytes() / 1e9:.1f} GB. Repair it on a larger "
                    "one."
                )
        tasks = [(p, b) for p in passes for b in range(p.layout.n_blocks) if p.missing(b)]
        spans = [job.layout.rows_of_block(block) for job, block in tasks]
        total = sum(last - first for first, last in spans)
        with progress(total, "repair", "rows", show=self._show) as bar:
            pipeline = BlockPipeline(
                model,
                note_every_s=60.0,
                tokens_per_s=self.manifest["execution"]["tokens_per_s"],
                advance=bar.update,
            )
            try:
                pipeline.run_all(tasks)
            finally:
                pipeline.close()

    def _compare_elsewhere(
        self, model: HookedModel, repairers: dict[str, ShardRepairer], redo: dict[str, set[int]]
    ) -> None:
        """No row of the damaged blocks can be read: compute a whole shard of another block."""
        for split, repairer in repairers.items():
            whole = sorted(set(range(repairer.layout.n_shards)) - redo[split])
            if whole:
                repairer.committed.discard(whole[0])
                self._run_blocks(model, [self._pass(split, repairer)])
                return

    def _check_difference(self, repairers: dict[str, ShardRepairer]) -> None:
        """StoreError unless what was computed now is nearly what was computed then."""
        found = self.difference
        n_shards = sum(len(repairer.differing) for repairer in repairers.values())
        what = (
            f"{n_shards} shards of {self.path} came out with other digests than were recorded, "
            f"here on {provenance.hardware()['processor']}, {self.device}"
        )
        if found.rows == 0:
            raise StoreError(
                f"{what}, and no row of the store is whole that they could be compared with. "
                "Repair it on the hardware and with the versions that `sae-pipe store info` shows, "
                "or harvest it again."
            )
        if found.relative > MOST_DIFFERENCE:
            raise StoreError(
                f"{what}, and {found.rows:,} rows that are whole differ by {found.relative:.2g} "
                f"(relative squared error; at most {MOST_DIFFERENCE:g} is accepted). The store is "
                "left as it was. Repair it on the hardware and with the versions that "
                "`sae-pipe store info` shows, or harvest it again."
            )
        self._say(
            f"{what}. They are kept: {found.rows:,} rows that are whole differ by "
            f"{found.relative:.2g} (relative squared error). The store's digest is another one now."
        )

    def _accept(self, split: str, repairer: ShardRepairer, damages: list[Damage]) -> None:
        files = {d.file.shard: d.file for d in damages if d.file.split == split}
        for shard, record in repairer.accept().items():
            self._record_shard(files[shard], record)


def _whole_neighbours(layout: Layout, redo: set[int]) -> set[int]:
    """One whole shard of each damaged block that has one: its rows are computed anyway."""
    found = set()
    for block in {shard * layout.shard_rows // layout.block_rows for shard in redo}:
        found |= set([s for s in layout.shards_of_block(block) if s not in redo][:1])
    return found
