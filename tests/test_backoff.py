"""Batches that shrink when memory runs out."""

# N contexts, B contexts of a batch, T positions, D d_model

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sae_pipe.stages.backoff import (
    TOKENS_PER_BATCH,
    BatchRunner,
    find_batch_size,
    is_out_of_memory,
    shrink_to_fit,
)
from sae_pipe.stages.hooks import HookedModel
from sae_pipe.stages.models import inspect_model, load_truncated
from sae_pipe.storage.errors import InputError

CPU = torch.device("cpu")


class SmallMemory(nn.Module):
    """A block in a machine whose memory holds only so many contexts at once."""

    def __init__(self, block: nn.Module, most_contexts: int, error: Exception) -> None:
        super().__init__()
        self.block, self.most_contexts, self.error = block, most_contexts, error
        self.tried: list[int] = []

    def forward(self, hidden_BTD: Tensor, **how: object) -> Tensor:
        self.tried.append(len(hidden_BTD))
        if len(hidden_BTD) > self.most_contexts:
            raise self.error
        found: Tensor = self.block(hidden_BTD, **how)
        return found


def load(folder: Path) -> HookedModel:
    return load_truncated(inspect_model(str(folder)), [0, 1], "resid_post", CPU, torch.float32)


def small_memory(folder: Path, most_contexts: int, error: Exception) -> HookedModel:
    model = load(folder)
    model.blocks[1] = SmallMemory(model.blocks[1], most_contexts, error)
    return model


@pytest.fixture
def token_ids_NT() -> Tensor:
    return torch.randint(0, 64, (11, 16), generator=torch.Generator().manual_seed(0))


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("most_contexts", [1, 2, 3, 8, 11])
def test_every_context_is_run_once_and_in_order(
    most_contexts: int, neox_folder: Path, token_ids_NT: Tensor
) -> None:
    runner = BatchRunner(small_memory(neox_folder, most_contexts, OUT_OF_MEMORY), 8)
    parts = list(runner.run(token_ids_NT))
    assert [i for part, _ in parts for i in range(part.start, part.stop)] == list(range(11))
    expected = load(neox_folder).activations(token_ids_NT)
    for layer in (0, 1):
        found_NTD = torch.cat([activations[layer] for _, activations in parts])
        torch.testing.assert_close(found_NTD, expected[layer])


def test_a_batch_that_had_to_be_halved_stays_halved(
    neox_folder: Path, token_ids_NT: Tensor
) -> None:
    model = small_memory(neox_folder, 2, OUT_OF_MEMORY)
    runner = BatchRunner(model, 8)
    for _ in range(2):
        list(runner.run(token_ids_NT))
    assert runner.n_contexts == 2
    tried = model.blocks[1].tried
    assert isinstance(tried, list)
    assert tried == [8, 4, *(2, 2, 2, 2, 2, 1) * 2]


def test_one_context_that_does_not_fit_is_an_error(neox_folder: Path, token_ids_NT: Tensor) -> None:
    message = (
        "One context of 16 tokens does not fit into the memory of device cpu. Pass a smaller "
        "--context-size, --dtype bfloat16, or another --device."
    )
    runner = BatchRunner(small_memory(neox_folder, 0, OUT_OF_MEMORY), 8)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        list(runner.run(token_ids_NT))


def test_other_errors_are_not_taken_for_missing_memory(
    neox_folder: Path, token_ids_NT: Tensor
) -> None:
    runner = BatchRunner(small_memory(neox_folder, 2, RuntimeError("CUDA error: launch")), 8)
    with pytest.raises(RuntimeError, match=r"^CUDA error: launch$"):
        list(runner.run(token_ids_NT))
    assert runner.n_contexts == 8


def test_an_empty_batch_is_refused(neox_folder: Path) -> None:
    with pytest.raises(InputError, match=r"^A batch of 0 contexts is empty\. Pass 1 or more\.$"):
        BatchRunner(load(neox_folder), 0)


def test_memory_that_the_host_refuses_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(("n_contexts", "found"), [(32, 4), (5, 5), (6, 3), (1, 1)])
def test_a_trial_finds_the_batch_that_fits(n_contexts: int, found: int, neox_folder: Path) -> None:
    model = small_memory(neox_folder, 5, OUT_OF_MEMORY)
    assert shrink_to_fit(model, n_contexts, context_size=16) == found


def test_on_a_cpu_the_batch_is_a_fixed_number_of_tokens(neox_folder: Path) -> None:
    """Not timed anew in each run, so that a resumed harvest sums in the same order."""
    model = load(neox_folder)
    assert find_batch_size(model, 64) * 64 == TOKENS_PER_BATCH["cpu"]
    assert find_batch_size(model, 100) == TOKENS_PER_BATCH["cpu"] // 100
    assert find_batch_size(model, 10**6) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_batch_found_goes_through(neox_folder: Path) -> None:
    info = inspect_model(str(neox_folder))
    model = load_truncated(info, [0, 1], "resid_post", torch.device("cuda"), torch.bfloat16)
    n_contexts = find_batch_size(model, 64)
    assert n_contexts >= 1
    token_ids_BT = torch.zeros((n_contexts, 64), dtype=torch.int64)
    assert model.activations(token_ids_BT)[1].shape == (n_contexts, 64, 32)
