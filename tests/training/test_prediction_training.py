"""--mtp-num-layers through `pretrain`, in every layout; rows are packed with documents."""

import pytest

from megalodon_mcore.__main__ import main
from training.runs import PRETRAIN, TINY, launch, save_to, scalars, side_by_side, train
from training.test_expert_blocks import without_layers
from training.test_hybrid import CONTEXT, OPTIMIZER, PIPELINE, ZIGZAG
from training.test_packed_data import PADDING, TENSOR, assert_same

TIED = ("tied",)
MODEL = ("--mtp-num-layers", "1", "--swiglu")
LAYOUTS = {
    "tensor": (2, (*TENSOR, *PADDING)),
    "pipeline": (2, PIPELINE),
    "hybrid": (1, ("--hybrid-layer-pattern", "MM/M")),
    "hybrid stages": (2, ("--hybrid-layer-pattern", "M|M/M", *PIPELINE)),
    "data, distributed optimizer": (2, OPTIMIZER),
    "all": (4, (*TENSOR, *PADDING, *PIPELINE, *OPTIMIZER)),
}
SLOW = LAYOUTS.keys() - {"tensor", "pipeline"}


@pytest.fixture(scope="module")
def start(documents, tmp_path_factory):
    """Arguments that load a checkpoint, and the training of one process from it."""
    folder = tmp_path_factory.mktemp("start")
    arguments = (*documents, *MODEL)
    train(folder / "first", *arguments, *save_to(folder / "checkpoint"), "--exit-interval", "1")
    moved = str(folder / "moved")
    assert main(["container", "--to", "hybrid", str(folder / "checkpoint"), moved]) == 0
    arguments += ("--no-load-optim", "--no-load-rng")
    checkpoints = {"gpt": str(folder / "checkpoint"), "hybrid": moved}
    single = train(folder / "single", *arguments, "--load", checkpoints["gpt"])
    return arguments, checkpoints, single, scalars(folder / "single", "mtp_1 loss")


@pytest.mark.parametrize(
    "name", [pytest.param(z, marks=[pytest.mark.slow] if z in SLOW else []) for z in LAYOUTS]
)
def test_layouts_train_like_one_process(start, tmp_path, name):
    (processes, options), (arguments, checkpoints, single, further) = LAYOUTS[name], start
    if "--hybrid-layer-pattern" in options:
        arguments = (*without_layers(arguments), "--load", checkpoints["hybrid"])
    else:
        arguments = (*arguments, "--load", checkpoints["gpt"])
    assert_same(train(tmp_path, *arguments, *options, processes=processes), single)
    if processes == 1 or options == OPTIMIZER:
        assert scalars(tmp_path, "mtp_1 loss") == pytest.approx(further, rel=1e-5)


@pytest.mark.slow
def test_what_is_predicted_gets_better_and_goes_on_in_another_layout(tmp_path):
    arguments = (*TINY, *MODEL, "--train-iters", "30", "--lr", "1e-2", "--seed", "7")
    begun, saved = (str(tmp_path / name) for name in ("begun", "saved"))
    train(tmp_path / "begin", *arguments, *save_to(begun), "--exit-interval", "1")
    start = (*arguments, "--load", begun, "--no-load-optim", "--no-load-rng")
    half = (*save_to(saved), "--exit-interval", "15")
    whole, first = side_by_side(
        lambda: train(tmp_path / "whole", *start),
        lambda: train(tmp_path / "first", *start, *PIPELINE, *half, processes=2),
    )
    further = scalars(tmp_path / "whole", "mtp_1 loss")
    assert further[30] < 0.5 * further[2]
    tensor = (*TENSOR, *PADDING, "--load", saved)
    rest = train(tmp_path / "rest", *arguments, *tensor, processes=2)
    assert min(rest.losses) == 16
    # Orders of addition grow apart over so many steps at this rate.
    assert first.losses | rest.losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["gpt", "hybrid"])
def test_a_checkpoint_brings_the_layers_back(start, tmp_path, container):
    arguments, checkpoints, single, further = start
    given = without_layers(arguments[: arguments.index(MODEL[0])])
    rest = arguments[arguments.index(MODEL[0]) + len(MODEL) :]
    load = (*rest, "--load", checkpoints[container], "--use-checkpoint-args")
    assert_same(train(tmp_path, *given, *load), single)
    assert scalars(tmp_path, "mtp_1 loss") == pytest.approx(further, rel=1e-6)


@pytest.mark.slow
def test_several_blocks_for_a_further_token_stay_in_their_container(tmp_path, capsys):
    checkpoint = str(tmp_path / "checkpoint")
    arguments = (*without_layers(TINY), "--hybrid-layer-pattern", "MM/MM", *save_to(checkpoint))
    train(tmp_path / "log", *arguments, "--exit-interval", "1")
    assert main(["container", "--to", "gpt", checkpoint, str(tmp_path / "gpt")]) == 2
    assert "has layers MM/MM, and a GPTModel of Megalodon's has" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_cut_in_zigzag_train_nearly_alike(tmp_path):
    """Megatron weights a rank's share of what is predicted by that rank's number of targets."""
    arguments = (*TINY, *MODEL)
    begun = str(tmp_path / "begun")
    train(tmp_path / "begin", *arguments, *save_to(begun), "--exit-interval", "1")
    arguments += ("--load", begun, "--no-load-optim", "--no-load-rng")
    single, run = side_by_side(
        lambda: train(tmp_path / "single", *arguments),
        lambda: train(tmp_path / "zigzag", *arguments, *ZIGZAG, processes=2),
    )
    assert run.losses[2] == pytest.approx(single.losses[2], rel=1e-5)
    assert run.losses == pytest.approx(single.losses, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mtp-loss-scaling-factor", "0.3"), "--mtp-loss-scaling-factor is 0.3, but"),
        ((*MODEL, *CONTEXT), "--mtp-num-layers is 1, whose targets Megatron looks for as if"),
        (("--hybrid-layer-pattern", "MM/"), "is MM/, in which the layers after each / differ"),
        (("--hybrid-layer-pattern", "MM/M/*"), "is MM/M/*, in which the layers after each /"),
        (("--hybrid-layer-pattern", "MM/|M"), "is MM/|M, with a | after /; layers that predict"),
        (("--hybrid-layer-pattern", "MM/*"), "is MM/*, which has * after / alone; put one"),
        (("--hybrid-layer-pattern", "MM", *MODEL), "--mtp-num-layers is 1, and --hybrid-layer-p"),
        (("--hybrid-layer-pattern", "M/M", "--mtp-num-layers", "2"), "--mtp-num-layers is 2, and"),
        (("--mtp-num-layers", "0"), "--mtp-num-layers is 0; it must be at least 1."),
        ((*TIED, *MODEL, *PIPELINE), "with tied embeddings, which Megatron cannot save so; add"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments, words):
    model = without_layers(TINY) if "--hybrid-layer-pattern" in arguments else TINY
    if TIED[0] in arguments:
        model = tuple(z for z in TINY if z != "--untie-embeddings-and-output-weights")
        arguments = arguments[1:]
    processes = 2 if {CONTEXT[0], PIPELINE[0]} & set(arguments) else 1
    result = launch(*PRETRAIN, *model, *arguments, processes=processes)
    assert result.returncode != 0
    assert words in result.stdout.strip().splitlines()[-1]
