"""sae-pipe harvest"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from ..stages.dedup import DEDUPS
from ..stages.harvest_config import DEFAULT_BLOCK_BYTES, HarvestConfig
from ..stages.taps import DEFAULT_HOOK, HOOKS
from ..storage.address import Address, expanded, place
from ..storage.catalogue import CATALOG, catalogue_place
from ..storage.codecs import CODECS
from ..storage.values import VALUE_TYPES
from .bars import open_bar_of
from .errors import HELD, told_to_the_user
from .say import say

_MODEL, _TEXT, _ROWS, _RUN = "What is hooked", "Text", "Rows and masking", "How it runs"


@told_to_the_user
def harvest(
    model: Annotated[
        str,
        typer.Option(
            help="A local folder, a Hub id, or a short name such as pythia-160m or gemma-2-2b.",
            rich_help_panel=_MODEL,
        ),
    ],
    layer: Annotated[
        list[int],
        typer.Option(
            help="Block to hook, counted from 0; give it several times for several layers "
            "from one pass.",
            rich_help_panel=_MODEL,
        ),
    ],
    mask_p: Annotated[
        list[float],
        typer.Option(
            help="Probability with which a token is replaced by the mask string; give it several "
            "times for one store each.",
            rich_help_panel=_ROWS,
        ),
    ] = [0.0],  # noqa: B006 - typer copies it
    out: Annotated[
        str,
        typer.Option(
            help="The store: a folder, or an address such as s3://bucket/acts.zarr, which shards are "
            "sent to as they are sealed. With several layers or ratios: one store each, named "
            "acts-layer8-p0.3.zarr.",
            rich_help_panel=_RUN,
        ),
    ] = "acts.zarr",
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Training rows of each store. Default: 500,000,000, or all the text if it is "
            "shorter.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    heldout_tokens: Annotated[
        int | None,
        typer.Option(
            help="Rows of documents kept out of training, stored unmasked. Default: 1,000,000 or "
            "1 %, the smaller.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    hook: Annotated[
        str,
        typer.Option(
            help=f"What to take from the block: {', '.join(HOOKS)}, as TransformerLens names them.",
            rich_help_panel=_MODEL,
        ),
    ] = DEFAULT_HOOK,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub model.", rich_help_panel=_MODEL),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            help="pile-cc, a Hub dataset id, or local .jsonl, .jsonl.zst, .jsonl.gz, .parquet or "
            ".txt files (a file, a folder or a quoted glob).",
            rich_help_panel=_TEXT,
        ),
    ] = "pile-cc",
    text_column: Annotated[
        str | None,
        typer.Option(help="Column with the text. Default: text.", rich_help_panel=_TEXT),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of a Hub dataset. Default: train.", rich_help_panel=_TEXT),
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option(
            help="Keep records whose field has this value: meta.pile_set_name=Pile-CC.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    dataset_revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub dataset.", rich_help_panel=_TEXT),
    ] = None,
    dedup: Annotated[
        str,
        typer.Option(
            help=f"How documents seen before are found and dropped: {', '.join(DEDUPS)}.",
            rich_help_panel=_TEXT,
        ),
    ] = "exact",
    context_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a context. Default: 1024 or the model's maximum, the smaller.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    pack: Annotated[
        bool,
        typer.Option(
            "--pack/--no-pack",
            help="Join documents by the end-of-text token, or keep one document a context.",
            rich_help_panel=_TEXT,
        ),
    ] = True,
    mask_string: Annotated[
        str,
        typer.Option(
            help="What a masked token becomes; one token of the tokenizer.", rich_help_panel=_ROWS
        ),
    ] = "...",
    drop_masked: Annotated[
        bool,
        typer.Option(
            "--drop-masked", help="Leave out the rows at masked positions.", rich_help_panel=_ROWS
        ),
    ] = False,
    keep_first: Annotated[
        bool,
        typer.Option(
            "--keep-first",
            help="Keep the first position of each context and BOS positions (attention sinks).",
            rich_help_panel=_ROWS,
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of masks, shuffles and the held-out split.", rich_help_panel=_ROWS)
    ] = 0,
    codec: Annotated[
        str,
        typer.Option(
            help="; ".join(f"{name}: {each.description}" for name, each in CODECS.items()) + ".",
            rich_help_panel=_RUN,
        ),
    ] = "lossless",
    store_dtype: Annotated[
        str,
        typer.Option(
            help=f"Number format that values are rounded to: {', '.join(VALUE_TYPES)}.",
            rich_help_panel=_RUN,
        ),
    ] = "bfloat16",
    device: Annotated[
        str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.", rich_help_panel=_RUN)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="The model's: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16.",
            rich_help_panel=_RUN,
        ),
    ] = "auto",
    batch_contexts: Annotated[
        int | None,
        typer.Option(
            help="Contexts a forward pass. Default: chosen for the device.", rich_help_panel=_RUN
        ),
    ] = None,
    block_gb: Annotated[
        float,
        typer.Option(
            help="Size of the blocks that rows are shuffled in; two for each layer are in memory.",
            min=0.001,
            max=10_000,
            rich_help_panel=_RUN,
        ),
    ] = DEFAULT_BLOCK_BYTES / 1e9,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the work on this machine, such as one for each GPU. "
            "Default: this process alone.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Address of a running Dask cluster whose workers do the work, such as "
            "tcp://host:8786; --out has to be on a file system that they share.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    catalog: Annotated[
        str | None,
        typer.Option(
            help="A folder, or a prefix such as s3://bucket/stores, in which stores of the same "
            f"recipe and tokens of the same text are looked for. Default: {CATALOG}; '' for none.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Harvest all the same where the catalogue holds the recipe.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Add rows to complete stores, up to --tokens, with all other flags as they were. "
            "The rows that are there stay where they are.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Run a language model over text and write its activations into a shuffled store.

    Without --tokens and --dataset it is the paper's recipe: 500 million tokens of Pile-CC. The same
    command goes on with a store that was interrupted. Where a catalogue holds the recipe already,
    that is said, and nothing is harvested: exit code 3.
    """
    flags = dict(locals())
    from ..stages.harvest_remote import asked_for, harvest_anywhere

    config = harvest_config(flags)
    stores = harvest_anywhere(config, say=say, dry_run=dry_run, open_bar=open_bar_of("push", "B"))
    if stores != asked_for(config):  # what comes next in a script would find nothing at --out
        raise typer.Exit(HELD)


def harvest_config(flags: Mapping[str, Any]) -> HarvestConfig:
    """The flags of `sae-pipe harvest`, by the names of its parameters, as one configuration."""
    from ..stages.sources import TextConfig

    text = TextConfig(
        dataset=flags["dataset"],
        text_column=flags["text_column"],
        split=flags["split"],
        filter=flags["filter"],
        revision=flags["dataset_revision"],
    )
    same = {
        name: flags[name] for name in flags.keys() & {field.name for field in fields(HarvestConfig)}
    }
    same["mask_p"] = tuple(same["mask_p"])
    same["catalog"] = catalogue_place(same["catalog"])
    out = place(same.pop("out"))
    if isinstance(out, Address):
        from ..stages.harvest_remote import spooled

        same |= spooled(out)
    else:
        same["out"] = expanded(out)
    return HarvestConfig(
        **same,
        layers=tuple(flags["layer"]),
        text=text,
        block_bytes=whole_bytes(flags["block_gb"]),
    )


def whole_bytes(gigabytes: float) -> int:
    from ..storage import InputError

    if not math.isfinite(gigabytes):
        raise InputError(f"--block-gb is {gigabytes}, and has to be a number of gigabytes.")
    return int(gigabytes * 1e9)
