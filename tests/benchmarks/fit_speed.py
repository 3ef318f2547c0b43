"""Steps per second of our training step beside that of the public dictionary-learning trainers.

Both run in one process, on the same batches, from the same parameters, in turns; a ratio is taken
in each round, between neighbours in time, and the median over rounds is what counts, with its
range. Data and parameters are those of a fit that is well under way: rows of a synthetic
superposition with a common mean, noise and features as frequent as 1 / rank (or rows of a store),
decoder rows that are its directions, biases or thresholds such that the L0 asked for is active in
the architectures that do not select by rank, and a quarter of the latents pointing anywhere, which
in the runs with AuxK have long not fired (their encoder is so small that they are never selected, yet
positive in half of the rows, so that AuxK has as much to do as it can). How many latents were
active and dead in the last timed step is told.

With --device cuda ours is timed captured and eager, with float32, TF32 and bfloat16 products; each also as
a share of the bfloat16 matrix rate measured there; and eight SAEs of one stream beside one.

    pip install --no-deps dictionary-learning einops
    python tests/benchmarks/fit_speed.py                    # d_in 768, d_sae 4096, batch 2048, k 20
    python tests/benchmarks/fit_speed.py --arch topk gated --rounds 9 --store acts.zarr
    python tests/benchmarks/fit_speed.py --device cuda --d-sae 4096 65536 --batch-size 2048 4096
"""

# B rows, D d_in, S d_sae

import argparse
import datetime
import importlib.metadata
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peer_trainers
import torch
from fit_on_device import matrix_rate, share, together_line, wait, warmed
from superposition import Superposition
from torch import Tensor

from sae_pipe.stages.fit import build_trainer
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.sae import ARCHITECTURES
from sae_pipe.storage import InputError, open_store
from sae_pipe.storage.provenance import hardware

STEPS = 100_000  # of the run that the timed steps are a part of
DEAD_AFTER = 10_000_000  # a constant of the other side
DEAD_SHARE, DEAD_ENCODER_NORM = 0.25, 0.1
LR = 1e-6  # what is dead stays dead, and what is sparse sparse
SPARSITY = 0.01  # of the penalties; it does not matter for the time
UNTIMED_STEPS = 3  # b_dec, optimiser state, workspaces
UNTIMED_GPU_STEPS = 8  # and the record of a step


@dataclass
class Contestant:
    """One trainer: its step, and what it says about itself."""

    name: str
    step: Callable[[Tensor], Any]
    active: Callable[[], float]
    dead: Callable[[], int]


