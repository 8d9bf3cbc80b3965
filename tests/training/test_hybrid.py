"""Patterns of blocks, attention, MLPs and experts through `pretrain`, in every layout.

Rows are packed with documents, which every layer keeps apart.
"""

import json
from pathlib import Path

import pytest

from megalodon_mcore.__main__ import main
from megalodon_mcore.conversion.torch_dist_reader import TorchDistReader
from training.runs import MODEL, PRETRAIN, TINY, launch, save_to, side_by_side, train
from training.test_layouts import greedy
from training.test_packed_data import PADDING, TENSOR, assert_same

CONTEXT = ("--context-parallel-size", "2")
ZIGZAG = (*CONTEXT, "--megalodon-sequence-order", "zigzag")
PIPELINE = ("--pipeline-model-parallel-size", "2")
OPTIMIZER = ("--use-distributed-optimizer",)
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform")
RECOMPUTE += ("--recompute-num-layers", "1")
# How many processes, the pattern, where it says the stages, and the layout.
LAYOUTS = {
    "tensor": (2, "M*-M", (*TENSOR, *PADDING)),
    "pipeline": (2, "M*|-M", PIPELINE),
    "virtual stages": (2, "M|*|-|M", PIPELINE),
    "context": (2, "M*-M", CONTEXT),
    "zigzag": (2, "M*-M", ZIGZAG),
    "data, distributed optimizer": (2, "M*-M", OPTIMIZER),
    "recomputed": (1, "M*-M", RECOMPUTE),
    "all": (8, "M*|-M", (*TENSOR, *PADDING, *PIPELINE, *ZIGZAG)),
}
SLOW = {"virtual stages", "context", "data, distributed optimizer", "recomputed", "all"}
EXPERTS = ("--num-experts", "4", "--moe-router-topk", "2", "--micro-batch-size", "1")
EXPERTS += ("--moe-router-load-balancing-type", "none")


UNROTATED = ("--hybrid-layer-pattern", "M*")
ROTATED = (*UNROTATED, "--position-embedding-type", "rope")


def pattern(symbols):
    """Arguments of a model with RoPE in its attention, and two heads to a key."""
    attention = ("--num-attention-heads", "4", "--position-embedding-type", "rope", "--swiglu")
    if "*" in symbols:
        attention += ("--group-query-attention", "--num-query-groups", "2")
    return ("--hybrid-layer-pattern", symbols, *attention, "--megalodon-num-heads", "2")


@pytest.fixture(scope="module")
def start(documents, tmp_path_factory):
    """Arguments that load a checkpoint, and the training of one process from it."""
    folder = tmp_path_factory.mktemp("start")
    arguments = (*documents, *pattern("M*-M"))
    train(folder / "first", *arguments, *save_to(folder / "checkpoint"), "--exit-interval", "1")
    load = ("--load", str(folder / "checkpoint"), "--no-load-optim", "--no-load-rng")
    return load, train(folder / "single", *arguments, *load)


@pytest.mark.parametrize(
    "name", [pytest.param(z, marks=[pytest.mark.slow] if z in SLOW else []) for z in LAYOUTS]
)
def test_layouts_train_like_one_process(start, documents, tmp_path, name):
    processes, symbols, options = LAYOUTS[name]
    load, single = start
    arguments = (*documents, *pattern(symbols), *load, *options)
    assert_same(train(tmp_path, *arguments, processes=processes), single)


def test_a_checkpoint_brings_its_pattern_back(start, documents, tmp_path):
    load, single = start
    # What is given comes before it.
    heads = documents.index("--num-attention-heads")
    arguments = (*documents[:heads], *documents[heads + 2 :], *load, "--use-checkpoint-args")
    assert_same(train(tmp_path, *arguments), single)


