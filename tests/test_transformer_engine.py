"""The spec of Transformer Engine's modules: what it builds, keeps in float32, and computes in FP8.

What needs a GPU is not tested: the modules' own kernels, FP8 among them.
"""

from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.moe import moe_utils
from torch.utils._pytree import tree_leaves

from building import build, build_hybrid, randomize, transformer_config
from comparing import error
from megalodon_mcore import spec
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.rank import fake_rank
from megalodon_mcore.sizes import SIZES
from test_spec import gpt_model
from transformer_engine_reference import running_on_cpu

pytestmark = [
    pytest.mark.transformer_engine,
    pytest.mark.skipif(
        find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
    ),
]

ENGINE = {"transformer_impl": "transformer_engine"}
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def checkpoint_entries(name, impl, tp):
    """What a named size has in a checkpoint, as plain values to compare, by its module's name."""
    size = SIZES[name]
    config = transformer_config(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        # Megatron's own check; Megalodon's number of heads is the size's.
        heads=max(size.num_heads, tp),
        ffn=size.ffn_hidden_size,
        swiglu=size.swiglu,
        transformer_impl=impl,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        init_model_with_meta_device=True,
        perform_initialization=False,
        # Transformer Engine's wrappers would take this for a device that comes before meta.
        use_cpu_initialization=impl == "local",
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    sized = spec.MegalodonSpec(size)
    with torch.device("meta"):
        model = gpt_model(sized, config, vocab_size=32_000).bfloat16()
    entries = {}
    for key, entry in model.sharded_state_dict().items():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for number, part in enumerate(parts):
            values = [part.key, part.global_shape, part.global_offset, part.replica_id]
            if hasattr(part, "dtype"):
                values += [part.dtype, part.local_shape]
            entries[key, number] = values
    return entries


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_the_local_specs_checkpoint(name, tp):
    layout = ParallelLayout(seq_length=4096, tp=tp, sequence_parallel=tp > 1)
    with fake_rank(layout, tp_rank=tp - 1):
        local = checkpoint_entries(name, "local", tp)
        engine = checkpoint_entries(name, "transformer_engine", tp)
    assert engine == local
    assert sum("_extra_state" in key for key, _ in local) == 6 * SIZES[name].num_layers


@pytest.mark.parametrize("on_cpu", [False, True], ids=["initialized as on a GPU", "on the CPU"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_are_marked_as_the_local_specs(sequence_parallel, heads, on_cpu):
    """Megatron's gradient norm, its reductions and its optimizer go by these."""
    from megatron.core import tensor_parallel

    layout = ParallelLayout(seq_length=4096, tp=2, sequence_parallel=sequence_parallel)
    options = dict(
        heads=2,
        swiglu=True,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=on_cpu,
    )
    names = ("tensor_model_parallel", "partition_dim", "partition_stride", "is_embedding")
    marks = []
    with fake_rank(layout, tp_rank=1):
        for implementation in ({}, ENGINE):
            own = dict(num_heads=heads, rescale_nffn=True)
            model, _ = build(own, **options, **implementation)
            marks.append({})
            for name, parameter in model.named_parameters():
                tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
                marks[-1][name] = (
                    *(getattr(parameter, mark, None) for mark in names),
                    bool(getattr(parameter, "sequence_parallel", False)),
                    getattr(parameter, "allreduce", True),
                    parameter._backward_hooks is not None,
                )
    assert marks[0] == marks[1]
    assert len({values for values in marks[0].values()}) > 3


def test_modules_are_transformer_engines_and_start_as_local_ones(megatron):
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    engine, _ = build(swiglu=True, **ENGINE)
    torch.manual_seed(0)
    local, _ = build(swiglu=True)
    for layer in engine.decoder.layers:
        mixer, feed_forward = layer.mixer, layer.feed_forward
        linears = (mixer.linear_z, mixer.linear_v, mixer.linear_r, mixer.linear_proj)
        assert all(isinstance(m, te.Linear) for m in (*linears, feed_forward.linear_fc2))
        assert isinstance(feed_forward.linear_fc1, te.LayerNormLinear)
    values = engine.state_dict()
    assert list(values) == list(local.state_dict())
    for key, value in local.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(values[key], value), key


ATTENTION = dict(heads=4, num_query_groups=2, positions="rope")
EXPERTS = dict(num_moe_experts=4, moe_router_topk=2, moe_router_load_balancing_type="none")


@pytest.mark.parametrize("pattern", ["M*-E", "M*M"], ids=["experts apart", "experts in blocks"])
def test_layers_beside_blocks_compute_as_local_ones(megatron, monkeypatch, pattern):
    import transformer_engine.pytorch as te

    # Megatron's router takes the engine's product where there is one, which wants a GPU.
    monkeypatch.setattr(moe_utils, "te_general_gemm", None)
    models = [
        build_hybrid(pattern, own=dict(chunk_size=16), **ATTENTION, **EXPERTS, **more)[0]
        for more in ({}, ENGINE)
    ]
    local, engine = models
    randomize(local)
    engine.load_state_dict(local.state_dict(), strict=False)
    tokens = torch.randint(64, (2, 37))
    linears = [name for name, z in engine.named_modules() if isinstance(z, te.Linear)]
    assert any("self_attention" in z for z in linears) and any("experts" in z for z in linears)
    with running_on_cpu():
        logits = [model(tokens, None, None) for model in models]
    assert error(logits[1], logits[0]) < 1e-5
    for each in logits:
        each.sum().backward()
    for (name, ours), theirs in zip(engine.named_parameters(), local.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 1e-4, name


def test_experts_with_a_grouped_product_have_the_checkpoint_of_others(megatron):
    """Its kernel needs a GPU."""
    found = []
    for more in ({}, ENGINE | {"moe_grouped_gemm": True}):
        model, _ = build_hybrid("ME", own=dict(chunk_size=16), **EXPERTS, **more)
        entries = model.sharded_state_dict().values()
        parts = [
            part
            for entry in entries
            for part in (entry.build() if isinstance(entry, ShardedTensorFactory) else [entry])
        ]
        tensors = [z for z in tree_leaves(parts) if isinstance(z, ShardedTensor)]
        found.append({(z.key, z.global_shape, z.global_offset) for z in tensors})
    assert found[0] == found[1] and any("experts" in key for key, *_ in found[0])


def test_norms_stay_float32_and_the_engine_takes_them_beside_bf16(megatron):
    from megatron.core.transformer.module import Float16Module

    options = dict(bf16=True, params_dtype=torch.bfloat16)
    engine, local = (
        Float16Module(model.config, model)
        for model, _ in (build(**options, **o) for o in (ENGINE, {}))
    )
    dtypes = {name: parameter.dtype for name, parameter in engine.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in local.named_parameters()}
    feed_forward = engine.module.decoder.layers[0].feed_forward
    assert feed_forward.norm.weight.dtype == torch.float32
    # Before its kernels, Transformer Engine compares its module's own parameters with the input.
    hidden = torch.ones(3, 2, 32, dtype=torch.bfloat16)
    feed_forward.linear_fc1.allow_different_data_and_param_types = False
    feed_forward.linear_fc1.set_activation_dtype(hidden)
    with pytest.raises(TypeError, match="must match"):
        feed_forward.linear_fc1.set_activation_dtype(hidden.float())


def test_float32_hidden_states_beside_bf16_weights_are_normalized_outside(megatron):
    from megalodon_mcore.layers.norms import LayerNorm

    options = dict(bf16=True, params_dtype=torch.bfloat16, fp32_residual_connection=True)
    model, _ = build(dict(chunk_size=8), **options, **ENGINE)
    assert isinstance(model.decoder.layers[0].feed_forward.norm, LayerNorm)
    with running_on_cpu():
        logits = model(torch.arange(12).view(1, 12), None, None)
    assert logits.isfinite().all()


def test_overlapped_communication_has_the_buffers_of_transformer_engine():
    from transformer_engine.pytorch.module import layernorm_linear, linear

    layout = ParallelLayout(seq_length=4096, tp=2, sequence_parallel=True)
    options = dict(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True)
    with (
        fake_rank(layout),
        patch.object(linear, "is_ub_initialized", lambda: True),
        patch.object(layernorm_linear, "is_ub_initialized", lambda: True),
    ):
        model, _ = build(heads=2, num_layers=1, **options, **ENGINE)
    mixer, feed_forward = model.decoder.layers[0].mixer, model.decoder.layers[0].feed_forward
    assert mixer.config.tp_comm_overlap
    assert mixer.linear_proj.ub_name == "proj" and mixer.linear_proj.ub_overlap_rs_fprop
    assert feed_forward.linear_fc1.ub_name == "fc1" and feed_forward.linear_fc1.ub_overlap_ag_fprop
    assert feed_forward.linear_fc2.ub_name == "fc2" and feed_forward.linear_fc2.ub_overlap_rs_fprop
    for module in (mixer.linear_z, mixer.linear_v, mixer.linear_r):
        assert not module.ub_overlap_ag_fprop and not module.ub_overlap_rs_dgrad
        assert not module.ub_bulk_dgrad and not module.ub_bulk_wgrad


@contextmanager
def fp8_allowed():
    """Lets Transformer Engine open its FP8 contexts without a GPU, where nothing computes in it."""
    from transformer_engine.pytorch import quantization

    answers = dict.fromkeys(
        ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available"),
        lambda: (True, ""),
    )
    with (
        patch.object(quantization, "check_recipe_support", lambda recipe: None),
        patch.multiple(
            quantization.FP8GlobalStateManager, reduce_and_update_fp8_tensors=Mock(), **answers
        ),
    ):
        yield


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_layers_alone_are_called_in_the_recipe(megatron, recipe):
    """And, with first and last layers in BF16, not theirs."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    keeps_ends = recipe != "delayed"
    options = dict(fp8="hybrid", fp8_recipe=recipe, first_last_layers_bf16=keeps_ends)
    sizes = dict(hidden_size=64, ffn=96, num_layers=4)
    model, _ = build(dict(z_dim=32, chunk_size=8), **options, **sizes, **ENGINE)
    randomize(model)
    names = {module: name for name, module in model.named_modules()}
    recipes = {}

    def note(module):
        enabled = FP8GlobalStateManager.is_fp8_enabled()
        recipes[names[module]] = (
            type(FP8GlobalStateManager.get_fp8_recipe()).__name__ if enabled else None
        )

    tokens = torch.arange(12).view(1, 12)
    with fp8_allowed(), running_on_cpu(note):
        loss = model(tokens, None, None, labels=tokens)
        loss.sum().backward()
    expected = {
        "delayed": "TEDelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
    }[recipe]
    assert len(recipes) == 4 * 6
    for name, used in recipes.items():
        at_an_end = keeps_ends and name.split(".")[2] in ("0", "3")
        assert used == (None if at_an_end else expected), name
    local, _ = build(dict(z_dim=32, chunk_size=8), **sizes)
    local.load_state_dict(model.state_dict())
    wanted = local(tokens, None, None, labels=tokens)
    torch.testing.assert_close(loss, wanted)


def test_recomputation_in_fp8_is_transformer_engines(megatron):
    from megatron.core.extensions import transformer_engine as extension

    model, _ = build(
        dict(z_dim=32, chunk_size=8),
        hidden_size=64,
        ffn=96,
        fp8="hybrid",
        recompute_granularity="selective",
        recompute_modules=["mlp"],
        **ENGINE,
    )
    calls = []

    def checkpoint(function, distribute, tracker, group, *arguments):
        calls.append(group)
        return function(*arguments)

    with (
        fp8_allowed(),
        running_on_cpu(),
        patch.object(extension, "te_checkpoint", checkpoint),
    ):
        model(torch.arange(12).view(1, 12), None, None)
    assert [group.size() for group in calls] == [1, 1]


@pytest.mark.skipif(
    getattr(torch._C, "_cuda_getDeviceCount", int)() > 0, reason="there is a GPU to run it on"
)
def test_pretrain_refuses_it_without_a_gpu(megatron):
    from megalodon_mcore.pretrain_arguments import check_model

    for impl in ("local", "transformer_engine"):
        model_config = SimpleNamespace(
            transformer=transformer_config(transformer_impl=impl),
            transformer_layer_spec=spec.megalodon,
            position_embedding_type="none",
            rotary_base=10_000,
            rotary_percent=1.0,
        )
        if impl == "local":
            check_model(model_config)
        else:
            with pytest.raises(SystemExit, match="run on GPUs alone, and there is none; take --tr"):
                check_model(model_config)
