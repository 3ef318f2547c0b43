"""What fit_speed.py measures beside the race: the device's matrix rate, and many SAEs from one stream."""

# B rows, D d_in, S d_sae

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_TRIES = 5
_TRY_S = 0.2
# Of a product that fills the device.
_SIDE = {"cpu": 1024, "cuda": 8192}


def wait(device: torch.device) -> None:
    """Until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large product (2 n^3 of an n x n one): median of some tries."""
    side = _SIDE.get(device.type, 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = left @ right
    rates = []
    for _ in range(_TRIES):
        wait(device)
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < _TRY_S:
            torch.mm(left, right, out=out)
            done += 1
            if done % 8 == 0:
                wait(device)
        wait(device)
        rates.append(done * 2 * side**3 / (time.perf_counter() - begun))
    return statistics.median(rates)


def share(steps_per_s: float, products: int, sizes: tuple[int, int, int], rate: float) -> float:
    """Of the matrix rate: what a step does that stands for so many products of (B, D) and (D, S)."""
    n_rows, d_in, d_sae = sizes
    return steps_per_s * products * 2 * n_rows * d_in * d_sae / rate


def together_line(
    one: Callable[[Tensor], object],
    many: Sequence[Callable[[Tensor], object]],
    batches: list[Tensor],
    *,
    device: torch.device,
    rounds: int,
    steps: int,
) -> str:
    """Milliseconds of a batch for one SAE and for many that are given it one after another."""
    found: dict[int, list[float]] = {1: [], len(many): []}
    for _ in range(rounds):
        for takers in ([one], many):
            wait(device)
            begun = time.perf_counter()
            for step in range(steps):
                for take in takers:
                    take(batches[step % len(batches)])
            wait(device)
            found[len(takers)].append((time.perf_counter() - begun) / steps)
    ratios = sorted(
        each / (len(many) * alone) for alone, each in zip(found[1], found[len(many)], strict=True)
    )
    alone_ms, all_ms = (1e3 * statistics.median(found[count]) for count in (1, len(many)))
    return (
        f"{alone_ms:.3f} ms a batch for one, {all_ms:.3f} for {len(many)}: "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of {len(many)} alone"
    )


def warmed(
    takers: Sequence[Callable[[Tensor], object]], batches: list[Tensor], steps: int
) -> Iterator[Callable[[Tensor], object]]:
    """The same, after so many untimed steps of each."""
    for take in takers:
        for step in range(steps):
            take(batches[step % len(batches)])
        yield take
