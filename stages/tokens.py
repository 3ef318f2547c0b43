"""From text to token ids and back: a Hugging Face tokenizer with exactly what the pipeline needs.

Only loading needs transformers; `decode_tokens` reads a saved tokenizer.json with the tokenizers
library alone, so that a store can show its rows as text on its own.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ..storage.errors import InputError, NetworkError
from ..storage.files import canonical_json, write_whole

# Offered when a mask string is not one token; each is one token of most vocabularies.
_TOKENIZER_LIMIT_BYTES = 1 << 28
_MASK_CANDIDATES = ("...", " ...", "…")


class TextTokenizer:
    """A tokenizer that adds no special tokens and never truncates.

    bos_id, eos_id: None where the tokenizer has none; prepends_bos: whether it puts BOS before a
    plain text by itself, as those of Gemma and Llama do; special_ids: sorted; vocab_size: with
    added tokens.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        # tokenizer: of transformers, fast or slow
        self.name = name
        self._tokenizer = tokenizer
        tokenizer.model_max_length = 10**30  # or it warns of every text longer than a context
        self._fast: tokenizers.Tokenizer | None = None
        if tokenizer.is_fast:
            self._fast = tokenizer.backend_tokenizer
            self._fast.no_truncation()
            self._fast.no_padding()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.vocab_size = len(tokenizer)
        added = tokenizer.added_tokens_decoder
        special = {int(i) for i, token in added.items() if token.special}
        self.special_ids: tuple[int, ...] = tuple(sorted(special | {*tokenizer.all_special_ids}))
        self.prepends_bos = self._detect_bos()

    @classmethod
    def load(cls, model: str, revision: str | None = None) -> "TextTokenizer":
        """The tokenizer of a local folder or of a Hub id; code that it brings is never run."""
        return cls(_load(model, revision), model)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, without special tokens around it; all cores where it is fast."""
        if self._fast is not None:
            found = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]
        return [
            np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.uint32)
            for text in texts
        ]

    def encode_with_ends(self, text: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Token ids of a text, and where in it, in characters, each token ends; both (T,).

        InputError for a tokenizer without a fast form, which does not know.
        """
        if self._fast is None:
            raise InputError(
                f"The tokenizer of {self.name} does not say which characters its tokens are of, so "
                "a word in a text cannot be found. Pass a model with a fast tokenizer."
            )
        found = self._fast.encode(text, add_special_tokens=False)
        ends_T = np.array([end for _, end in found.offsets], dtype=np.int64)
        return np.array(found.ids, dtype=np.uint32), ends_T

    def decode(self, ids: NDArray[np.uint32]) -> str:
        """The text of tokens, special tokens included."""
        return str(self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    def token_texts(self) -> list[str]:
        """The text of every id alone, as `decode_tokens` shows it; "" for an id without a token."""
        tokenizer = tokenizers.Tokenizer.from_str(self.json)
        return [
            "" if tokenizer.id_to_token(i) is None else _text_of(tokenizer, i)
            for i in range(self.vocab_size)
        ]

    def mask_id(self, mask_string: str) -> int:
        """The id of a mask string; InputError unless it is exactly one token."""
        ids: list[int] = self.encode([mask_string])[0].tolist()
        if len(ids) == 1 and not self._is_unknown(mask_string, ids[0]):
            return ids[0]
        became = f"the {len(ids)} tokens {ids}" if len(ids) > 1 else "no token of its own"
        offers = [f"{text!r} (id {i})" for text, i in self._mask_candidates()]
        offer = f"one of {', '.join(offers)}" if offers else "a string that is one token"
        raise InputError(
            f"Mask string {mask_string!r} becomes {became} with the tokenizer of {self.name}, "
            f"but it has to be exactly one. Pass {offer} as --mask-string."
        )

    def _mask_candidates(self) -> Iterator[tuple[str, int]]:
        eos = () if self.eos_id is None else (self._tokenizer.eos_token,)
        for text in (*_MASK_CANDIDATES, *eos):
            ids = self.encode([text])[0].tolist()
            if len(ids) == 1 and not self._is_unknown(text, ids[0]):
                yield text, ids[0]

    def _is_unknown(self, text: str, token_id: int) -> bool:
        return bool(token_id == self._tokenizer.unk_token_id and text != self._tokenizer.unk_token)

    def _detect_bos(self) -> bool:
        """By what it does with a plain text: settings that say so are often ignored."""
        if self.bos_id is None:
            return False
        plain = list(self._tokenizer.encode("a plain text", add_special_tokens=False))
        as_called = list(self._tokenizer.encode("a plain text"))
        return as_called[: len(plain) + 1] == [self.bos_id, *plain]

    @cached_property
    def json(self) -> str:
        """What `save` writes: the tokenizer in the format of the tokenizers library. A slow tokenizer's plain vocabulary is enough to turn ids to text."""
        if self._fast is not None:
            return str(self._fast.to_str())
        # By id, not by vocabulary: some slow tokenizers map several strings to one id.
        names = [self._tokenizer.convert_ids_to_tokens(i) for i in range(self.vocab_size)]
        vocabulary = {name: i for i, name in enumerate(names) if name is not None}
        model = tokenizers.models.WordLevel(vocabulary, unk_token=next(iter(vocabulary)))
        return str(tokenizers.Tokenizer(model).to_str())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical tokenizer JSON: the same for equal tokenizers of any model.

        The class is added for a slow tokenizer, whose JSON has no merge rules.
        """
        value = json.loads(self.json)
        if self._fast is None:
            value = [type(self._tokenizer).__name__, value]
        return hashlib.sha256(canonical_json(value)).hexdigest()

    def save(self, path: Path) -> None:
        """Write the tokenizer's JSON to a file, whole; `decode_tokens` reads it."""
        write_whole(path, self.json.encode())


def decode_tokens(tokenizer_json: Path | str, ids: Iterable[int]) -> list[str]:
    """The text of each id alone, from a saved tokenizer.json (its path, or the JSON itself).

    A leading space is kept, which plain decoding drops at the start of a text for SentencePiece
    vocabularies. Bytes that are no character alone show as U+FFFD.
    """
    if isinstance(tokenizer_json, str) and tokenizer_json.lstrip().startswith("{"):
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    else:
        tokenizer = _read_tokenizer(Path(tokenizer_json))
    ids = [int(i) for i in ids]
    texts = {i: _text_of(tokenizer, i) for i in set(ids)}
    return [texts[i] for i in ids]


def _read_tokenizer(path: Path) -> Any:
    try:
        if path.stat().st_size > _TOKENIZER_LIMIT_BYTES or not path.is_file():
            raise ValueError("its size is that of no tokenizer")
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"There is no tokenizer at {path}. Pass the tokenizer.json of a store or of a model."
        ) from None
    except BaseException as error:  # the library raises bare Exception, or panics
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise InputError(
            f"{path} is not a tokenizer ({error}). Pass the tokenizer.json of a store or a model."
        ) from error


