"""What a harvest's flags mean for this model, this tokenizer and this text.

Everything that can be wrong with them is found here, before anything is written. A store that was
begun pins its revisions: a branch that has moved since then changes nothing.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..storage.corpus import CORPUS_JSON, Corpus
from ..storage.errors import InputError, StoreError
from .corpus import CorpusConfig, corpus_recipe
from .devices import pick_dtype
from .harvest_catalogue import Catalogue, Tokens
from .harvest_config import (
    DEFAULT_CONTEXT_SIZE,
    DEFAULT_TOKENS,
    MAX_HELDOUT_TOKENS,
    HarvestConfig,
    Target,
    check_same,
)
from .masking import MaskConfig
from .models import ModelInfo, check_layer, inspect_model
from .sources import DEFAULT_COLUMN, DEFAULT_SPLIT, TextConfig, TextSource, open_text
from .sources.files import looks_local
from .sources.recipes import apply_recipe
from .tokens import TextTokenizer

# Only to tell a small text from a large one before it is read.
_BYTES_PER_TOKEN = 4
_UNPACKED = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.0}


@dataclass(frozen=True, kw_only=True)
class HarvestJob:
    """A harvest with everything resolved.

    corpus_at: where the tokens are already, in a begun store or beside it; lent: tokens of a store
    of the catalogue, where there are none nearer; source: the text, None where it did not have to
    be opened; corpus_recipe: what the token corpus is made from.
    """

    config: HarvestConfig
    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    tokenizer: TextTokenizer
    mask_id: int
    source: TextSource | None
    corpus_at: Path | None
    lent: Tokens | None
    corpus: CorpusConfig
    corpus_recipe: dict[str, Any]

    def mask(self, p: float) -> MaskConfig:
        """The masking of one mask ratio; held-out rows have p = 0."""
        return MaskConfig(
            p=p,
            mask_id=self.mask_id,
            seed=self.config.seed,
            special_ids=self.tokenizer.special_ids,
        )

    def recipe(self, target: Target) -> dict[str, Any]:
        """What decides about a store's rows: this is hashed and compared."""
        is_folder = self.info.commit is None
        return {
            "model": {
                "name": Path(self.info.source).name if is_folder else self.info.source,
                "revision": self.info.revision,
                "architecture": self.info.architecture,
            },
            "hook": self.config.hook,
            "layer": target.layer,
            "dtype": str(self.dtype).removeprefix("torch."),
            "mask": {
                "p": target.mask_p,
                "string": self.config.mask_string,
                "id": self.mask_id,
                "special_ids": list(self.tokenizer.special_ids),
            },
            "drop_masked": self.config.drop_masked,
            "keep_first": self.config.keep_first,
            "rows": self.config.tokens,
            "corpus": self.corpus_recipe,
            "seed": self.config.seed,
            "codec": self.config.stored_as.spelling,
            "store_dtype": self.config.store_dtype,
        }


def resolve(
    config: HarvestConfig,
    begun: dict[Path, dict[str, Any]],
    device: torch.device,
    catalogue: Catalogue | None = None,
) -> HarvestJob:
    """Look at model, tokenizer and text.

    begun: manifests of the stores that this harvest has begun already, by their paths; device:
    that the model will run on, here or where the workers are; catalogue: whose tokens may be taken.
    Raises InputError or NetworkError for whatever does not work.
    """
    recipe = next(iter(begun.values()))["recipe"] if begun else None
    catalogue = catalogue or Catalogue()
    info = inspect_model(config.model, _pinned_model(config, recipe))
    check_layer(info, config.layers, config.hook)
    context_size = _context_size(config, info)
    tokenizer = TextTokenizer.load(info.source, info.commit)
    mask_id = tokenizer.mask_id(config.mask_string)
    source, lent = None, None
    corpus_at, made_from = _corpus_without_text(config, context_size, tokenizer, begun)
    if corpus_at is None:
        lent = _lent_without_text(config, context_size, tokenizer, recipe, catalogue)
        made_from = made_from if lent is None else lent.recipe
    if corpus_at is not None or lent is not None:
        corpus = CorpusConfig(**made_from["config"])
    else:
        source = open_text(_pinned_text(config.text, recipe))
        corpus = _corpus_config(config, context_size, estimated_tokens(source))
        made_from = corpus_recipe(corpus, source, tokenizer)
        corpus_at = corpus_beside(config, made_from)
        if corpus_at is None:
            lent = catalogue.tokens(
                made_from["config"], tokenizer.fingerprint, lambda theirs: theirs == made_from
            )
    return HarvestJob(
        config=config,
        info=info,
        device=device,
        dtype=pick_dtype(config.dtype, device),
        tokenizer=tokenizer,
        mask_id=mask_id,
        source=source,
        corpus_at=corpus_at,
        lent=lent,
        corpus=corpus,
        corpus_recipe=made_from,
    )


def reopen_text(config: HarvestConfig, path: Path, recipe: dict[str, Any]) -> TextSource:
    """The text that a store's corpus was made of; InputError when it is another one now."""
    source = open_text(_pinned_text(config.text, recipe))
    check_same(path, {"text": recipe["corpus"]["source"]}, {"text": source.identity})
    return source


def corpus_rows(config: HarvestConfig, context_size: int, tokens: int) -> int:
    """Training rows that the corpus needs for stores of so many."""
    wanted = _corpus_config(replace(config, tokens=tokens), context_size, None).train_rows
    assert wanted is not None
    return wanted


def _pinned_model(config: HarvestConfig, recipe: dict[str, Any] | None) -> str | None:
    if recipe is None or str(recipe["model"]["revision"]).startswith("sha256:"):
        return config.revision
    return str(recipe["model"]["revision"])


