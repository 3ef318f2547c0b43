"""Text to token ids and back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers

from sae_pipe.stages.tokens import TextTokenizer, decode_tokens
from sae_pipe.storage.errors import InputError, NetworkError

TEXTS = ["The quick brown fox", "", "wörds and café… " * 50, "<|endoftext|> inside"]


def test_encoding_adds_nothing_and_cuts_nothing(text_tokenizers: dict[str, TextTokenizer]) -> None:
    """model_max_length is 16 here; pytest turns the library's warning of it into an error."""
    for tokenizer in text_tokenizers.values():
        for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
            assert ids.dtype == "uint32"
            assert tokenizer.bos_id not in ids.tolist()
            saved = tokenizer.json
            assert "".join(tokenizers.Tokenizer.from_str(saved).decode(ids.tolist(), False)) == text


def test_ids_are_those_of_transformers(tokenizer_folders: dict[str, Path]) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer_folders["bos"])
    ours = TextTokenizer.load(str(tokenizer_folders["bos"])).encode(TEXTS)
    theirs = [reference(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [ids.tolist() for ids in ours] == theirs


@pytest.mark.parametrize(
    ("name", "prepends", "bos_id", "eos_id", "special"),
    [
        ("plain", False, None, 0, (0,)),
        ("bos", True, 1, 0, (0, 1)),
        ("bare", False, None, None, ()),
    ],
)
def test_special_tokens_are_found_by_behaviour(
    text_tokenizers: dict[str, TextTokenizer],
    name: str,
    prepends: bool,
    bos_id: int | None,
    eos_id: int | None,
    special: tuple[int, ...],
) -> None:
    tokenizer = text_tokenizers[name]
    assert tokenizer.prepends_bos is prepends
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, eos_id)
    assert tokenizer.special_ids == special
    assert tokenizer.vocab_size == 400


def test_fingerprint_is_of_the_tokenizer_and_not_of_its_folder(
    tokenizer_folders: dict[str, Path], text_tokenizers: dict[str, TextTokenizer], tmp_path: Path
) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer_folders["plain"])
    reference.model_max_length = 99
    reference.save_pretrained(tmp_path / "copy")
    copy = TextTokenizer.load(str(tmp_path / "copy"))
    prints = {name: tokenizer.fingerprint for name, tokenizer in text_tokenizers.items()}
    assert copy.fingerprint == prints["plain"]
    assert len(set(prints.values())) == 3
    assert re.fullmatch("[0-9a-f]{64}", copy.fingerprint)


def _id_of(tokenizer: TextTokenizer, token: str) -> int:
    found = tokenizers.Tokenizer.from_str(tokenizer.json).token_to_id(token)
    assert found is not None
    return found


def test_mask_string_of_one_token_is_its_id(text_tokenizers: dict[str, TextTokenizer]) -> None:
    plain = text_tokenizers["plain"]
    assert plain.mask_id("...") == _id_of(plain, "...") > 256
    assert text_tokenizers["plain"].mask_id("<|endoftext|>") == 0