def _text_of(tokenizer: Any, token_id: int) -> str:
    token = tokenizer.id_to_token(token_id)
    if token is None:
        raise InputError(
            f"Token id {token_id} is not in the tokenizer, which has "
            f"{tokenizer.get_vocab_size()}. Pass the tokenizer that the ids were made with."
        )
    text = str(tokenizer.decode([token_id], skip_special_tokens=False))
    return f" {text}" if token.startswith("▁") and not text.startswith(" ") else text


def _load(model: str, revision: str | None) -> Any:
    # Imported here: it takes seconds, and decoding does not need it.
    from transformers import AutoTokenizer
    from transformers.utils import logging

    is_local = Path(model).expanduser().is_dir()
    source = str(Path(model).expanduser()) if is_local else model
    offline = not is_local and not _hub_answers(model, revision)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(
            source,
            revision=None if is_local else revision,
            local_files_only=is_local or offline,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if offline:
            raise NetworkError(
                f"The tokenizer of {model} could not be fetched from the Hub: no network, or the "
                f"Hub does not answer. Fetch it on a machine that has network with `hf download "
                f"{model} --local-dir DIR`, copy DIR here and pass --model DIR."
            ) from error
        raise InputError(
            f"The tokenizer of {model} could not be loaded ({str(error).splitlines()[0]}). "
            "Pass a model whose folder holds tokenizer.json, or whose tokenizer Transformers knows."
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _hub_answers(model: str, revision: str | None) -> bool:
    """One quick question first: without network, Transformers retries for a minute.

    InputError when the Hub answers that there is no such model.
    """
    import huggingface_hub.errors as hub_errors
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its client

    try:
        HfApi().model_info(model, revision=revision, timeout=20)
    except hub_errors.GatedRepoError as error:
        raise InputError(
            f"Model {model} is gated. Accept its terms at https://huggingface.co/{model}, run "
            "`hf auth login`, and try again."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(
            f"Model {model} has no revision {revision!r} on the Hub. Pass a branch, a tag or a "
            f"commit listed at https://huggingface.co/{model}/commits/main."
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise InputError(
            f"Model {model} was not found: it is neither a local folder nor on the Hub (or it is "
            "private, and `hf auth login` is needed). Check the spelling."
        ) from error
    except (HTTPError, OSError):
        return False  # but the cache may have the files
    return True
