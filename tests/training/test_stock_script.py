"""The unmodified pretrain_gpt.py of a Megatron-LM 0.19 checkout, through the CPU stand-in."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from training.runs import TINY, launch, save_to, train
from training.test_throughput import LOGGED, flops_of_tiny, logged_flops

CHECKOUT = os.environ.get("MEGATRON_LM_PATH", "")
PATCH = Path(__file__).parents[2] / "patches" / "megatron-lm-0.19-one-word-spec.patch"
WITHOUT_APEX = (
    *("--transformer-impl", "local", "--no-gradient-accumulation-fusion"),
    *("--no-persist-layer-norm", "--no-masked-softmax-fusion"),
)
# TINY's --megalodon-chunk-size is an argument of our own pretrain.
STOCK = (*TINY[: TINY.index("--megalodon-chunk-size")], *TINY[TINY.index("16") + 1 :])
COMMON = (*STOCK, *WITHOUT_APEX, "--hidden-dropout", "0", "--attention-dropout", "0")
POSITIONS = ("--position-embedding-type", "none")

pytestmark = [
    pytest.mark.megatron_lm,
    pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"),
]


def script(checkout):
    return ("-m", "megalodon_mcore.cpu", str(Path(checkout) / "pretrain_gpt.py"))


def test_spec_trains_like_our_own_pretrain(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    train(tmp_path / "first", *TINY, *save_to(checkpoint), "--exit-interval", "1")
    load = ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng")
    ours = train(tmp_path / "ours", *TINY, *load)
    theirs = train(
        tmp_path / "theirs",
        *(*COMMON, *POSITIONS, *load, "--spec", "megalodon_mcore.spec", "megalodon"),
        program=script(CHECKOUT),
        MEGALODON_CONFIG="chunk_size=16",
    )
    assert list(theirs.losses) == [2, 3, 4, 5, 6]
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-6)


LAYOUTS = {
    "tensor": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "pipeline": (2, ("--pipeline-model-parallel-size", "2")),
    "context": (2, ("--context-parallel-size", "2")),
    "all three": (
        8,
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--pipeline-model-parallel-size", "2", "--context-parallel-size", "2"),
        ),
    ),
}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A checkpoint of `pretrain`, and what it does from there in one process."""
    folder = tmp_path_factory.mktemp("single")
    checkpoint = folder / "checkpoint"
    train(folder / "first", *TINY, *save_to(checkpoint), "--exit-interval", "1")
    load = ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng")
    return load, train(folder / "run", *TINY, *load)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_like_one_process(single, tmp_path, name):
    load, expected = single
    processes, options = LAYOUTS[name]
    padding = ("--make-vocab-size-divisible-by", "64") if "tensor" in "".join(options) else ()
    run = train(
        tmp_path,
        *(*COMMON, *POSITIONS, *load, *options, *padding),
        *("--spec", "megalodon_mcore.spec", "megalodon"),
        program=script(CHECKOUT),
        processes=processes,
        MEGALODON_CONFIG="chunk_size=16",
    )
    assert list(run.losses) == [2, 3, 4, 5, 6]
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    assert run.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)


KINDS = {
    "experts": (
        ("--num-experts", "4", "--moe-router-topk", "2", "--moe-layer-freq", "2", "--swiglu"),
        ("--expert-model-parallel-size", "2"),
    ),
    "further predictions": (
        ("--mtp-num-layers", "1", "--swiglu", "--normalization", "RMSNorm"),
        ("--pipeline-model-parallel-size", "2"),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_experts_and_further_predictions_train_like_our_own_pretrain(tmp_path, name):
    kind, options = KINDS[name]
    checkpoint = tmp_path / "checkpoint"
    train(tmp_path / "first", *TINY, *kind, *save_to(checkpoint), "--exit-interval", "1")
    load = ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng")
    ours = train(tmp_path / "ours", *TINY, *kind, *load)
    theirs = train(
        tmp_path / "theirs",
        *(*COMMON, *POSITIONS, "--disable-bias-linear", *kind, *load, *options),
        *("--spec", "megalodon_mcore.spec", "megalodon"),
        program=script(CHECKOUT),
        processes=2,
        MEGALODON_CONFIG="chunk_size=16",
    )
    assert list(theirs.losses) == [2, 3, 4, 5, 6]
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-5)
    assert theirs.gradient_norms == pytest.approx(ours.gradient_norms, rel=1e-5)


def test_logged_throughput_is_megalodons(tmp_path):
    train(
        tmp_path,
        *(*COMMON, *POSITIONS, *LOGGED, "--spec", "megalodon_mcore.spec", "megalodon"),
        program=script(CHECKOUT),
        MEGALODON_CONFIG="chunk_size=16",
    )
    found = logged_flops(tmp_path)
    assert found == pytest.approx([flops_of_tiny()] * len(found), rel=1e-4)


def test_named_size_and_environment(tmp_path):
    run = train(
        tmp_path,
        *(*COMMON, *POSITIONS, "--spec", "megalodon_mcore.spec", "megalodon_200m"),
        program=script(CHECKOUT),
        MEGALODON_CONFIG="z_dim=16,value_dim=128,norm_num_groups=2,chunk_size=16",
    )
    assert run.losses[6] < run.losses[1]
    assert "the named size has 1024" in run.output


def test_learned_positions_fail_with_a_sentence():
    result = launch(*script(CHECKOUT), *COMMON, "--spec", "megalodon_mcore.spec", "megalodon")
    assert result.returncode != 0
    assert "--position-embedding-type is learned_absolute" in result.stdout


def test_one_word_spec_works_with_the_patch(tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(CHECKOUT, checkout, ignore=shutil.ignore_patterns(".git", "tests", "docs"))
    subprocess.run(["patch", "-p1", "-i", str(PATCH)], cwd=checkout, check=True)
    run = train(
        tmp_path / "run",
        *(*COMMON, *POSITIONS, "--spec", "megalodon_mcore.spec"),
        program=script(checkout),
        PYTHONPATH=str(checkout),
    )
    assert run.losses[6] < run.losses[1]
    subprocess.run(["patch", "-p1", "-R", "-i", str(PATCH)], cwd=checkout, check=True)
    changed = Path("megatron/core/transformer/spec_utils.py")
    assert (checkout / changed).read_text() == (Path(CHECKOUT) / changed).read_text()
