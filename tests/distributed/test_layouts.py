"""Tensor, sequence, context, pipeline and data parallelism train as one process does."""

from dataclasses import dataclass, replace

import pytest

from comparing import error
from distributed.gradients import assemble
from distributed.layouts import Layout, Model
from distributed.training import train

MODEL = Model()
SWIGLU = Model(swiglu=True)
ONE_HEAD = Model(heads=1, swiglu=True).with_megalodon(rescale_nffn=True)
DEEP = Model(num_layers=4, swiglu=True).with_megalodon(rescale_nffn=True)
TIED = Model(tied=True).with_megalodon(scale_embedding=True)
# Of 48 positions, so that no chunk lies across two of CP 2's segments of 12, or of 24.
ALIGNED = Model().with_megalodon(chunk_size=12)
# The last chunk has 8 positions.
PARTLY_FILLED = Model().with_megalodon(chunk_size=20)
SMALL_MICRO_BATCHES = Model(num_layers=4, micro_batch=1)

EIGHT = Layout(tp=2, sequence_parallel=True, pp=2, cp=2)


@dataclass(frozen=True)
class Case:
    """A model in a layout."""

    model: Model
    layout: Layout


COMMON = {
    "TP 2": Case(MODEL, Layout(tp=2)),
    "TP 2, SP": Case(SWIGLU, Layout(tp=2, sequence_parallel=True)),
    "TP 2, one head": Case(ONE_HEAD, Layout(tp=2)),
    "TP 4, SP, one head": Case(ONE_HEAD, Layout(tp=4, sequence_parallel=True)),
    "CP 2": Case(ALIGNED, Layout(cp=2)),
    "CP 2, contiguous": Case(MODEL, Layout(cp=2, sequence_order="contiguous")),
    "CP 4, chunks across segments": Case(MODEL, Layout(cp=4)),
    "CP 3, contiguous, partly filled chunk": Case(
        PARTLY_FILLED, Layout(cp=3, sequence_order="contiguous")
    ),
    "TP 2, SP, CP 2": Case(MODEL, Layout(tp=2, sequence_parallel=True, cp=2)),
    "PP 2": Case(MODEL, Layout(pp=2)),
    "PP 2, virtual": Case(DEEP, Layout(pp=2, virtual_stages=2)),
    "PP 2, tied": Case(TIED, Layout(pp=2)),
    "DP 2": Case(MODEL, Layout(dp=2)),
    "DP 2, distributed optimizer": Case(MODEL, Layout(dp=2, distributed_optimizer=True)),
    "TP 2, SP, PP 2, CP 2": Case(MODEL, EIGHT),
}
RARE = {
    "TP 4, SP, two heads": Case(SWIGLU, Layout(tp=4, sequence_parallel=True)),
    "TP 8, SP, one head": Case(ONE_HEAD, Layout(tp=8, sequence_parallel=True)),
    "TP 2, SP, tied": Case(TIED, Layout(tp=2, sequence_parallel=True)),
    "CP 2, contiguous, aligned": Case(ALIGNED, Layout(cp=2, sequence_order="contiguous")),
    "CP 3, partly filled chunk": Case(PARTLY_FILLED, Layout(cp=3)),
    "TP 4, SP, one head, CP 2": Case(
        ONE_HEAD, Layout(tp=4, sequence_parallel=True, cp=2, sequence_order="contiguous")
    ),
    "PP 3, uneven first and last": Case(
        DEEP, Layout(pp=3, layers_in_first_stage=1, layers_in_last_stage=1)
    ),
    "PP 2, by a string": Case(DEEP, Layout(pp=2, stages="Et|tttL")),
    "PP 2, virtual, by a string": Case(DEEP, Layout(pp=2, virtual_stages=2, stages="E|t|ttt|L")),
    "PP 2, tied, TP 2, SP": Case(TIED, Layout(pp=2, tp=2, sequence_parallel=True)),
    "PP 2, virtual, DP 2, distributed optimizer": Case(
        SMALL_MICRO_BATCHES, Layout(pp=2, virtual_stages=2, dp=2, distributed_optimizer=True)
    ),
    "TP 2, SP, PP 2, virtual, CP 2": Case(DEEP, replace(EIGHT, virtual_stages=2)),
    "TP 2, SP, PP 2, CP 2, contiguous": Case(ONE_HEAD, replace(EIGHT, sequence_order="contiguous")),
    "TP 2, SP, CP 2, DP 2, distributed optimizer": Case(
        ONE_HEAD, Layout(tp=2, sequence_parallel=True, cp=2, dp=2, distributed_optimizer=True)
    ),
    "CP 2, distributed optimizer": Case(MODEL, Layout(cp=2, distributed_optimizer=True)),
    "full recompute": Case(MODEL, Layout(tp=2, sequence_parallel=True, cp=2, recompute="full")),
    "selective recompute": Case(
        MODEL, Layout(tp=2, sequence_parallel=True, cp=2, recompute="selective")
    ),
}


