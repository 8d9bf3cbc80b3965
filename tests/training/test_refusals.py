"""What Megalodon cannot do fails before training, with one sentence that names the argument."""

import re
from argparse import Namespace

import pytest
from megatron.core.activations import squared_relu
from torch.nn import functional as F

from building import megalodon_config, transformer_config
from megalodon_mcore import optimizer_check
from megalodon_mcore.optimizer_check import check_optimizer
from megalodon_mcore.sizes import SIZES
from megalodon_mcore.spec import MegalodonSpec
from megalodon_mcore.validation import (
    FP8_MULTIPLES,
    check_fp8_sizes,
    check_layout,
    check_supported,
)
from training.runs import TINY, launch

REFUSED = {
    "expert_model_parallel_size": (2, "--expert-model-parallel-size is 2"),
    "hierarchical_context_parallel_sizes": ([1, 2], "--hierarchical-context-parallel-sizes is 1 2"),
    "multi_latent_attention": (True, "--multi-latent-attention is set"),
    "fp8": ("hybrid", "--fp8-format is hybrid, but only Transformer Engine's"),
    "fp8_param": (True, "--fp8-param-gather is set"),
    "delay_wgrad_compute": (True, "--delay-wgrad-compute is set"),
    "transformer_impl": ("inference_optimized", "--transformer-impl is inference_optimized; "),
    "use_mup": (True, "--use-mup is set"),
    "qk_layernorm": (True, "--qk-layernorm is set"),
    "cuda_graph_impl": ("local", "--cuda-graph-impl is local"),
    "activation_func": (squared_relu, "activation function is squared_relu, but Megalodon's FFN"),
    "window_size": ((8, 0), "--window-size is 8 0"),
    "attention_output_gate": (True, "--attention-output-gate is set"),
    "layernorm_zero_centered_gamma": (True, "--apply-layernorm-1p is set"),
    "normalization": ("L2Norm", "--normalization is L2Norm"),
    "init_method_std": (0.5, "--init-method-std is 0.5"),
    "rotary_interleaved": (True, "--rotary-interleaved is set"),
    "apply_residual_connection_post_layernorm": (True, "--apply-residual-connection-post-layern"),
    "softmax_type": ("learnable", "--softmax-type is learnable"),
    "num_query_groups": (1, "--num-query-groups is 1"),
}


def test_gelu_is_refused_where_somebody_asked_for_it():
    """Ungated, it is Megatron's default."""
    config = transformer_config(activation_func=F.gelu)
    check_supported(config, "none")
    config.gated_linear_unit = True
    with pytest.raises(ValueError, match="is gelu, but Megalodon's FFN computes SiLU"):
        check_supported(config, "none")


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


def test_missing_transformer_engine_is_refused(monkeypatch):
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    config = transformer_config(transformer_impl="transformer_engine")
    check_supported(config, "none")
    with pytest.raises(ValueError, match="Transformer Engine does not import here; install it"):
        MegalodonSpec().check(config, "none")


def check_fp8(recipe="delayed", length=64, batch=1, hidden_size=64, ffn=96, tp=1, **options):
    config = transformer_config(
        hidden_size=hidden_size,
        heads=2,
        ffn=ffn,
        transformer_impl="transformer_engine",
        fp8="hybrid",
    )
    config.fp8_recipe = recipe
    config.tensor_model_parallel_size = tp
    for name, value in options.items():
        setattr(config, name, value)
    check_supported(config, "none")
    check_fp8_sizes(config, megalodon_config(config, z_dim=64), length, batch)


FP8_SIZES = {
    "recipe": (dict(recipe="custom"), "--fp8-recipe is custom; Megalodon takes delayed, tensorwis"),
    "hidden size": (
        dict(hidden_size=72),
        "--hidden-size is 72, which is no multiple of 16, as --fp8-recipe delayed needs; take a "
        "multiple of 16.",
    ),
    "FFN width": (dict(ffn=72), "--ffn-hidden-size is 72, which is no multiple of 16"),
    "a rank's FFN": (
        dict(ffn=80, tp=2),
        "--ffn-hidden-size is 80, which in 2 parts is no multiple of 16, as --fp8-recipe delayed "
        "needs; take a multiple of 32.",
    ),
    "blocks of 32": (dict(recipe="mxfp8", ffn=80), "80, which is no multiple of 32"),
    "blocks on Blackwell": (dict(recipe="blockwise", ffn=80), "80, which is no multiple of 32"),
    "tokens": (
        dict(length=40),
        "--micro-batch-size 1 of --seq-length 40 is 40 tokens, which is no multiple of 16",
    ),
    "a rank's tokens": (
        dict(length=64, batch=2, tp=2, context_parallel_size=8, sequence_parallel=True),
        "128 tokens, which in 16 parts is no multiple of 16",
    ),
}


