"""What runs on a GPU, against its CPU twin. Only adds: everything here is tested on the CPU too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_pipe.pipeline import cli_demo
from sae_pipe.stages.batches import TorchBatches
from sae_pipe.stages.fit import fit
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.forward import HostCopier
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.sources import TextConfig
from sae_pipe.storage import ActivationStore, InputError, open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def harvested(out: Path, device: str, **changes: Any) -> ActivationStore:
    config = HarvestConfig(
        model=str(cli_demo.MODEL),
        layers=(3,),
        mask_p=(0.3,),
        out=out,
        text=TextConfig(dataset=str(cli_demo.TEXT)),
        tokens=20_000,
        heldout_tokens=500,
        device=device,
        dtype="float32",
        **changes,
    )
    return open_store(harvest(config, say=lambda line: None, show_progress=False)[0])


def test_a_harvest_on_the_gpu_stores_the_rows_of_one_on_the_cpu(tmp_path: Path) -> None:
    on_cpu = harvested(tmp_path / "cpu.zarr", "cpu")
    on_gpu = harvested(tmp_path / "gpu.zarr", "cuda")
    everything = slice(None)
    for found, expected in zip(on_gpu.source(everything), on_cpu.source(everything), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(on_gpu.masked(everything), on_cpu.masked(everything))
    difference = on_gpu.read(everything) - on_cpu.read(everything)
    assert np.square(difference).sum() < 1e-4 * on_cpu.mean_squared_norm * on_cpu.n_rows


def test_the_same_harvest_twice_on_the_gpu_gives_the_same_bytes(tmp_path: Path) -> None:
    stores = [harvested(tmp_path / name / "acts.zarr", "cuda") for name in ("a", "b")]
    assert stores[0].digest == stores[1].digest


def test_two_workers_on_the_gpu_give_the_bytes_of_one_process(tmp_path: Path) -> None:
    options: dict[str, Any] = {"block_bytes": 2_000_000, "batch_contexts": 64}
    one = harvested(tmp_path / "one.zarr", "cuda", **options)
    many = harvested(tmp_path / "many.zarr", "cuda", workers=2, **options)
    assert (
        one.manifest["train"]["layout"]["n_rows"]
        > 2 * one.manifest["train"]["layout"]["block_rows"]
    )
    assert one.digest == many.digest


def test_batches_on_the_gpu_are_those_on_the_cpu(small_store: ActivationStore) -> None:
    on_cpu = TorchBatches(small_store, batch_size=300, seed=1, scale=0.5)
    on_gpu = TorchBatches(small_store, batch_size=300, seed=1, scale=0.5, device="cuda")
    kept = [next(on_gpu) for _ in range(40)]  # also those that are not copied back at once
    for found in kept:
        torch.testing.assert_close(found.cpu(), next(on_cpu), rtol=0, atol=0)
    on_cpu.close()
    on_gpu.close()


def test_rows_come_off_the_gpu_in_order_and_unchanged() -> None:
    copier = HostCopier(torch.device("cuda"))
    sent = [torch.randn(1000, 64, device="cuda").to(torch.bfloat16) for _ in range(50)]
    received: list[torch.Tensor] = []
    for rows in sent:
        # The source is overwritten as soon as it is handed over, as an allocator would do.
        copier.put({0: rows * 1}, lambda parts, finite: received.append(parts[0].clone()))
    copier.flush()
    copier.close()
    for rows, found in zip(sent, received, strict=True):
        torch.testing.assert_close(found, rows.cpu(), rtol=0, atol=0)


def test_a_fit_larger_than_the_free_memory_of_the_gpu_is_refused(
    small_store: ActivationStore, tmp_path: Path
) -> None:
    config = FitConfig(arch="topk", k=3, d_sae=10**10, batch_size=128, device="cuda")
    with pytest.raises(InputError, match=r"of memory for .*, but cuda has free [\d.]+ GB\. Pass"):
        fit(small_store, config, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()
