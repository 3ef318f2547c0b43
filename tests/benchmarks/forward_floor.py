"""Tokens per second of the bare truncated forward pass: the floor that a harvest is compared with.

Nothing is copied, shuffled or written; what a harvest adds to this time is its overhead.

    python tests/benchmarks/forward_floor.py                     # random, shaped like pythia-160m
    python tests/benchmarks/forward_floor.py --model DIR --layer 3 --context-size 128
    python tests/benchmarks/forward_floor.py --sweep             # by tokens per batch
"""

# N contexts, T positions

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

from sae_pipe.stages.backoff import BatchRunner, find_batch_size
from sae_pipe.stages.devices import pick_device, pick_dtype
from sae_pipe.stages.hooks import HookedModel
from sae_pipe.stages.models import inspect_model, load_truncated
from sae_pipe.stages.taps import DEFAULT_HOOK


def forward_floor(
    model: HookedModel, token_ids_NT: Tensor, n_contexts: int, repeats: int = 3
) -> float:
    """Tokens per second, the median of several passes over the contexts after one warm-up batch."""
    runner = BatchRunner(model, n_contexts)
    for _ in runner.run(token_ids_NT[:n_contexts]):
        _wait(model.device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        forward_pass(model, token_ids_NT, n_contexts)
        seconds.append(time.perf_counter() - start)
    return token_ids_NT.numel() / statistics.median(seconds)


def forward_pass(model: HookedModel, token_ids_NT: Tensor, n_contexts: int) -> None:
    """All contexts through the model once, and nothing done with what comes out."""
    for _ in BatchRunner(model, n_contexts).run(token_ids_NT):
        pass
    _wait(model.device)


def save_pythia_160m_shape(folder: Path) -> None:
    """A GPT-NeoX of the shape of pythia-160m with random weights; speed does not see values."""
    config = transformers.GPTNeoXConfig(
        vocab_size=50_304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def describe_machine(device: torch.device) -> str:
    """Hardware, date and versions: what a speed means nothing without."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{processor}, {torch.get_num_threads()} threads{gpu}; {datetime.date.today()}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"python {platform.python_version()}"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", help="folder or Hub id; default random, shaped like pythia-160m")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--hook", default=DEFAULT_HOOK)
    parser.add_argument("--context-size", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens in one pass")
    parser.add_argument("--repeats", type=int, default=3, help="passes for each batch size")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sweep", action="store_true", help="try several batch sizes")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model is None:
            save_pythia_160m_shape(Path(scratch))
        info = inspect_model(arguments.model or scratch)
        model = load_truncated(info, [arguments.layer], arguments.hook, device, dtype)
    n_contexts = max(1, arguments.tokens // arguments.context_size)
    vocab_size = info.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    token_ids_NT = torch.randint(
        vocab_size, (n_contexts, arguments.context_size), generator=generator
    )
    print(describe_machine(device))
    print(
        f"{arguments.model or 'random, shaped like pythia-160m'}: {info.architecture}, layer "
        f"{arguments.layer} of {info.n_layers}, d_model {info.d_model}, {arguments.hook}, {dtype}, "
        f"context {arguments.context_size}, {token_ids_NT.numel()} tokens a pass"
    )
    sizes = [find_batch_size(model, arguments.context_size)]
    if arguments.sweep:
        sizes = [2**power for power in range(n_contexts.bit_length())]
    speeds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(arguments.repeats):  # sizes in turn, so that what else runs here hits them all
        for size in sizes:
            speeds[size].append(forward_floor(model, token_ids_NT, size, repeats=1))
    for size, found in speeds.items():
        batch_tokens = size * arguments.context_size
        print(
            f"{size} contexts ({batch_tokens} tokens) a batch: median "
            f"{statistics.median(found):,.0f}, best {max(found):,.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