def parameters(common: dict[str, Case], rare: dict[str, Case]) -> list:
    """Cases by name, the rarer ones left out of the default loop."""
    return [pytest.param(case, id=name) for name, case in common.items()] + [
        pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in rare.items()
    ]


CASES = parameters(COMMON, RARE)
LAYOUTS_OF_EACH_KIND = {
    "TP 2": Layout(tp=2),
    "CP 2": Layout(cp=2),
    "PP 2": Layout(pp=2),
    "TP 2, SP, CP 2": Layout(tp=2, sequence_parallel=True, cp=2),
    "TP 2, SP, PP 2, CP 2": EIGHT,
}
BF16, DROPOUT = (
    parameters(
        {"TP 2, SP": Case(model, Layout(tp=2, sequence_parallel=True))},
        {name: Case(model, layout) for name, layout in LAYOUTS_OF_EACH_KIND.items()},
    )
    for model in (Model(bf16=True), Model(dropout=0.1))
)


def in_layout(workers, single, model, layout, **options):
    """A run from the model's start; every rank has the same losses and gradient norms."""
    start, _ = single(model)
    ranks = workers.run(layout.world_size, train, model, layout, start, **options)
    for rank in ranks:
        assert rank.losses == ranks[0].losses
        assert rank.gradient_norms == ranks[0].gradient_norms
    return ranks


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_one_process(workers, single, case):
    assert_trains_as_one_process(workers, single, case)


def assert_trains_as_one_process(workers, single, case):
    """Losses of every step, and every gradient of the first."""
    expected = single(case.model).run
    ranks = in_layout(workers, single, case.model, case.layout)
    wanted = assemble([expected.first_gradients])
    gradients = assemble([rank.first_gradients for rank in ranks])
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        assert error(gradient, wanted[key]) < 1e-4, key
    assert ranks[0].losses == pytest.approx(expected.losses, rel=1e-5)
    assert ranks[0].gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)


@pytest.mark.parametrize("case", BF16)
def test_bf16_losses_are_as_near_as_bf16_is_to_float32(workers, single, case):
    """A layout rounds the same products at other places, so it may be as far from float32 as one
    process in bf16 is, and the two of them twice as far from each other."""
    exact = single(replace(case.model, bf16=False)).run.losses
    rounded = single(case.model).run.losses
    losses = in_layout(workers, single, case.model, case.layout)[0].losses
    rounding = max(abs(a - b) for a, b in zip(rounded, exact, strict=True))
    difference = max(abs(a - b) for a, b in zip(losses, rounded, strict=True))
    print(f"bf16 is {rounding:.2e} from float32, the layout {difference:.2e} from one process")
    assert difference <= 2 * rounding


@pytest.mark.parametrize("case", DROPOUT)
def test_dropout_is_the_same_in_two_runs(workers, single, case):
    first, second = (in_layout(workers, single, case.model, case.layout, steps=2) for _ in range(2))
    assert first[0].losses == second[0].losses
    assert first[0].gradient_norms == second[0].gradient_norms
    assert first[0].losses[0] != single(replace(case.model, dropout=0.0)).run.losses[0]
    # Fails where ranks that hold the same values drew different masks for them.
    assemble([rank.first_gradients for rank in first])
