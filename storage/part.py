"""The first shards of a store as a store of their own: its manifest, and the files that are made for it.

Shards, held-out rows and tokens are those of the whole store, byte for byte. Statistics and metadata
say other things of fewer rows, so they are made anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import zarr_metadata
from .address import Place, described
from .builder import StoreBuilder, statistics_entry
from .codecs import codec_of
from .errors import SaePipeError, StoreError
from .manifest import Manifest, content_digest, layout_of
from .repair import moments_of_rows
from .writer import write_vectors

_VECTORS = ("statistics/mean", "statistics/variance")


def train_of_part(manifest: Manifest, n_shards: int, place: Place) -> dict[str, Any]:
    """What the manifest says of the training rows of the first shards of a store at a place."""
    with _of_what_is_recorded(place):
        n_rows = layout_of(manifest["train"], place).rows_of_shard(n_shards - 1)[1]
        return {
            "layout": manifest["train"]["layout"] | {"n_rows": n_rows},
            "shards": manifest["train"]["shards"][:n_shards],
        }


def names_made(target: Path, manifest: Manifest, place: Place) -> list[str]:
    """Names of the files of a part that are made, not fetched; corpus/ has come to the target."""
    with _of_what_is_recorded(place):
        builder = StoreBuilder(target, manifest)
        members, _ = builder.zarr_members(*builder.layouts())
        return [
            "zarr.json",
            *(f"{name}/zarr.json" for name in members),
            *(f"{name}/c/0" for name in _VECTORS),
        ]


def manifest_of_part(target: Path, manifest: Manifest, place: Place, n_shards: int) -> Manifest:
    """The manifest of the first shards, with the files that say other things of fewer rows.

    target: with all other files of the part; manifest: of the whole store, which is at `place`.
    Raises StoreError when a shard is damaged, or the manifest lacks what a part needs.
    """
    with _of_what_is_recorded(place):
        whole, heldout = (layout_of(manifest[name], target) for name in ("train", "heldout"))
        part = dict(manifest)
        for name in ("request", "shuffle"):  # of the whole
            part.pop(name, None)
        part["train"] = train_of_part(manifest, n_shards, place)
        layout = layout_of(part["train"], target)
        moments = moments_of_rows(target, layout, codec_of(manifest), part["train"]["shards"])
        write_vectors(target, dict(zip(_VECTORS, (moments.mean, moments.variance), strict=True)))
        part["statistics"] = statistics_entry(moments)
        made = manifest.get("provenance")  # nobody needs it to read rows, so it may be anything
        part["provenance"] = (made if isinstance(made, dict) else {}) | {
            "sampled": {
                "store": Path(described(place)).name,
                "digest": manifest["digest"],
                "rows": whole.n_rows,
            }
        }
        builder = StoreBuilder(target, part)
        members, corpus = builder.zarr_members(layout, heldout)
        zarr_metadata.write_metadata(target, members, already_there=corpus)
        part["files"] = builder.other_files()
        part["digest"] = content_digest(part)
        return part


@contextmanager
def _of_what_is_recorded(place: Place) -> Iterator[None]:
    try:
        yield
    except SaePipeError:
        raise  # some are ValueErrors too
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(
            f"The manifest of {place} is damaged: no part can be made of it ({error}). Push or "
            "harvest the store again."
        ) from error
