"""sae-pipe store recode, import and export: stores made from stores and files, and files of stores."""

from pathlib import Path
from typing import Annotated

import typer

from ..stages.exporting import EXPORTERS
from ..stages.harvest_config import DEFAULT_BLOCK_BYTES
from ..storage.address import STORE_HELP, place
from ..storage.codecs import CODECS
from ..storage.values import VALUE_TYPES
from .bars import open_bar_of
from .cli_harvest import whole_bytes
from .errors import told_to_the_user
from .say import say

DEFAULT_BLOCK_GB = DEFAULT_BLOCK_BYTES / 1e9
_CODEC_HELP = "; ".join(f"{name}: {each.description}" for name, each in CODECS.items()) + "."


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `sae-pipe store`."""
    app.command()(recode)
    app.command("import")(import_)
    app.command()(export)


@told_to_the_user
def recode(
    source: Annotated[str, typer.Argument(help=f"The store to copy. {STORE_HELP}")],
    target: Annotated[Path, typer.Argument(help="The copy, such as acts-compact.zarr.")],
    codec: Annotated[str, typer.Option(help=_CODEC_HELP)],
    store_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Number format of the copy: {', '.join(VALUE_TYPES)}. Default: the store's."
        ),
    ] = None,
) -> None:
    """Write a store again with another codec, its rows in the same places.

    Every file is compared with its digest before it is used, and every new shard is read back. The
    same command goes on with a copy that was interrupted.
    """
    from ..storage.recode import recode as run

    run(place(source), target, codec, store_dtype, say=say, open_bar=open_bar_of("recode", "rows"))


@told_to_the_user
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="Activations: a .npy or .safetensors file or a folder of them, a `datasets` folder "
            "(SAELens' cached activations), or a Zarr array.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The store.")],
    tensor: Annotated[
        str | None,
        typer.Option(help="Tensor of .safetensors files, or a pattern such as 'acts_*'."),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Column of a dataset, such as blocks.3.hook_resid_post."),
    ] = None,
    array: Annotated[str | None, typer.Option(help="Array of a Zarr group.")] = None,
    context_size: Annotated[
        int | None,
        typer.Option(
            help="Of rows that stand by themselves: how many neighbours are one context, which is "
            "held out or trained on as a whole. Default: 1."
        ),
    ] = None,
    heldout_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows kept out of training, in whole contexts. Default: 1,000,000 or 1 %, the "
            "smaller."
        ),
    ] = None,
    codec: Annotated[str, typer.Option(help=_CODEC_HELP)] = "lossless",
    store_dtype: Annotated[
        str,
        typer.Option(help=f"Number format that values are rounded to: {', '.join(VALUE_TYPES)}."),
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the shuffle and the held-out rows.")] = 0,
    block_gb: Annotated[
        float,
        typer.Option(
            help="Size of the blocks that rows are shuffled in; two are in memory.",
            min=0.001,
            max=10_000,
        ),
    ] = DEFAULT_BLOCK_GB,
    model: Annotated[str | None, typer.Option(help="For the record: the model's name.")] = None,
    layer: Annotated[int | None, typer.Option(help="For the record: the block.")] = None,
    hook: Annotated[str | None, typer.Option(help="For the record: the hook point.")] = None,
    note: Annotated[str | None, typer.Option(help="For the record: anything else.")] = None,
) -> None:
    """Make a store from activations that exist already, shuffled as a harvest shuffles.

    Nothing is unpickled, and the input is never in memory as a whole. The same command goes on with
    a store that was interrupted.
    """
    from ..stages.store_import import ImportConfig, import_rows

    config = ImportConfig(
        source=source,
        out=out,
        members={"tensor": tensor, "column": column, "array": array},
        context_size=context_size,
        heldout_rows=heldout_rows,
        codec=codec,
        store_dtype=store_dtype,
        seed=seed,
        block_bytes=whole_bytes(block_gb),
        model=model,
        layer=layer,
        hook=hook,
        note=note,
    )
    import_rows(config, say=say, open_bar=open_bar_of("import", "rows"))


@told_to_the_user
def export(
    store: Annotated[str, typer.Argument(help=STORE_HELP)],
    out: Annotated[Path, typer.Argument(help="The folder to write, which must not be there.")],
    format: Annotated[
        str,
        typer.Option(
            help="; ".join(f"{name}: {each.about}" for name, each in EXPORTERS.items()) + "."
        ),
    ],
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format: float32, float16, or bfloat16 (safetensors). Default: the store's "
            "where nothing is lost by it, else float32."
        ),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="A:B for rows A to B - 1 in stored order. Default: all.")
    ] = None,
) -> None:
    """Write the rows of a store as files that other tools open, in stored order.

    Their source indices stand beside them, and export.json says where they come from.
    """
    from ..stages.store_export import ExportConfig, export_rows

    config = ExportConfig(
        store=place(store), out=out, format=format, split=split, dtype=dtype, rows=rows
    )
    export_rows(config, say=say, open_bar=open_bar_of("export", "rows"))
