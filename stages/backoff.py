"""How many contexts go through the model at once, and going on with fewer when memory runs out."""

# N contexts, B contexts of one batch, T positions

from collections.abc import Iterator

import torch
from torch import Tensor

from ..storage.errors import InputError
from .hooks import HookedModel

# Fixed and not timed anew on each machine run: another batch size may sum in another order, and
# rows of a resumed harvest should be those of an uninterrupted one to the last bit.
# CPU: the measured plateau, see tests/benchmarks/forward_floor.py --sweep. MPS: not measured.
TOKENS_PER_BATCH = {"cpu": 4096, "mps": 8192}
# A GPU is saturated well before this many; more would only take memory from the copy to the host.
CUDA_MAX_TOKENS = 65_536
# Vectors of d_model that a block holds for each token at its peak, an MLP of 4 d_model included.
# Only where the search starts: what does not fit is halved.
_PEAK_VECTORS = 24


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host's allocator, refused memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # MPS and the CPU allocator raise a bare RuntimeError; its text is all there is to tell by.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "DefaultCPUAllocator" in text
    )


def find_batch_size(model: HookedModel, context_size: int) -> int:
    """Contexts per batch: a fixed number of tokens, or on CUDA as many as a trial shows to fit."""
    if model.device.type in TOKENS_PER_BATCH:
        return max(1, TOKENS_PER_BATCH[model.device.type] // context_size)
    free_bytes, _ = torch.cuda.mem_get_info(model.device)
    token_bytes = (_PEAK_VECTORS + len(model.layers)) * model.d_model * model.dtype.itemsize
    most_tokens = min(CUDA_MAX_TOKENS, int(0.8 * free_bytes) // token_bytes)
    n_contexts = shrink_to_fit(model, max(1, most_tokens // context_size), context_size)
    torch.cuda.empty_cache()
    return n_contexts


def shrink_to_fit(model: HookedModel, n_contexts: int, context_size: int) -> int:
    """Halve the batch until one of it goes through the model."""
    runner = BatchRunner(model, n_contexts)
    for _ in runner.run(torch.zeros((n_contexts, context_size), dtype=torch.int64)):
        pass
    return runner.n_contexts


class BatchRunner:
    """Runs contexts in batches of at most `n_contexts`, which is halved when memory runs out.

    It stays halved: memory that ran out once would run out again, and each failure costs a pass.
    """

    def __init__(self, model: HookedModel, n_contexts: int) -> None:
        if n_contexts < 1:
            raise InputError(f"A batch of {n_contexts} contexts is empty. Pass 1 or more.")
        self.model = model
        self.n_contexts = n_contexts

    def run(self, token_ids_NT: Tensor) -> Iterator[tuple[slice, dict[int, Tensor]]]:
        """Which of the N contexts, and their activations (B, T, D) by layer; in order, each once."""
        first = 0
        while first < len(token_ids_NT):
            part = slice(first, min(first + self.n_contexts, len(token_ids_NT)))
            activations = self._try(token_ids_NT[part])
            if activations is None:
                self._halve(part.stop - part.start, token_ids_NT.shape[1])
                continue
            yield part, activations
            del activations  # or they would be held through the next forward pass
            first = part.stop

    def _try(self, token_ids_BT: Tensor) -> dict[int, Tensor] | None:
        """None when memory ran out; then nothing of the failed pass is held any more."""
        try:
            return self.model.activations(token_ids_BT)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _halve(self, n_tried: int, n_positions: int) -> None:
        if n_tried == 1:
            raise InputError(
                f"One context of {n_positions} tokens does not fit into the memory of device "
                f"{self.model.device}. Pass a smaller --context-size, --dtype bfloat16, or another "
                "--device."
            )
        self.n_contexts = n_tried // 2
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
