"""Small real objects that several test files share."""

# tiny models: 4 layers, d_model 32, 64 tokens, contexts of 64

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

# Read when torch is imported. Tensors are tiny here, and threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when huggingface_hub is imported. The tests' Hubs are on this machine, and nothing else is
# asked, whether the user has set this or not.
os.environ["HF_HUB_OFFLINE"] = "0"

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from sae_pipe.stages.sources import TextConfig, TextSource, open_text
from sae_pipe.stages.tokens import TextTokenizer
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.builder import StoreBuilder
from sae_pipe.storage.corpus_writer import complete as complete_corpus
from sae_pipe.storage.corpus_writer import create_groups
from sae_pipe.storage.layout import Layout
from sae_pipe.storage.values import round_to_bfloat16

from .services import ENVIRONMENT, S3, s3_server
from .signing import SECRET

# Tiny models gain nothing from a second thread, and lose a lot to waiting for it: beside other work
# on two cores the model tests took 20 times as long.
torch.set_num_threads(1)

_TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_TINY_GEMMA = _TINY | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
_TINY_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}

FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_TINY),
    "gpt2": lambda: transformers.GPT2Config(**_TINY_GPT2, bos_token_id=0, eos_token_id=0),
    "llama": lambda: transformers.LlamaConfig(**_TINY, num_key_value_heads=2),
    "gemma2": lambda: transformers.Gemma2Config(**_TINY_GEMMA),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**_TINY_GEMMA),
    "qwen2": lambda: transformers.Qwen2Config(**_TINY, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**_TINY, num_key_value_heads=2, head_dim=8),
}


def save_tiny_model(config: transformers.PretrainedConfig, folder: Path) -> Path:
    """A causal language model with random weights, saved with its head as published ones are."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # biases and norms start at 0 or 1, where mistakes cannot be seen
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of a tiny random model; to be read only."""
    root = tmp_path_factory.mktemp("tiny_models")
    return {name: save_tiny_model(make(), root / name) for name, make in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    """The folder of each family's tiny model in turn."""
    return tiny_models[request.param]


@pytest.fixture
def neox_folder(tiny_models: dict[str, Path]) -> Path:
    """The folder of the tiny GPT-NeoX, for tests that need just one model."""
    return tiny_models["gpt_neox"]


def write_store(
    path: Path, rows_ND: NDArray[np.float32], heldout_ND: NDArray[np.float32]
) -> ActivationStore:
    """A complete store of the given rows (rounded to bfloat16), with an empty token corpus."""
    corpus = path / "corpus"
    create_groups(corpus)
    complete_corpus(corpus, {})
    builder = StoreBuilder.begin(path, {}, {"test": path.name}, "lossless")
    sizes = {"d_in": rows_ND.shape[1], "chunk_rows": 256, "shard_rows": 1024, "block_rows": 2048}
    builder.lay_out(
        Layout(n_rows=len(rows_ND), **sizes), Layout(n_rows=len(heldout_ND), **sizes), {}
    )
    with ThreadPoolExecutor(1) as pool:
        writers = builder.writers(pool)
        for writer, values_ND, with_masked in zip(
            writers, (rows_ND, heldout_ND), (True, False), strict=True
        ):
            bits_ND = round_to_bfloat16(values_ND)
            for shard in range(writer.layout.n_shards):
                first, last = writer.layout.rows_of_shard(shard)
                masked = np.zeros(last - first, np.bool_) if with_masked else None
                writer.write(shard, bits_ND[first:last], np.arange(first, last), masked)
        builder.finish(*writers)
    return open_store(path)


@pytest.fixture(scope="session")
def make_store() -> Callable[..., ActivationStore]:
    """`write_store`: a store of the given training and held-out rows."""
    return write_store


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """4,096 training and 512 held-out rows of 16 values: sparse sums of 48 directions, mean 3."""
    rng = np.random.default_rng(0)
    directions_FD = rng.standard_normal((48, 16)).astype(np.float32)
    active_NF = (rng.random((4608, 48)) < 0.05) * rng.uniform(0.5, 2, (4608, 48))
    rows_ND = (active_NF @ directions_FD + 3).astype(np.float32)
    folder = tmp_path_factory.mktemp("small_store") / "acts.zarr"
    return write_store(folder, rows_ND[:4096], rows_ND[4096:])


SENTENCES = (
    "The quick brown fox jumps over the lazy dog and runs into the dark forest.",
    "A whale is a very large animal that lives in the sea; it is not a fish...",
    "In the beginning was the word, and the word was written on a small stone.",
    "Call me a fool, but wörds like naïve and café make tokenizers work harder…",
)


def save_tiny_tokenizer(folder: Path, *, bos: bool, eos: bool) -> Path:
    """A byte-level BPE tokenizer of 400 tokens; with `bos` it prepends <bos>, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"] * eos + ["<bos>"] * bos
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    if bos:
        marks = [("<bos>", tokenizer.token_to_id("<bos>"))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=marks
        )
    named = {"bos_token": "<bos>"} if bos else {}
    named |= {"eos_token": "<|endoftext|>"} if eos else {}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, **named
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny tokenizers: plain (EOS only), bos (prepends it), bare (neither)."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "plain": save_tiny_tokenizer(root / "plain", bos=False, eos=True),
        "bos": save_tiny_tokenizer(root / "bos", bos=True, eos=True),
        "bare": save_tiny_tokenizer(root / "bare", bos=False, eos=False),
    }


@pytest.fixture(scope="session")
def text_tokenizers(tokenizer_folders: dict[str, Path]) -> dict[str, TextTokenizer]:
    """The tiny tokenizers, loaded."""
    return {name: TextTokenizer.load(str(path)) for name, path in tokenizer_folders.items()}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that nothing listens for, as on a machine without network."""
    address = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)