def batches_of(arguments: argparse.Namespace) -> tuple[list[Tensor], Tensor, Tensor]:
    """Batches, directions for the decoder, and the mean."""
    live = arguments.d_sae - int(DEAD_SHARE * arguments.d_sae)
    source = Superposition(
        n_features=live, d_in=arguments.d_in, active=arguments.l0, noise_share=0.1
    )
    if arguments.store is None:
        batches = [source.rows(arguments.batch_size) for _ in range(arguments.batches)]
        return batches, source.directions_FD, source.mean_D
    store = open_store(arguments.store)
    n_rows = arguments.batches * arguments.batch_size
    side = -(-arguments.d_in // store.d_in)  # rows side by side, where those of the store are short
    rows = torch.from_numpy(store.read(slice(0, n_rows * side))).float()
    assert len(rows) == n_rows * side, f"{arguments.store} has too few rows: {n_rows * side:,}"
    rows = rows.reshape(n_rows, -1)[:, : arguments.d_in].contiguous()
    rows /= rows.square().sum(dim=1).mean().sqrt()
    picked = rows[torch.randperm(n_rows)[:live]] - rows.mean(dim=0)
    directions = picked / picked.norm(dim=1, keepdim=True)
    return list(torch.split(rows, arguments.batch_size)), directions, rows.mean(dim=0)


def parameters(
    arch: str, batch_BD: Tensor, directions_FD: Tensor, mean_D: Tensor, d_sae: int, l0: int
) -> dict[str, Tensor]:
    """A fit that is well under way, under our parameter names."""
    random = torch.Generator().manual_seed(1)
    rows_SD = torch.randn(d_sae, len(mean_D), generator=random)
    rows_SD /= rows_SD.norm(dim=1, keepdim=True)
    n_dead = d_sae - len(directions_FD)
    # The most frequent features are not to lie side by side.
    rows_SD[n_dead:] = directions_FD[torch.randperm(len(directions_FD), generator=random)]
    start = {"W_enc": rows_SD.T.clone(), "W_dec": rows_SD}
    start["W_enc"][:, :n_dead] *= DEAD_ENCODER_NORM
    if arch in peer_trainers.TOPK_FAMILY:
        return start  # selection by rank needs no more; b_dec comes from the first batch
    pre_BS = (batch_BD - mean_D) @ start["W_enc"]
    cut = float(pre_BS.flatten().topk(l0 * len(batch_BD)).values[-1])
    start["b_dec"], cut_S = mean_D, torch.full((d_sae,), cut)
    if arch == "jumprelu":  # does not subtract b_dec
        return start | {"threshold": cut_S, "b_enc": -mean_D @ start["W_enc"]}
    if arch == "gated":
        return start | {"b_gate": -cut_S, "b_mag": -cut_S}
    return start | {"b_enc": -cut_S}


def our_side(
    arch: str,
    arguments: argparse.Namespace,
    start: dict[str, Tensor],
    batch_BD: Tensor,
    *,
    dead: int,
    **options: Any,
) -> Contestant:
    known = {field.name for field in fields(FitConfig)}
    wanted: dict[str, Any] = {"sparsity": SPARSITY, "sparsity_warmup_steps": 1, **options}
    if arch in peer_trainers.TOPK_FAMILY:
        wanted = options
    penalised = arch in ("relu", "gated", "p_anneal")
    if arch == "p_anneal":
        wanted |= {"anneal_start": STEPS // 2, "anneal_end": STEPS - 1, "p_end": 0.2}
    assert set(wanted) <= known, f"FitConfig does not know {set(wanted) - known}"
    config = FitConfig(
        arch=arch,
        k=None if penalised else arguments.l0,  # type: ignore[arg-type,unused-ignore]
        d_sae=arguments.d_sae,
        tokens=STEPS * arguments.batch_size,
        batch_size=arguments.batch_size,
        lr=LR,
        warmup_steps=1,
        threshold_start=0,
        dead_after_tokens=DEAD_AFTER,
        device=arguments.device,
        **wanted,
    )
    trainer = build_trainer(config, arguments.d_in)
    with torch.no_grad():
        for name, parameter in trainer.sae.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    with torch.no_grad():
        trainer.sae.start_from(batch_BD)
    state = trainer.state_dict()
    # So late that latents can be dead, which a step on a GPU does not look at before.
    state["updates"] = torch.tensor(DEAD_AFTER // arguments.batch_size + 1)
    state["tokens_since_fired"][:dead] = DEAD_AFTER
    trainer.load_state_dict(state)
    values: dict[str, Any] = {}

    def step(batch_BD: Tensor) -> None:
        with products(options.get("dtype", "float32")):
            values.update(trainer.step(batch_BD))

    return Contestant(
        name="ours" + "".join(f", {NAMES.get(value, value)}" for value in options.values()),
        step=step,
        active=lambda: float(values["l0"]),
        dead=lambda: int(values.get("dead", 0)),
    )


NAMES = {False: "eager", "bf16": "bf16 selection"}


@contextmanager
def products(dtype: str) -> Iterator[None]:
    """As a fit of that type has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def their_side(
    arch: str, arguments: argparse.Namespace, start: dict[str, Tensor], batch: Tensor, *, dead: int
) -> Contestant:
    options: dict[str, Any] = {"steps": STEPS, "lr": LR, "warmup_steps": 1}
    if arch in peer_trainers.TOPK_FAMILY:
        options["threshold_start_step"] = 0
        if arch == "matryoshka":
            options["group_fractions"] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
    else:
        name = {"jumprelu": "sparsity_penalty", "p_anneal": "initial_sparsity_penalty"}
        options |= {name.get(arch, "l1_penalty"): SPARSITY, "sparsity_warmup_steps": 1}
        if arch == "p_anneal":
            options |= {"anneal_start": STEPS // 2, "anneal_end": STEPS - 1, "p_end": 0.2}
    sizes = {"d_in": arguments.d_in, "d_sae": arguments.d_sae, "k": arguments.l0}
    trainer = peer_trainers.build(arch, **sizes, device=arguments.device, **options)
    peer_trainers.give(trainer, arch, start)
    if dead:
        trainer.num_tokens_since_fired[:dead] = DEAD_AFTER
    done = 0

    def step(batch_BD: Tensor) -> None:
        nonlocal done
        trainer.update(done, batch_BD)
        done += 1

    def active() -> float:
        kept = peer_trainers.latents(trainer, arch, batch) > 0
        return float(kept.sum(dim=1).float().mean())

    def dead_now() -> int:
        return max(0, int(getattr(trainer, "dead_features", 0)))

    return Contestant("theirs", step, active, dead_now)


def race(contestants: list[Contestant], batches: list[Tensor], rounds: int, steps: int) -> Any:
    """Steps per second of each contestant in each round."""
    turn, device = 0, batches[0].device
    for contestant in contestants:
        for i in range(UNTIMED_STEPS if device.type == "cpu" else UNTIMED_GPU_STEPS):
            contestant.step(batches[i % len(batches)])
    rates: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for contestant, found in zip(contestants, rates, strict=True):
            wait(device)
            begun = time.perf_counter()
            for i in range(steps):
                contestant.step(batches[(turn + i) % len(batches)])
            wait(device)
            found.append(steps / (time.perf_counter() - begun))
        turn += steps
    return rates


def lines(arch: str, arguments: argparse.Namespace, data: Any, rate: float) -> Iterator[str]:
    """The table's lines of one architecture. rate: of matrix products, operations per second."""
    sizes = arguments.batch_size, arguments.d_in, arguments.d_sae
    rows, directions_FD, mean_D = data
    batches = [each.to(arguments.device) for each in rows]
    for dead in (0, int(DEAD_SHARE * arguments.d_sae)):
        if dead and arch not in peer_trainers.TOPK_FAMILY:
            continue
        start = parameters(arch, rows[0], directions_FD, mean_D, arguments.d_sae, arguments.l0)
        contestants = [
            their_side(arch, arguments, start, batches[0], dead=dead),
            our_side(arch, arguments, start, batches[0], dead=dead),
        ]
        for options in variants(arch, arguments.device):
            contestants.append(our_side(arch, arguments, start, batches[0], dead=dead, **options))
        rates = race(contestants, batches, arguments.rounds, arguments.steps)
        for contestant, found in zip(contestants, rates, strict=True):
            ratios = sorted(a / b for a, b in zip(found, rates[0], strict=True))
            speed = statistics.median(found)
            yield (
                f"| {arch} | {arguments.d_sae} | {arguments.batch_size} | {contestant.name} | "
                f"{speed:.2f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | "
                f"{share(speed, 1, sizes, rate):.1%} | {share(speed, 5, sizes, rate):.1%} | "
                f"{contestant.active():.1f} | {contestant.dead()} |"
            )


def variants(arch: str, device: str) -> Iterator[dict[str, Any]]:
    """Ways of ours to do the same beside the default one."""
    names = {field.name for field in fields(FitConfig)}
    if arch in peer_trainers.TOPK_FAMILY and "selection" in names:
        yield {"selection": "bf16"}
    if device.startswith("cuda"):
        yield {"capture": False}
        yield {"dtype": "tf32"}
        yield {"dtype": "bfloat16"}
        yield {"dtype": "bfloat16", "capture": False}


def together(arch: str, arguments: argparse.Namespace, data: Any) -> str:
    """One SAE, and several that are given the same batches."""
    rows, directions_FD, mean_D = data
    batches = [each.to(arguments.device) for each in rows]
    start = parameters(arch, rows[0], directions_FD, mean_D, arguments.d_sae, arguments.l0)
    sides = [
        our_side(arch, arguments, start, batches[0], dead=0, seed=seed).step
        for seed in range(arguments.saes + 1)
    ]
    one, *many = warmed(sides, batches, UNTIMED_GPU_STEPS)
    sizes = {"device": batches[0].device, "rounds": arguments.rounds, "steps": arguments.steps}
    return f"{arch}, d_sae {arguments.d_sae}: {together_line(one, many, batches, **sizes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    both = [arch for arch in ARCHITECTURES if arch in peer_trainers.TRAINERS]
    parser.add_argument("--arch", nargs="+", choices=both, default=both)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[4096])
    parser.add_argument("--l0", type=int, default=20)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2048])
    parser.add_argument("--batches", type=int, default=4, help="different ones, gone round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--saes", type=int, default=0, help="also so many together; 8 on cuda")
    parser.add_argument("--store", type=Path, help="rows of a store instead of synthetic ones")
    arguments = parser.parse_args()
    if not peer_trainers.are_installed():
        print(
            "dictionary-learning is not installed, so there is nothing to compare with: "
            "pip install --no-deps dictionary-learning einops"
        )
        return
    torch.set_num_threads(arguments.threads)
    names = ("sae-pipe", "dictionary-learning", "torch", "numpy")
    print(f"date      {datetime.datetime.now(datetime.UTC).date()}")
    print(f"hardware  {hardware()['processor']}, {torch.get_num_threads()} threads")
    print(f"versions  { {name: importlib.metadata.version(name) for name in names} }")
    print(f"command   {' '.join(sys.argv)}")
    print(f"load      {os.getloadavg()[0]:.1f} before the first round\n")
    device = torch.device(arguments.device)
    rate = matrix_rate(device, torch.bfloat16)
    print(f"bfloat16  {rate / 1e12:.3g} T operations/s in a large product\n")
    print(
        "| architecture | d_sae | batch | side | steps/s | ratio (range) | encoder's product of the "
        "matrix rate | all five products | active latents | dead |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    notes = []
    for sized in each_size(arguments):
        data = batches_of(sized)
        for arch in arguments.arch:
            try:
                for line in lines(arch, sized, data, rate):
                    print(line, flush=True)
                if sized.saes:
                    notes.append(together(arch, sized, data))
            except InputError as error:
                print(f"{arch}: {error}")
    print("\n" + "\n".join(notes))


def each_size(arguments: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The arguments of each combination of a number of latents and of rows."""
    saes = arguments.saes or (8 if arguments.device.startswith("cuda") else 0)
    for d_sae, batch_size in itertools.product(arguments.d_sae, arguments.batch_size):
        sizes = {"d_sae": d_sae, "batch_size": batch_size, "saes": saes}
        yield argparse.Namespace(**(vars(arguments) | sizes))


if __name__ == "__main__":
    main()