def _pinned_text(text: TextConfig, recipe: dict[str, Any] | None) -> TextConfig:
    if recipe is None or recipe["corpus"]["source"]["kind"] != "hub":
        return text
    return replace(text, revision=recipe["corpus"]["source"]["parts"][0]["revision"])


def _context_size(config: HarvestConfig, info: ModelInfo) -> int:
    limit = info.max_context
    if config.context_size is None:
        return min(DEFAULT_CONTEXT_SIZE, limit or DEFAULT_CONTEXT_SIZE)
    if limit is not None and config.context_size > limit:
        raise InputError(
            f"--context-size {config.context_size} is longer than the {limit} tokens that model "
            f"{info.source} can take. Pass {limit} or less."
        )
    return config.context_size


def corpus_beside(config: HarvestConfig, recipe: dict[str, Any]) -> Path | None:
    """The corpus of this recipe in a store of the folder of --out, if there is one."""
    same = (each for each in _corpora_beside(config) if each.info["recipe"] == recipe)
    return next((each.path for each in same), None)


def _corpora_beside(config: HarvestConfig) -> Iterator[Corpus]:
    """The finished corpora of all stores in the folder of --out."""
    for found in sorted(config.out.absolute().parent.glob(f"*/corpus/{CORPUS_JSON}")):
        try:
            yield Corpus(found.parent)
        except StoreError:
            continue  # damaged: not ours to judge here, and of no use


def _corpus_without_text(
    config: HarvestConfig,
    context_size: int,
    tokenizer: TextTokenizer,
    begun: dict[Path, dict[str, Any]],
) -> tuple[Path | None, dict[str, Any]]:
    """A corpus that makes opening the text needless, and its recipe: one of the begun stores, or
    one beside them of the same Hub dataset. Local text is opened all the same: it may have changed.
    """
    for path, manifest in begun.items():
        if (path / "corpus" / CORPUS_JSON).is_file():
            return path / "corpus", manifest["recipe"]["corpus"]
    if begun or looks_local(config.text.dataset):
        return None, {}
    wanted = asdict(_corpus_config(config, context_size, None))
    for corpus in _corpora_beside(config):
        recipe = corpus.info["recipe"]
        is_same = (
            recipe["config"] == wanted
            and "extensions" not in recipe  # it holds other contexts than one that is new
            and recipe["tokenizer"]["fingerprint"] == tokenizer.fingerprint
            and _is_of(config.text, recipe["source"])
        )
        if is_same:
            return corpus.path, recipe
    return None, {}


def _lent_without_text(
    config: HarvestConfig,
    context_size: int,
    tokenizer: TextTokenizer,
    begun: dict[str, Any] | None,
    catalogue: Catalogue,
) -> Tokens | None:
    """The same of a store of the catalogue. begun: the recipe of a store that was begun."""
    if looks_local(config.text.dataset):
        return None
    if begun is None:
        wanted = asdict(_corpus_config(config, context_size, None))

        def fits(recipe: dict[str, Any]) -> bool:
            is_new = "extensions" not in recipe  # else it holds other contexts
            return recipe["config"] == wanted and is_new and _is_of(config.text, recipe["source"])
    else:
        wanted = begun["corpus"]["config"]

        def fits(recipe: dict[str, Any]) -> bool:
            return bool(recipe == begun["corpus"])

    return catalogue.tokens(wanted, tokenizer.fingerprint, fits)


def _is_of(asked: TextConfig, source: dict[str, Any]) -> bool:
    """Whether a corpus was made of the Hub dataset asked for; any commit, unless one was named."""
    if source["kind"] != "hub":
        return False
    text, part = apply_recipe(asked), source["parts"][0]
    name = part["dataset"] if part["subset"] is None else f"{part['dataset']}:{part['subset']}"
    return (
        name == text.dataset
        and part["split"] == (text.split or DEFAULT_SPLIT)
        and source["text_column"] == (text.text_column or DEFAULT_COLUMN)
        and source["filter"] == (text.filter or None)
        and asked.revision in (None, part["revision"])
    )


def _corpus_config(
    config: HarvestConfig, context_size: int, text_tokens: int | None
) -> CorpusConfig:
    """text_tokens: roughly how many local text holds; None for a dataset of the Hub."""
    tokens, heldout = config.tokens, config.heldout_tokens
    if tokens is None and (text_tokens is None or text_tokens > 1.5 * DEFAULT_TOKENS):
        tokens = DEFAULT_TOKENS
    if heldout is None:
        heldout = min(MAX_HELDOUT_TOKENS, max((tokens or text_tokens or 0) // 100, 1))
    if tokens is not None and config.drop_masked:
        # The corpus holds as many more rows as will be left out, with 8 standard deviations to
        # spare: every store must be able to hold the rows asked for.
        kept = 1.0 - max(config.mask_p)
        tokens = int(tokens / kept + 8 * tokens**0.5 / kept) + context_size
    return CorpusConfig(
        context_size=context_size,
        pack=config.pack,
        dedup=config.dedup,
        seed=config.seed,
        train_rows=tokens,
        heldout_rows=heldout,
        keep_first=config.keep_first,
    )


def estimated_tokens(source: TextSource) -> int | None:
    """Roughly how many tokens local files hold; None for a dataset of the Hub."""
    sizes = [(str(part.get("name")), part.get("bytes")) for part in source.identity["parts"]]
    if any(size is None for _, size in sizes):
        return None
    unpacked = (size * _UNPACKED.get(Path(name).suffix, 1.0) for name, size in sizes)
    return int(sum(unpacked) / _BYTES_PER_TOKEN)
