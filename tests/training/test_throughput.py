"""--log-throughput: Megalodon's floating-point operations, not those of a GPT."""

import re

import pytest

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.throughput import training_flops_per_token
from training.runs import TINY, scalars, train

LOGGED = ("--log-throughput", "--log-timers-to-tensorboard")
PADDED_VOCABULARY = 128
BATCH, LENGTH = 4, 48


def flops_of_tiny(swiglu=False):
    """By what TINY says, written out: a pass forward, and two backward."""
    d, z, e, f, n, chunk = 64, 16, 128, 96, 16, 16
    products = d * z + d * e + d * e + d * d + e * d + (3 if swiglu else 2) * d * f
    # Each of a chunk's positions attends to half of it on average.
    attention = chunk / 2 * (z + e)
    ema = 12 * d * n
    layer = 2 * (products + attention) + ema
    return 3 * BATCH * LENGTH * (2 * layer + 2 * d * PADDED_VOCABULARY)


def logged_flops(folder):
    """Of a batch, from TensorBoard's TFLOP/s and seconds of every iteration."""
    speeds, seconds = scalars(folder, "throughput"), scalars(folder, "iteration-time")
    # The first iteration logs no time.
    return [speeds[step] * 1e12 * seconds[step] for step in seconds]


@pytest.mark.parametrize("options", [(), ("--swiglu",)], ids=["plain", "swiglu"])
def test_pretrain_logs_megalodons_flops(tmp_path, options):
    run = train(tmp_path, *TINY, *LOGGED, *options)
    assert re.search(r"throughput per GPU \(TFLOP/s/GPU\)", run.output)
    found = logged_flops(tmp_path)
    assert found
    assert found == pytest.approx([flops_of_tiny(bool(options))] * len(found), rel=1e-4)


OTHERS = {
    "MM": (0, ()),
    # Queries, keys, values and the last projection; half of the scores, and what they weigh.
    "M-M*": (2 * 64 * 96 + 4 * 64 * 64 + 2 * 64 * LENGTH / 2, ()),
    # The router; of eight experts two, and the one for all.
    "MEM": (
        8 * 64 + (2 * 32 + 16) * 2 * 64,
        (
            *("--num-experts", "8", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"),
            *("--moe-shared-expert-intermediate-size", "16", "--micro-batch-size", "1"),
        ),
    ),
}
"""Products of a token in layers beside TINY's blocks, by pattern, and the layers' arguments."""


@pytest.mark.parametrize("pattern", OTHERS)
def test_every_layer_of_a_pattern_counts(tmp_path, pattern):
    products, options = OTHERS[pattern]
    train(tmp_path, *TINY, *LOGGED, "--hybrid-layer-pattern", pattern, *options)
    wanted = flops_of_tiny() + 3 * BATCH * LENGTH * 2 * products
    assert logged_flops(tmp_path) == pytest.approx([wanted] * 5, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "layers"),
    [(("--mtp-num-layers", "2"), 2), (("--hybrid-layer-pattern", "MM/M"), 1)],
)
def test_layers_that_predict_further_tokens_count(tmp_path, options, layers):
    """Each is a block, a product that makes one hidden state of two, and the output once more."""
    train(tmp_path, *TINY, *LOGGED, *options)
    output = 64 * PADDED_VOCABULARY
    block = flops_of_tiny() / (3 * BATCH * LENGTH * 2) - output
    wanted = flops_of_tiny() + 3 * BATCH * LENGTH * 2 * layers * (block / 2 + 2 * 64 * 64 + output)
    assert logged_flops(tmp_path) == pytest.approx([wanted] * 5, rel=1e-4)


def test_a_rest_of_a_chunk_attends_to_itself_alone():
    shape = MegalodonConfig(
        num_layers=1,
        hidden_size=64,
        num_heads=1,
        ffn_hidden_size=96,
        vocab_size=128,
        chunk_size=16,
    )
    width = 16 + 128
    short, whole, long = (training_flops_per_token(shape, n) for n in (8, 16, 24))
    assert whole - short == 6 * width * (16 / 2 - 8 / 2)
    assert 24 * long == pytest.approx(16 * whole + 8 * short)