@pytest.mark.slow
def test_experts_of_several_ranks_train_like_one_process(documents, tmp_path):
    arguments = (*documents, *pattern("M*ME"), *EXPERTS)
    checkpoint = tmp_path / "checkpoint"
    train(tmp_path / "first", *arguments, *save_to(checkpoint), "--exit-interval", "1")
    arguments += ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng")
    single = train(tmp_path / "single", *arguments)
    for options in (("--expert-model-parallel-size", "2"), (*TENSOR, *PADDING)):
        run = train(tmp_path / options[0], *arguments, *options, processes=2)
        assert_same(run, single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--optimizer", "muon", "--muon-momentum", "0.9"),
        ("--megalodon-emulated-fp8", "tensorwise", "--bf16"),
    ],
    ids=["muon", "emulated FP8"],
)
def test_mixed_layers_take_other_optimizers_and_products(documents, tmp_path, more):
    """A pipeline's stages compute what one process does; ranks' scales and roundings differ.

    Muon's iteration makes more of another order of addition with each step; there are two.
    """
    arguments = (*documents, "--train-iters", "3", *pattern("M*-E"), *EXPERTS, *more)
    checkpoint = tmp_path / "checkpoint"
    train(tmp_path / "first", *arguments, *save_to(checkpoint), "--exit-interval", "1")
    arguments += ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng")
    single = train(tmp_path / "single", *arguments)
    plain = train(tmp_path / "plain", *arguments[: -len(more) - 4], *arguments[-4:])
    assert single.losses != plain.losses
    stages = ("--hybrid-layer-pattern", "M*|-E", *PIPELINE)
    assert_same(train(tmp_path / "stages", *arguments, *stages, processes=2), single)
    if "muon" in more:
        for options in (("--expert-model-parallel-size", "2"), (*TENSOR, *PADDING)):
            run = train(tmp_path / options[0], *arguments, *options, processes=2)
            assert run.losses == pytest.approx(single.losses, rel=1e-5)
            assert run.gradient_norms == pytest.approx(single.gradient_norms, rel=1e-4)


@pytest.fixture(scope="module")
def whole(start, documents, tmp_path_factory):
    """The losses of one process that goes on from the checkpoint for six steps."""
    arguments = (*documents, "--train-iters", "6", *pattern("M*-M"), *start[0])
    return train(tmp_path_factory.mktemp("whole"), *arguments).losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        ((2, "M*|-M", PIPELINE), (2, "M*-M", (*TENSOR, *PADDING)), OPTIMIZER),
        ((2, "M*-M", (*TENSOR, *PADDING)), (2, "M|*|-|M", PIPELINE), ()),
        ((2, "M|*|-|M", PIPELINE), (1, "M*-M", ()), ()),
        ((2, "M*-M", ZIGZAG), (4, "M*|-M", (*PIPELINE, *CONTEXT)), OPTIMIZER),
    ],
)
def test_a_run_goes_on_in_another_layout(
    start, whole, documents, tmp_path, before, after, optimizer
):
    """With the optimizer's state, as if nothing had happened."""
    (load, checkpoint, *rest_of_load), _ = start
    common = (*documents, "--train-iters", "6", *optimizer)
    loaded = (load, checkpoint, *rest_of_load)
    processes, symbols, options = before
    save = (*save_to(tmp_path / "saved"), "--exit-interval", "3")
    arguments = (*common, *pattern(symbols), *options)
    first = train(tmp_path / "first", *arguments, *loaded, *save, processes=processes)
    processes, symbols, options = after
    arguments = (*common, *pattern(symbols), *options, load, str(tmp_path / "saved"))
    rest = train(tmp_path / "rest", *arguments, processes=processes)
    # What Megatron logs after a run's first iteration is the mean of its first two.
    assert list(first.losses) == [2, 3] and list(rest.losses) == [4, 5, 6]
    assert first.losses | rest.losses == pytest.approx(whole, rel=1e-5)