@pytest.mark.parametrize("name", FP8_SIZES)
def test_sizes_that_fp8_cannot_take_are_refused_by_name(name):
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        check_fp8(recipe)
    check_fp8(length=8, batch=2)
    check_fp8(length=None, batch=None)
    options, sentence = FP8_SIZES[name]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_fp8(**options)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (dict(layers="M*", attention_head_dim=20), "--num-attention-heads x --kv-channels is 40,"),
        (
            dict(layers="XM", num_experts=4, expert_ffn_size=40),
            "--moe-ffn-hidden-size is 40, which",
        ),
        (
            dict(layers="ME", num_experts=4, shared_expert_size=8),
            "--moe-shared-expert-intermediate-size is 8, which is no multiple of 16",
        ),
    ],
)
def test_sizes_of_layers_beside_blocks_are_refused_by_name(values, sentence):
    config = transformer_config(hidden_size=64, heads=2, ffn=96, fp8="hybrid")
    config.fp8_recipe = "delayed"
    fits = {"attention_head_dim": 32, "expert_ffn_size": 48, "shared_expert_size": 32}
    given = {name: value for name, value in fits.items() if name in values}
    check_fp8_sizes(config, megalodon_config(config, z_dim=64, **(values | given)), 64, 1)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_fp8_sizes(config, megalodon_config(config, z_dim=64, **values), 64, 1)


def test_every_named_size_fits_every_recipe():
    for size in SIZES.values():
        config = transformer_config(
            hidden_size=size.hidden_size,
            heads=size.num_heads,
            ffn=size.ffn_hidden_size,
            transformer_impl="transformer_engine",
            fp8="hybrid",
        )
        for config.fp8_recipe in FP8_MULTIPLES:
            for config.tensor_model_parallel_size in (1, 2, 4, 8):
                check_fp8_sizes(config, size, 4096, 1)


@pytest.mark.parametrize("name", ["soap", "adaptive_muon"])
def test_an_optimizer_that_mistakes_parameters_for_matrices_is_refused(name):
    for known in ("adam", "sgd", "lion", "muon"):
        check_optimizer(Namespace(optimizer=known))
    with pytest.raises(ValueError, match=f"--optimizer is {name}, .* take adam, sgd, lion or muon"):
        check_optimizer(Namespace(optimizer=name))


def test_an_optimizer_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(optimizer_check, "is_installed", lambda module: False)
    check_optimizer(Namespace(optimizer="adam"))
    with pytest.raises(ValueError, match="--optimizer is muon, .* emerging-optimizers; install"):
        check_optimizer(Namespace(optimizer="muon"))


def test_an_optimizer_that_needs_what_is_missing_is_refused(monkeypatch):
    offload = Namespace(optimizer="adam", optimizer_cpu_offload=True)
    precision_aware = Namespace(optimizer="adam", use_precision_aware_optimizer=True)
    monkeypatch.setattr(optimizer_check, "is_installed", lambda module: False)
    monkeypatch.setattr(optimizer_check, "count_gpus", lambda: 0)
    with pytest.raises(ValueError, match="--optimizer-cpu-offload is set, .* there is none; leave"):
        check_optimizer(offload)
    with pytest.raises(ValueError, match="--use-precision-aware-optimizer is set, .*; leave it"):
        check_optimizer(precision_aware)
    monkeypatch.setattr(optimizer_check, "is_installed", lambda module: True)
    monkeypatch.setattr(optimizer_check, "count_gpus", lambda: 1)
    check_optimizer(offload)
    check_optimizer(precision_aware)


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
    megalodon = megalodon_config(config, z_dim=z_dim, value_dim=value_dim, norm_num_groups=groups)
    check_layout(config, megalodon, order, length)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_that_cannot_work_is_refused_by_name(name):
    check(tp=4, cp=2, sequence_parallel=True)
    options, sentence = LAYOUTS[name]
    with pytest.raises(ValueError, match=sentence.replace("*", r"\*")):
        check(**options)


WRONG = {
    "optimizer": (1, ("--optimizer", "soap"), "--optimizer is soap, which takes CEMA's vectors"),
    "z_dim": (1, ("--megalodon-z-dim", "7"), "z_dim is 7, which the 2 heads"),
    "heads": (3, ("--tensor-model-parallel-size", "3"), "is 3 and there are 2 heads"),
    "layers": (
        3,
        ("--pipeline-model-parallel-size", "3"),
        "--num-layers is 2, which --pipeline-model-parallel-size 3 does not divide",
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


MEGATRONS = ("--spec", "megatron.training.models.gpt", "default_layer_spec")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--megalodon-z-dim", "8"), "--megalodon-z-dim is 8, but --spec megatron.training.mod"),
        (("--megalodon-size", "200m"), "--megalodon-size is 200m, but --spec"),
        (("--context-parallel-size", "2"), "--megalodon-sequence-order is contiguous, but with"),
        (("--freeze-all-layers",), "--freeze-all-layers is set"),
    ],
)
def test_megatrons_own_layers_take_no_values_of_megalodon(arguments, sentence):
    words = [z for z in TINY if z not in ("--megalodon-chunk-size", "16")]
    result = launch("-m", "megalodon_mcore", "pretrain", *words, *MEGATRONS, *arguments)
    (line,) = [z for z in result.stdout.splitlines() if "megalodon-mcore pretrain: " in z]
    assert result.returncode and sentence in line


def test_megatrons_own_layers_take_their_own_values():
    words = [z for z in TINY if z not in ("--megalodon-chunk-size", "16")]
    result = launch(
        *("-m", "megalodon_mcore", "pretrain", *words, *MEGATRONS),
        *("--position-embedding-type", "rope", "--window-size", "7,0", "--qk-layernorm"),
    )
    assert result.returncode == 0, result.stdout[-4000:]