def test_mask_string_of_many_tokens_is_refused_with_offers(
    text_tokenizers: dict[str, TextTokenizer], tokenizer_folders: dict[str, Path]
) -> None:
    plain = text_tokenizers["plain"]
    ids = plain.encode(["?!"])[0].tolist()
    ellipsis = plain.encode(["…"])[0].tolist()
    assert len(ids) == 2
    assert len(ellipsis) == 1
    message = (
        f"Mask string '?!' becomes the 2 tokens {ids} with the tokenizer of "
        f"{tokenizer_folders['plain']}, but it has to be exactly one. Pass one of '...' "
        f"(id {_id_of(plain, '...')}), '…' (id {ellipsis[0]}), '<|endoftext|>' (id 0) "
        "as --mask-string."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        text_tokenizers["plain"].mask_id("?!")


def test_mask_string_that_is_no_token_is_refused(
    text_tokenizers: dict[str, TextTokenizer],
) -> None:
    with pytest.raises(InputError, match=r"^Mask string '' becomes no token of its own with the "):
        text_tokenizers["plain"].mask_id("")


def test_mask_string_that_is_unknown_to_the_vocabulary_is_refused(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]")
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer = TextTokenizer(fast, "words")
    assert tokenizer.mask_id("word") == 1
    message = (
        "Mask string '...' becomes no token of its own with the tokenizer of words, but it has to "
        "be exactly one. Pass a string that is one token as --mask-string."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        tokenizer.mask_id("...")


def test_a_slow_tokenizer_works_like_a_fast_one(tmp_path: Path) -> None:
    """ByT5's, written in Python: byte b is the token b + 3."""
    tokenizer = TextTokenizer(transformers.ByT5Tokenizer(extra_ids=0), "byt5")
    assert [ids.tolist() for ids in tokenizer.encode(["hi", ""])] == [[107, 108], []]
    assert tokenizer.eos_id == 1
    assert not tokenizer.prepends_bos
    tokenizer.save(tmp_path / "tokenizer.json")
    assert decode_tokens(tmp_path / "tokenizer.json", [107, 108]) == ["h", "i"]


def test_saved_tokenizer_turns_ids_into_text_without_transformers(
    text_tokenizers: dict[str, TextTokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    text_tokenizers["bos"].save(path)
    ids = [1, *text_tokenizers["bos"].encode(["The quick fox..."])[0].tolist()]
    code = (
        "import sys; from sae_pipe.stages.tokens import decode_tokens; "
        f"print(''.join(decode_tokens({str(path)!r}, {ids}))); "
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "<bos>The quick fox...\n"


def test_each_id_decodes_alone(text_tokenizers: dict[str, TextTokenizer]) -> None:
    saved = text_tokenizers["plain"].json
    ids = text_tokenizers["plain"].encode(["The word word"])[0].tolist()
    pieces = decode_tokens(saved, ids)
    assert "".join(pieces) == "The word word"
    assert pieces[-1].startswith(" ")
    assert decode_tokens(saved, []) == []


def test_leading_space_of_sentencepiece_tokens_is_kept() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁the": 0, "re": 1, "?": 2}, "?"))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    assert decode_tokens(tokenizer.to_str(), [0, 1, 0]) == [" the", "re", " the"]


def test_decoding_says_what_is_wrong(
    text_tokenizers: dict[str, TextTokenizer], tmp_path: Path
) -> None:
    message = (
        "^Token id 9999 is not in the tokenizer, which has 400. Pass the tokenizer that the ids "
        "were made with.$"
    )
    with pytest.raises(InputError, match=message):
        decode_tokens(text_tokenizers["plain"].json, [9999])
    with pytest.raises(
        InputError,
        match=rf"^There is no tokenizer at {re.escape(str(tmp_path / 'x.json'))}\. "
        r"Pass the tokenizer\.json of a store or of a model\.$",
    ):
        decode_tokens(tmp_path / "x.json", [1])
    (tmp_path / "y.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(InputError, match=r"y\.json is not a tokenizer \("):
        decode_tokens(tmp_path / "y.json", [1])


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=rf"^The tokenizer of {re.escape(str(tmp_path))} could not be loaded \(.*\)\. Pass a "
        r"model whose folder holds tokenizer\.json, or whose tokenizer Transformers knows\.$",
    ):
        TextTokenizer.load(str(tmp_path))


@pytest.mark.usefixtures("no_hub")
def test_no_network_for_a_hub_tokenizer_says_how_to_go_on() -> None:
    message = (
        "The tokenizer of nobody/nothing could not be fetched from the Hub: no network, or the Hub "
        "does not answer. Fetch it on a machine that has network with `hf download nobody/nothing "
        "--local-dir DIR`, copy DIR here and pass --model DIR."
    )
    with pytest.raises(NetworkError, match=f"^{re.escape(message)}$"):
        TextTokenizer.load("nobody/nothing")


@pytest.mark.usefixtures("refusing_hub")
@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            "someone/gone",
            None,
            (
                "Model someone/gone was not found: it is neither a local folder nor on the Hub (or it is private, "
                "and `hf auth login` is needed). Check the spelling."
            ),
        ),
        (
            "someone/gated",
            None,
            (
                "Model someone/gated is gated. Accept its terms at "
                "https://huggingface.co/someone/gated, run `hf auth login`, and try again."
            ),
        ),
        (
            "someone/no-revision",
            "v9",
            (
                "Model someone/no-revision has no revision 'v9' on the Hub. Pass a branch, a tag "
                "or a commit listed at "
                "https://huggingface.co/someone/no-revision/commits/main."
            ),
        ),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    name: str, revision: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        TextTokenizer.load(name, revision)
