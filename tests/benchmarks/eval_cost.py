"""What it costs to judge eight SAEs on one evaluation set, as a multiple of judging one, the
language model's pass included.

The language model (random weights in the shape of pythia-160m, blocks 0 to 8) is run once over
random tokens into an evaluation set; then one SAE, and all of them, are judged on it by all metrics
over rows, without baselines (which several SAEs share). CPU seconds of the process stand beside the
clock: on a machine with other work they say more.

    python tests/benchmarks/eval_cost.py                       # 8 SAEs, d_in 768, d_sae 4096
    python tests/benchmarks/eval_cost.py --rows 65536 --saes 4
"""

# N rows, B contexts of a batch, T positions, D d_in, S d_sae

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from forward_floor import describe_machine, save_pythia_160m_shape

from sae_pipe.stages.devices import pick_device
from sae_pipe.stages.evaluation.engine import EvalConfig, evaluate_runs
from sae_pipe.stages.models import inspect_model, load_truncated
from sae_pipe.stages.sae import get_architecture
from sae_pipe.stages.sae.weights import save_sae
from sae_pipe.storage.evalset import EvalSet
from sae_pipe.storage.evalset_writer import CHUNK_ROWS, Contents, Origin, write_evalset

CONTEXT, BATCH_CONTEXTS, LAYER = 128, 32, 8
Seconds = tuple[float, float]  # by the clock, of the processor
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, Seconds]:
    clock, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, (time.perf_counter() - clock, time.process_time() - cpu)


def build_set(path: Path, model_folder: Path, n_rows: int, device: torch.device) -> EvalSet:
    """The language model's pass, and its activations on disk."""
    info = inspect_model(str(model_folder))
    model = load_truncated(info, [LAYER], "resid_post", device, torch.float32)
    random = torch.Generator().manual_seed(0)
    tokens_CT = torch.randint(1, 50_000, (n_rows // CONTEXT, CONTEXT), generator=random)
    parts = [
        model.activations(part)[LAYER].flatten(0, 1).float().cpu()
        for part in torch.split(tokens_CT, BATCH_CONTEXTS)
    ]
    n_contexts = len(tokens_CT)
    contents = Contents(
        suite="core",
        pooling="all",
        tasks=[],
        texts=[""] * (n_contexts - 1) + ["text"],
        item_task=np.full(n_contexts, -1),
        item_label=np.full(n_contexts, -1),
        item_split=np.ones(n_contexts, int),
        item_document=np.arange(n_contexts),
        row_item=np.repeat(np.arange(n_contexts), CONTEXT),
        row_token=tokens_CT.flatten().numpy(),
        row_position=np.tile(np.arange(CONTEXT), n_contexts),
    )
    recipe = {
        "model": {"name": "random", "revision": None},
        "layer": LAYER,
        "hook": "resid_post",
        "context_size": CONTEXT,
    }
    rows_ND = torch.cat(parts).numpy()
    origin = Origin(recipe=recipe, tokenizer_json="{}")
    return write_evalset(path, rows_ND, contents, origin, chunk_rows=CHUNK_ROWS)


def make_runs(root: Path, evalset: EvalSet, n: int, d_sae: int) -> list[Path]:
    """SAEs of four L0 and two architectures, centred on the rows, their thresholds set to it."""
    x_BD = torch.from_numpy(evalset.read(0, 2048))
    found = []
    for number in range(n):
        k, arch = 20 * 2 ** (number // 2 % 4), ("topk", "batch_topk")[number % 2]
        sae = get_architecture(arch)(d_in=evalset.d_in, d_sae=d_sae, k=k)
        sae.initialise_(number)
        sae.start_from(x_BD)
        with torch.no_grad():
            pre = ((x_BD - sae.b_dec) @ sae.W_enc).flatten()
            sae.set_threshold_(float(pre.topk(k * len(x_BD)).values.min()))
        save_sae(sae, root / f"sae{number}")
        found.append(root / f"sae{number}")
    return found


def judge(runs: Sequence[Path], evalset: EvalSet, out: Path, device: str) -> None:
    config = EvalConfig(out=out, evalsets=(evalset.path,), baselines=False, device=device)
    for outcome in evaluate_runs(runs, config, show_progress=False):
        if outcome.error is not None:
            raise outcome.error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--saes", type=int, default=8)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = pick_device(given.device)
    print(describe_machine(device))
    with tempfile.TemporaryDirectory() as folder:
        save_pythia_160m_shape(Path(folder) / "model")
        ratios = [one_round(Path(folder), number, given, device) for number in range(given.rounds)]
    print(
        f"{given.saes} SAEs against one, median of {given.rounds}: "
        f"{statistics.median(r[0] for r in ratios):.2f} by the clock, "
        f"{statistics.median(r[1] for r in ratios):.2f} by CPU seconds"
    )


def one_round(
    folder: Path, number: int, given: argparse.Namespace, device: torch.device
) -> Seconds:
    """The ratio by the clock and by CPU seconds."""
    root = folder / f"round{number}"
    root.mkdir()
    evalset, lm = timed(lambda: build_set(root / "set.zarr", folder / "model", given.rows, device))
    runs = make_runs(root, evalset, given.saes, given.d_sae)
    _, one = timed(lambda: judge(runs[:1], evalset, root / "one", given.device))
    _, several = timed(lambda: judge(runs, evalset, root / "several", given.device))
    ratio = [(lm[i] + several[i]) / (lm[i] + one[i]) for i in (0, 1)]
    print(
        f"{given.rows:,} rows: language model {lm[0]:.1f} s (CPU {lm[1]:.1f}), one SAE "
        f"{one[0]:.1f} ({one[1]:.1f}), {given.saes} SAEs {several[0]:.1f} ({several[1]:.1f}); "
        f"ratio {ratio[0]:.2f} by the clock, {ratio[1]:.2f} by CPU"
    )
    return ratio[0], ratio[1]


if __name__ == "__main__":
    main()
