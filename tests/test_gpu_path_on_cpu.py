"""What a step does on a GPU, checked without one: it asks for no value, and it can be recorded.

Tensors of torch's device "meta" have shapes and no values, and what is not on a CPU takes the way of a
GPU: a step that goes through on them cannot have looked at anything. The numbers of that way are
checked on a CPU that is forbidden to look, and recorded steps on a tape (taped.py).
"""

# B rows, D d_in

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_pipe.stages.captured import EAGER_STEPS
from sae_pipe.stages.fitconfig import FitConfig
from sae_pipe.stages.sae import get_architecture
from sae_pipe.stages.sae.asking import may_ask, without_asking
from sae_pipe.stages.sae.initialise import geometric_median
from sae_pipe.stages.sae.support import FullSupport, SparseSupport
from sae_pipe.stages.trainer import Trainer

from .gpu_cases import ALL_CASES, FIRST_OF_ARCH, MORE_CASES, VARIANTS, trainer_of
from .parity_cases import BATCH, CASES, D_IN, STEPS, Case
from .taped import NeverWaits, Tape, WouldWait

META = torch.device("meta")
of_every_case = pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """Means of p_anneal's queue have torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def row_dots_without_values() -> Iterator[None]:
    """The one operation of a step that torch does not know on tensors without values."""

    def shape(grad: Tensor, weight: Tensor, indices: Tensor, *_: object) -> Tensor:
        return grad.new_empty(len(indices))

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("_embedding_bag_per_sample_weights_backward", shape, "Meta")  # type: ignore[no-untyped-call]
    yield
    library._destroy()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        (name, variant)
        for name, case in ALL_CASES.items()
        for variant in VARIANTS
        if variant == "float32" or case is FIRST_OF_ARCH[case.arch]
    ],
)
@pytest.mark.usefixtures("row_dots_without_values")
def test_no_step_asks_a_gpu_for_a_value(name: str, variant: str) -> None:
    case = ALL_CASES[name]
    config = FitConfig(**(case.fit_options | VARIANTS[variant]))
    architecture = get_architecture(config.arch)
    options = architecture.options_from(config)
    with META:
        sae = architecture(d_in=D_IN, d_sae=config.d_sae, k=config.k, **options)
    trainer = Trainer(sae, config, config.schedule(), META)
    batch_BD = torch.empty(BATCH, D_IN, device=META)
    trainer.step(batch_BD)  # what is made once
    every = config.resample_steps or STEPS + 1
    # Before and after dead latents, the threshold, the warm-up and the turns of p.
    for step in (1, 2, 16, 27, 45, 91):
        trainer.updates = step
        if step % every:  # a resampling counts the dead, once in so many steps
            with NeverWaits("meta") as watched:
                values = trainer.step(batch_BD)
    assert isinstance(values["loss"], Tensor)
    assert values["loss"].device == META
    assert {"aten.mm", "aten.addmm"} & watched.seen


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.zeros((), device=x.device)),
        lambda x: x.topk(int(x.sum())),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]).to(x.device),
    ],
    ids=range(12),
)
def test_what_would_make_a_gpu_wait_is_noticed(device: str, ask: Callable[[Tensor], Any]) -> None:
    with pytest.raises(WouldWait), NeverWaits(device):
        ask(torch.ones(4, device=device))


def test_a_number_of_the_host_in_a_kernel_is_no_waiting() -> None:
    with NeverWaits("meta"):
        x = torch.ones(4, device="meta")
        torch.where(x * 2 > 1, x, 0.0).clamp(max=1.0).fill_(3.0)
        x[torch.zeros(2, dtype=torch.int64, device="meta")].topk(1)


def taped(trainer: Trainer) -> list[Tape]:
    """The tapes that the trainer records from now on."""
    tapes: list[Tape] = []

    def new() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    trainer.capture_with(new)
    return tapes


def assert_equal_states(one: Trainer, other: Trainer) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@of_every_case
@pytest.mark.usefixtures("float64_by_default")
def test_recorded_steps_give_the_bits_of_eager_ones(case: Case) -> None:
    eager, recorded, ordinary = trainer_of(case), trainer_of(case), trainer_of(case)
    tapes, before = taped(recorded), dict[str, Any]()
    for batch_BD in case.batches()[:70]:
        own = ordinary.step(batch_BD)
        with without_asking():
            expected = eager.step(batch_BD)
        kept = {name: float(value) for name, value in before.items()}
        values = recorded.step(batch_BD)
        assert kept == {name: float(value) for name, value in before.items()}  # not overwritten
        before = values
        for name, value in expected.items():
            assert float(values[name]) == float(value), name
            assert float(value) == pytest.approx(float(own[name]), rel=1e-9, abs=1e-12), name
    assert_equal_states(recorded, eager)
    assert sum(tape.replays for tape in tapes) > 35
    theirs = ordinary.state_dict()
    for name, value in recorded.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["topk", "matryoshka", "p_anneal", "jumprelu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_steps_of_other_types_do_so_too(name: str, variant: str) -> None:
    case = CASES[name]
    eager, recorded = (trainer_of(case, **VARIANTS[variant]) for _ in range(2))
    tapes = taped(recorded)
    for trainer in (eager, recorded):  # what only a GPU does
        trainer.sae.low_products = variant == "bfloat16"
    for batch_BD in case.batches()[:50]:
        with without_asking():
            expected = eager.step(batch_BD)
        values = recorded.step(batch_BD)
        for key, value in expected.items():
            assert float(values[key]) == float(value), key
    assert_equal_states(recorded, eager)
    assert sum(tape.replays for tape in tapes) > 20


@contextmanager
def counted(tapes: list[Tape], replays: int) -> Iterator[None]:
    before = sum(tape.replays for tape in tapes)
    yield
    assert sum(tape.replays for tape in tapes) - before == replays


def test_each_phase_begins_with_eager_steps() -> None:
    case = CASES["topk"]  # the threshold begins at step 16; nothing can be dead before step 1
    trainer = trainer_of(case, dead_after_tokens=10**6)
    tapes, batches = taped(trainer), case.batches()
    with counted(tapes, 16 - EAGER_STEPS):
        for batch_BD in batches[:16]:
            trainer.step(batch_BD)
    with counted(tapes, 20 - EAGER_STEPS):
        for batch_BD in batches[16:36]:
            trainer.step(batch_BD)
    with counted(tapes, 0):  # another shape
        trainer.step(batches[36][:-1])
        trainer.step(batches[36])


def test_a_k_that_changes_in_every_step_is_not_recorded() -> None:
    case = MORE_CASES["k annealed"]
    trainer = trainer_of(case, k_anneal_steps=12, threshold_start=90, dead_after_tokens=10**6)
    tapes, batches = taped(trainer), case.batches()
    with counted(tapes, 0):
        for batch_BD in batches[:14]:
            trainer.step(batch_BD)
    with counted(tapes, 10):
        for batch_BD in batches[14 : 24 + EAGER_STEPS - 1]:
            trainer.step(batch_BD)


def test_a_state_that_was_loaded_is_the_one_that_is_stepped() -> None:
    case = CASES["gated"]
    through, other = trainer_of(case), trainer_of(case, seed=0)
    tapes, batches = taped(other), case.batches()
    for batch_BD in batches[:40]:
        other.step(batch_BD)
    with without_asking():
        for batch_BD in batches[:30]:
            through.step(batch_BD)
        saved = {name: value.clone() for name, value in through.state_dict().items()}
        for batch_BD in batches[30:60]:
            through.step(batch_BD)
    kept = {name: value.clone() for name, value in saved.items()}
    other.load_state_dict(saved)
    with counted(tapes, 30 - EAGER_STEPS):
        for batch_BD in batches[30:60]:
            other.step(batch_BD)
    assert_equal_states(other, through)
    for name, value in saved.items():  # of which nothing was taken as memory to work on
        assert torch.equal(value, kept[name]), name


def test_a_recorded_step_remembers_the_first_bad_batch() -> None:
    case = CASES["gated"]
    trainer, batches = trainer_of(case), case.batches()
    taped(trainer)
    for step in range(16):
        trainer.step(batches[step] * (float("nan") if step in (12, 14) else 1))
    assert trainer.captured is not None
    assert trainer.captured.is_recorded
    assert int(trainer.first_bad_step) == int(trainer.state_dict()["first_bad_step"]) == 12


def test_a_trainer_that_records_goes_when_nothing_holds_it() -> None:
    trainer = trainer_of(CASES["gated"])
    taped(trainer)
    for batch_BD in CASES["gated"].batches()[:6]:
        trainer.step(batch_BD)
    held = weakref.ref(trainer)
    gc.disable()  # by itself, not by a collection
    try:
        del trainer
        assert held() is None
    finally:
        gc.enable()


class Unrecordable(Tape):  # type: ignore[no-untyped-call]
    def record(self, work: Callable[[], Any]) -> Any:
        super().record(work)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nMore.")


def test_steps_go_on_eagerly_where_nothing_can_be_recorded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES["matryoshka"]
    eager, other = trainer_of(case), trainer_of(case)
    other.capture_with(Unrecordable)
    for batch_BD in case.batches()[:30]:
        with without_asking():
            eager.step(batch_BD)
        other.step(batch_BD)
    assert_equal_states(eager, other)
    assert other.captured is not None
    assert not other.captured.is_recorded
    assert capsys.readouterr().err == (
        "Steps are not captured, and so take longer: CUDA error: operation not permitted when "
        "stream is capturing\n"
    )


def test_a_geometric_median_without_asking_is_the_one_with() -> None:
    random = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-3, 0.0):
        x_BD = torch.randn(50, 6, generator=random, dtype=torch.float64).exp() * scale + 2
        own = geometric_median(x_BD)
        with without_asking(), NeverWaits():
            found = geometric_median(x_BD)
        assert torch.equal(found, own)


@pytest.mark.parametrize("n_entries", [0, 1, 63, 64, 65, 1000])
def test_sums_of_pieces_are_the_sums(n_entries: int) -> None:
    random = torch.Generator().manual_seed(n_entries)
    # Some latents are in no row, one is in most.
    latent_N = torch.randint(0, 30, (n_entries,), generator=random).clamp(max=20)
    row_N = torch.arange(n_entries)
    values_N = torch.randn(n_entries, generator=random, dtype=torch.float64)
    table_ND = torch.randn(max(n_entries, 1), 3, generator=random, dtype=torch.float64)
    expected_SD = torch.zeros(30, 3, dtype=torch.float64)
    for row, latent in enumerate(latent_N):
        expected_SD[latent] += values_N[row] * table_ND[row]
    support = SparseSupport(values_N, row_N, latent_N, torch.Size((max(n_entries, 1), 30)))
    with without_asking(), NeverWaits():
        found_SD = support.sums_by_latent(table_ND, row_N, values_N)
        sums_S = support.latent_sums(values_N)
    torch.testing.assert_close(found_SD, expected_SD)
    counted_S = torch.zeros(30, dtype=torch.float64).index_add(0, latent_N, values_N)
    torch.testing.assert_close(sums_S, counted_S)


def test_asking_is_forbidden_only_inside() -> None:
    x = torch.zeros(1)
    assert may_ask(x)
    with without_asking():
        assert not may_ask(x)
    assert may_ask(x)
    assert not may_ask(x.to(META))


def test_products_in_bfloat16_keep_float32_and_its_range() -> None:
    random = torch.Generator().manual_seed(0)
    pre_BS = torch.randn(40, 30, generator=random).abs()
    w_dec_SD, w_enc_DS = (
        torch.randn(30, 20, generator=random),
        torch.randn(20, 30, generator=random),
    )
    x_BD = torch.randn(40, 20, generator=random) + 3
    results = []
    for low_products in (False, True):
        support = FullSupport(pre_BS, low_products=low_products)
        leaves = [each.clone().requires_grad_() for each in (w_enc_DS, w_dec_SD)]
        x_hat_BD = support.decode(support.encode(x_BD, leaves[0], None), leaves[1])
        x_hat_BD.square().sum().backward()  # type: ignore[no-untyped-call]
        results.append([x_hat_BD.detach(), *(leaf.grad for leaf in leaves)])
    for exact, low in zip(*results, strict=True):
        assert exact is not None
        assert low is not None
        assert low.dtype == torch.float32
        error = float((low - exact).norm() / exact.norm())
        assert 1e-4 < error < 1e-2