class _Refusals(BaseHTTPRequestHandler):
    """/api/KIND/someone/WHY answers with the Hub's code for why something cannot be had."""

    codes: ClassVar[dict[str, tuple[int, str]]] = {
        "gone": (404, "RepoNotFound"),
        "gated": (403, "GatedRepo"),
        "no-revision": (404, "RevisionNotFound"),
    }

    def do_GET(self) -> None:
        status, code = self.codes[self.path.split("/")[4]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def refusing_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub that has nothing: someone/gone, someone/gated and someone/no-revision."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusals)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """4,000 texts of 1 to 120 words, no two alike."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "runs",
        "into",
        "dark",
        "forest",
        "word",
        "stone",
    ]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, size=rng.integers(1, 120))) + f" {i}" for i in range(4000)]


@pytest.fixture(scope="session")
def write_source() -> Callable[[Path, Sequence[object]], TextSource]:
    """Writes values as JSON Lines and opens them."""

    def write(path: Path, lines: Sequence[object]) -> TextSource:
        path.write_text("\n".join(map(json.dumps, lines)))
        return open_text(TextConfig(dataset=str(path)))

    return write


@pytest.fixture
def source(
    tmp_path: Path,
    documents: list[str],
    write_source: Callable[[Path, Sequence[object]], TextSource],
) -> TextSource:
    """text.jsonl with the first 400 documents."""
    return write_source(tmp_path / "text.jsonl", [{"text": text} for text in documents[:400]])


@pytest.fixture
def plain(text_tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    """The tiny tokenizer that has EOS and prepends nothing."""
    return text_tokenizers["plain"]


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-NeoX of 3 layers with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("lm")
    config = transformers.GPTNeoXConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    save_tiny_model(config, folder)
    save_tiny_tokenizer(folder, bos=False, eos=True)
    file = folder / "tokenizer_config.json"  # one token is both BOS and EOS, as for Pythia
    settings = json.loads(file.read_text()) | {"bos_token": "<|endoftext|>"}
    file.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of 5 to 80 words."""
    rng = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = [" ".join(rng.choice(words, int(rng.integers(5, 80))).tolist()) for _ in range(400)]
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return file


@pytest.fixture(scope="session")
def store(lm: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `config_for`, never interrupted."""
    from .harvesting import config_for, quiet

    out = tmp_path_factory.mktemp("harvest") / "acts.zarr"
    quiet(config_for(lm, text, out))
    return out


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server; skipped where moto is not installed."""
    with s3_server(tmp_path_factory.mktemp("s3")) as s3:
        yield s3


@pytest.fixture
def s3(s3_process: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The S3 server as the environment's, and a cache of the test's own."""
    for name, value in (ENVIRONMENT | s3_process.environment(tmp_path / "cache")).items():
        monkeypatch.setenv(name, value)
    return s3_process


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """The secret key of tests/signing.py."""
    file = tmp_path / "minisign.key"
    file.write_text(SECRET)
    return file


@pytest.fixture
def signed(small_store: ActivationStore, tmp_path: Path, key_file: Path) -> Path:
    """A copy of the small store, signed with the key of tests/signing.py."""
    from sae_pipe.storage import minisign
    from sae_pipe.storage.signed import sign_store

    copy = Path(shutil.copytree(small_store.path, tmp_path / "acts.zarr"))
    sign_store(copy, minisign.read_secret(key_file))
    return copy
