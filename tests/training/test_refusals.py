"""What Megalodon cannot do fails before training, with one sentence that names the argument."""

import pytest

from building import transformer_config
from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.validation import check_layout, check_supported
from training.runs import TINY, launch

REFUSED = {
    "expert_model_parallel_size": (2, "--expert-model-parallel-size is 2"),
    "hierarchical_context_parallel_sizes": ([1, 2], "--hierarchical-context-parallel-sizes is set"),
    "num_moe_experts": (4, "--num-experts is set"),
    "mtp_num_layers": (1, "--mtp-num-layers is set"),
    "multi_latent_attention": (True, "--multi-latent-attention is set"),
    "fp8": ("hybrid", "--fp8-format is set"),
    "use_mup": (True, "--use-mup is set"),
    "qk_layernorm": (True, "--qk-layernorm is set"),
    "cuda_graph_impl": ("local", "--cuda-graph-impl is set"),
    "num_query_groups": (1, "--num-query-groups is 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_option_is_refused_by_name(name):
    config = transformer_config(heads=2)
    check_supported(config, "none")
    value, sentence = REFUSED[name]
    setattr(config, name, value)
    with pytest.raises(ValueError, match=sentence):
        check_supported(config, "none")


def test_added_positions_are_refused():
    with pytest.raises(ValueError, match="--position-embedding-type is learned_absolute"):
        check_supported(transformer_config(), "learned_absolute")


def test_unknown_recompute_module_is_refused():
    config = transformer_config(recompute_granularity="selective", recompute_modules=["layernorm"])
    with pytest.raises(ValueError, match="--recompute-modules has layernorm"):
        check_supported(config, "none")


# (what differs from a layout that works, the argument and value that the sentence names)
LAYOUTS = {
    "heads": (
        dict(heads=6, z_dim=24, value_dim=96, tp=4),
        "--tensor-model-parallel-size is 4 and there are 6 heads",
    ),
    "hidden size": (dict(hidden_size=30, z_dim=16, groups=2, tp=4), "--hidden-size 30"),
    "value width": (dict(value_dim=30, heads=1, tp=4), "value_dim 30"),
    "FFN width": (dict(ffn=50, tp=4), "--ffn-hidden-size 50"),
    "length": (
        dict(length=100, cp=3),
        "--seq-length is 100, which contiguous order with --context-parallel-size 3",
    ),
    "zigzag": (dict(length=99, cp=3, order="zigzag"), "cuts into 6 equal parts"),
    "sequence parallel": (
        dict(length=100, cp=2, tp=4, sequence_parallel=True),
        "50 positions, which --tensor-model-parallel-size 4 does not divide",
    ),
}


def check(
    hidden_size=32,
    heads=2,
    z_dim=16,
    value_dim=64,
    groups=4,
    ffn=48,
    tp=1,
    cp=1,
    order="contiguous",
    length=96,
    sequence_parallel=False,
):
    config = transformer_config(hidden_size=hidden_size, heads=heads, ffn=ffn)
    config.tensor_model_parallel_size = tp
    config.context_parallel_size = cp
    config.sequence_parallel = sequence_parallel
    own = MegalodonConfig(z_dim=z_dim, value_dim=value_dim, norm_num_groups=groups)
    check_layout(config, own.resolve(hidden_size, heads), order, length)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_that_cannot_work_is_refused_by_name(name):
    check(tp=4, cp=2, sequence_parallel=True)
    options, sentence = LAYOUTS[name]
    with pytest.raises(ValueError, match=sentence.replace("*", r"\*")):
        check(**options)


WRONG = {
    "z_dim": (1, ("--megalodon-z-dim", "7"), "z_dim is 7, which the 2 heads"),
    "heads": (3, ("--tensor-model-parallel-size", "3"), "is 3 and there are 2 heads"),
    "layers": (
        3,
        ("--pipeline-model-parallel-size", "3"),
        "Number of layers should be divisible by the pipeline-model-parallel size",
    ),
    "length": (
        2,
        ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "31"),
        "31 positions, which --tensor-model-parallel-size 2 does not divide",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_pretrain_exits_with_the_sentence_and_no_traceback(name):
    ranks, options, sentence = WRONG[name]
    # One rank of several: nothing is exchanged before the sentence.
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": f"{ranks}",
        "LOCAL_WORLD_SIZE": f"{ranks}",
    }
    program = ("-m", "megalodon_mcore", "pretrain", *TINY, *options)
    result = launch(*program, MASTER_ADDR="127.0.0.1", MASTER_PORT="1", **world)
    assert result.returncode == 1
    assert sentence in result.stdout
    assert "Traceback" not in result.stdout
