"""Blocks whose feed-forward network is a mixture of experts, through `pretrain` in every layout.

Rows are packed with documents.
"""

import pytest

from megalodon_mcore.__main__ import main
from training.runs import PRETRAIN, TINY, launch, save_to, scalars, side_by_side, train
from training.test_hybrid import (
    CONTEXT,
    EXPERTS,
    OPTIMIZER,
    PIPELINE,
    ZIGZAG,
)
from training.test_packed_data import PADDING, TENSOR, assert_same

PARALLEL_EXPERTS = ("--expert-model-parallel-size", "2")
SHARED = ("--moe-shared-expert-intermediate-size", "24", "--moe-ffn-hidden-size", "40")
MODEL = (*EXPERTS, *SHARED, "--moe-layer-freq", "2", "--swiglu", "--num-layers", "4")
LAYOUTS = {
    "tensor": (2, (*TENSOR, *PADDING)),
    "pipeline": (2, PIPELINE),
    "virtual stages": (2, (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1")),
    "zigzag": (2, ZIGZAG),
    "experts": (2, PARALLEL_EXPERTS),
    "experts of several ranks": (
        4,
        (*TENSOR, *PADDING, *PARALLEL_EXPERTS, "--expert-tensor-parallel-size", "1", *OPTIMIZER),
    ),
    "hybrid": (1, ("--hybrid-layer-pattern", "MMMM")),
    "hybrid stages": (2, ("--hybrid-layer-pattern", "MMM|M", *PIPELINE)),
    "recomputed": (1, ("--recompute-granularity", "selective", "--recompute-modules", "moe")),
    "all": (8, (*TENSOR, *PADDING, *PIPELINE, *CONTEXT, *OPTIMIZER, *PARALLEL_EXPERTS)),
}
SLOW = LAYOUTS.keys() - {"tensor", "pipeline", "experts", "hybrid"}


@pytest.fixture(scope="module")
def start(documents, tmp_path_factory):
    """Arguments that load a checkpoint, and the training of one process from it."""
    folder = tmp_path_factory.mktemp("start")
    arguments = (*documents, *MODEL)
    train(folder / "first", *arguments, *save_to(folder / "checkpoint"), "--exit-interval", "1")
    load = ("--load", str(folder / "checkpoint"), "--no-load-optim", "--no-load-rng")
    arguments += load
    return arguments, train(folder / "single", *arguments)


def without_layers(arguments):
    """A pattern gives their number, and so does a checkpoint."""
    kept = list(arguments)
    while "--num-layers" in kept:
        at = kept.index("--num-layers")
        del kept[at : at + 2]
    return tuple(kept)


@pytest.mark.parametrize(
    "name", [pytest.param(z, marks=[pytest.mark.slow] if z in SLOW else []) for z in LAYOUTS]
)
def test_layouts_train_like_one_process(start, tmp_path, name):
    (processes, options), (arguments, single) = LAYOUTS[name], start
    if "--hybrid-layer-pattern" in options:
        at = arguments.index("--load") + 1
        moved = str(tmp_path / "moved")
        assert main(["container", "--to", "hybrid", arguments[at], moved]) == 0
        arguments = (*without_layers(arguments), "--load", moved)
    arguments = (*arguments, *options)
    assert_same(train(tmp_path, *arguments, processes=processes), single)


@pytest.mark.slow
@pytest.mark.parametrize(("frequency", "optimizer"), [("2", ()), ("([0]+[1]*3)", OPTIMIZER)])
def test_a_run_goes_on_in_other_layouts_and_in_the_other_container(
    documents,
    tmp_path,
    frequency,
    optimizer,
):
    """With the optimizer's state, as if nothing had happened."""
    arguments = (*documents, *MODEL, "--moe-layer-freq", frequency, "--train-iters", "6")
    arguments += optimizer
    parallel = (*PIPELINE, *PARALLEL_EXPERTS)
    half = ("--exit-interval", "3")
    begun, saved, other, moved = (
        str(tmp_path / name) for name in ("begun", "saved", "other", "moved")
    )
    train(tmp_path / "begin", *arguments, *save_to(begun), "--exit-interval", "1")
    start = (*arguments, "--load", begun, "--no-load-optim", "--no-load-rng")
    whole, first, _ = side_by_side(
        lambda: train(tmp_path / "whole", *start),
        lambda: train(tmp_path / "first", *start, *parallel, *save_to(saved), *half, processes=4),
        lambda: train(tmp_path / "half", *start, *save_to(other), *half),
    )
    assert main(["container", "--to", "hybrid", saved, moved]) == 0
    hybrid = (*without_layers(arguments), "--hybrid-layer-pattern", "MM|MM", *PIPELINE)
    tensor = (*arguments, *TENSOR, *PADDING)
    for run in side_by_side(
        lambda: train(tmp_path / "tensor", *tensor, "--load", saved, processes=2),
        lambda: train(tmp_path / "hybrid", *hybrid, "--load", moved, processes=2),
        lambda: train(tmp_path / "rest", *arguments, *parallel, "--load", other, processes=4),
    ):
        # What Megatron logs after a run's first iteration is the mean of its first two.
        assert list(first.losses) == [2, 3] and list(run.losses) == [4, 5, 6]
        assert first.losses | run.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_brings_its_experts_back(start, tmp_path):
    arguments, single = start
    at = arguments.index("--load")
    given = without_layers(arguments[: arguments.index(MODEL[0])])
    load = (*arguments[at:], "--use-checkpoint-args", "--micro-batch-size", "1")
    assert_same(train(tmp_path, *given, *load), single)


AUXILIARY = ("--moe-aux-loss-coeff", "0.1", "--moe-router-load-balancing-type", "aux_loss")
STAGES = {
    "blocks": (("--moe-layer-freq", "[0,1]"), PIPELINE),
    "a pattern": (("--hybrid-layer-pattern", "M|E"), PIPELINE),
    "predictions without experts": (
        ("--moe-layer-freq", "[1,0]", "--mtp-num-layers", "1"),
        PIPELINE,
    ),
    "predictions with experts": (("--mtp-num-layers", "1"), PIPELINE),
}


@pytest.mark.parametrize("name", STAGES)
def test_losses_of_routers_are_means_over_the_layers_that_have_one(tmp_path, name):
    """Also where a pipeline's stage has none."""
    kind, options = STAGES[name]
    model = (*TINY, *EXPERTS, *AUXILIARY, "--swiglu", "--megalodon-num-heads", "2")
    if "--hybrid-layer-pattern" in kind:
        model = without_layers(model)
    begun = str(tmp_path / "begun")
    one = tuple(z.replace("|", "") for z in kind)
    train(tmp_path / "begin", *model, *one, *save_to(begun), "--exit-interval", "1")
    model += ("--load", begun, "--no-load-optim", "--no-load-rng")
    single, run = side_by_side(
        lambda: train(tmp_path / "single", *model, *one),
        lambda: train(tmp_path / "stages", *model, *kind, *options, processes=2),
    )
    assert_same(run, single)
    losses = [scalars(tmp_path / z, "load_balancing_loss") for z in ("single", "stages")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # It is 1 where experts have equal shares, and tokens are not so few that they cannot.
    assert all(0.9 < loss < 1.3 for loss in losses[0].values())


def test_a_router_with_a_bias_is_balanced_by_it(tmp_path):
    """The bias moves towards experts that have had too little."""
    arguments = (*EXPERTS, "--moe-router-score-function", "sigmoid", "--moe-router-dtype", "fp32")
    balanced = ("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "0.1")
    plain, run = side_by_side(
        lambda: train(tmp_path / "plain", *TINY, *arguments),
        lambda: train(tmp_path / "bias", *TINY, *arguments, *balanced),
    )
    assert run.losses[1] == plain.losses[1] and run.losses[6] != plain.losses[6]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--moe-layer-freq", "2"), "--moe-layer-freq is 2, but Megalodon's experts"),
        (("--num-experts", "2", "--moe-layer-freq", "[1]"), "--moe-layer-freq has 1 numbers"),
        (("--num-experts", "2", "--moe-layer-freq", "0"), "--moe-layer-freq is 0; it takes 1"),
        (("--num-experts", "2", "--moe-layer-freq", "[0,0]"), "--moe-layer-freq is [0, 0]; it"),
        (("--num-experts", "2", "--moe-layer-freq", "[2,0]"), "--moe-layer-freq is [2, 0]; it"),
        (("--num-experts", "0"), "--num-experts is 0; it must be at least 1."),
        (("--num-experts", "2", "--moe-grouped-gemm"), "--moe-grouped-gemm is set, but only"),
        (("--num-experts", "2", "--moe-router-topk", "3"), "(--moe-router-topk) is 3, but"),
        (PARALLEL_EXPERTS, "--expert-model-parallel-size is 2, but"),
        (
            ("--num-experts", "2", "--hybrid-layer-pattern", "ME", "--moe-layer-freq", "2"),
            "--moe-layer-freq is 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments, words):
    model = without_layers(TINY) if "--hybrid-layer-pattern" in arguments else TINY
    result = launch(*PRETRAIN, *model, *arguments)
    assert result.returncode != 0
    assert words in result.stdout.strip().splitlines()[-1]