def test_blocks_alone_train_as_a_gpt_to_the_bit(tmp_path):
    """And each goes on with the other's checkpoint, optimizer and all."""
    folders = {name: tmp_path / name for name in ("gpt", "hybrid")}
    containers = {"gpt": (), "hybrid": ("--hybrid-layer-pattern", "MM")}

    def run(name, *more):
        save = save_to(folders[name]) if not more else ()
        half = ("--exit-interval", "3") if not more else ()
        return train(folders[name] / "log", *TINY, *containers[name], *save, *half, *more)

    gpt, hybrid = side_by_side(lambda: run("gpt"), lambda: run("hybrid"))
    assert gpt.losses == hybrid.losses and gpt.gradient_norms == hybrid.gradient_norms
    assert greedy(folders["hybrid"]) == greedy(folders["gpt"])
    for name, source in (("hybrid", "gpt"), ("gpt", "hybrid")):
        arguments = ["container", "--to", name, str(folders[source]), str(tmp_path / f"to {name}")]
        assert main(arguments) == 0
    back = tmp_path / "back"
    assert main(["container", "--to", "gpt", str(tmp_path / "to hybrid"), str(back)]) == 0
    first, last = (TorchDistReader(z / "iter_0000003") for z in (folders["gpt"], back))
    assert last.entries.keys() == first.entries.keys()
    for place in last.places.values():
        file = last.folder / place.relative_path
        assert place.offset + place.length <= file.stat().st_size
    rest, *others = side_by_side(
        lambda: run("gpt", "--load", str(folders["gpt"])),
        lambda: run("gpt", "--load", str(tmp_path / "to gpt")),
        lambda: run("hybrid", "--load", str(tmp_path / "to hybrid")),
    )
    for other in others:
        assert other.losses == rest.losses and other.gradient_norms == rest.gradient_norms
    # One that convert made says so in the place of an iteration.
    released, tracker = tmp_path / "released", "latest_checkpointed_iteration.txt"
    released.mkdir()
    (folders["gpt"] / "iter_0000003").rename(released / "release")
    (released / tracker).write_text("release")
    assert main(["container", "--to", "hybrid", str(released), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / tracker).read_text() == "release"
    assert (tmp_path / "out" / "release" / ".metadata").is_file()


def test_what_reads_blocks_alone_refuses_other_layers(start, tmp_path, capsys):
    (_, checkpoint, *_), _ = start
    out = str(tmp_path / "out")
    for arguments in (
        ["convert", "--from", "mcore", "--to", "released", checkpoint, out],
        ["container", "--to", "gpt", checkpoint, out],
    ):
        assert main(arguments) == 2
        assert "has layers M*-M" in capsys.readouterr().err.splitlines()[-1]


EVERYTHING = (
    *("--kv-channels", "12", "--rotary-percent", "0.5", "--moe-ffn-hidden-size", "40"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-topk-scaling-factor", "2.5"),
    *("--moe-router-enable-expert-bias", "--moe-shared-expert-intermediate-size", "24"),
    "--moe-shared-expert-gate",
)


EXPORTED = {
    "M*ME": (*pattern("M*ME"), *EXPERTS, *EVERYTHING),
    "XM": (*EXPERTS, "--moe-layer-freq", "2", "--swiglu", "--megalodon-rescale-nffn"),
    "XX": (*EXPERTS, *EVERYTHING[4:], "--swiglu"),
}


@pytest.mark.parametrize("layers", [*EXPORTED, "X*M/M"])
def test_an_export_comes_back_and_trains_as_the_checkpoint_it_is_of(tmp_path, layers, capsys):
    """And generates the same tokens."""
    trained, folder, back = (str(tmp_path / name) for name in ("trained", "hf", "back"))
    # Rows that pad the vocabulary would come back as zeros.
    unpadded = ("--make-vocab-size-divisible-by", "127")
    predicting = layers not in EXPORTED
    of_layers = EXPORTED.get(layers, (*pattern("M*M/M"), *EXPERTS, "--moe-layer-freq", "2"))
    arguments = (*TINY, *of_layers, *unpadded)
    train(tmp_path / "first", *arguments, *save_to(Path(trained)), "--exit-interval", "2")
    assert main(["convert", "--from", "mcore", "--to", "hf", trained, folder]) == 0
    assert ("multi-token prediction layers" in capsys.readouterr().err) == predicting
    assert (
        json.loads((tmp_path / "hf" / "config.json").read_text())["layer_symbols"]
        == layers.partition("/")[0]
    )
    assert main(["convert", "--from", "hf", "--to", "mcore", folder, back, *unpadded]) == 0
    assert greedy(Path(trained)) == greedy(Path(folder)) == greedy(Path(back))
    if predicting:
        return
    # The checkpoint says how many layers and heads there are, which MODEL begins with.
    others = (*MODEL[2:4], *MODEL[6:], *TINY[len(MODEL) :])
    common = (*others, *unpadded, "--micro-batch-size", "1")
    common += ("--use-checkpoint-args", "--finetune", "--no-load-optim", "--no-load-rng")
    one, other = (
        train(tmp_path / f"from {name}", *common, "--load", str(tmp_path / name))
        for name in ("trained", "back")
    )
    assert one.losses == other.losses and one.gradient_norms == other.gradient_norms


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--hybrid-layer-pattern", ""), "is '', in which a pipeline stage has no layer"),
        (("--hybrid-layer-pattern", "M||M"), "is 'M||M', in which a pipeline stage has no layer"),
        (("--hybrid-layer-pattern", "MGM"), "--hybrid-layer-pattern has 'G'; with Megalodon"),
        (("--hybrid-layer-pattern", "M-E"), "--hybrid-layer-pattern has E, so it needs"),
        (("--hybrid-layer-pattern", "M*", "--qk-layernorm"), "--qk-layernorm is set"),
        (
            ("--hybrid-layer-pattern", "M*", "--rotary-percent", "0.5"),
            "--rotary-percent is 0.5, bu",
        ),
        ((*UNROTATED, "--rotary-interleaved"), "--rotary-interleaved is set, "),
        ((*ROTATED, "--rotary-percent", "0"), "--rotary-percent is 0.0; it takes more than 0"),
        ((*ROTATED, "--kv-channels", "15"), "--kv-channels is 15, of which RoPE with"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments, words):
    result = launch(*PRETRAIN, *TINY, *arguments)
    assert result.returncode != 0
    assert words in result.stdout.strip().splitlines()[-1]
