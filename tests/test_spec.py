"""What Megatron builds from the specs: layers, sizes, initial values, checkpoint entries."""

import argparse
import dataclasses
import inspect
import math

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from building import LISTED, build, megalodon_config, transformer_config
from megalodon_mcore import spec
from megalodon_mcore.layers.block import FinalTimestepNorm, MegalodonLayer
from megalodon_mcore.layers.float32_module import Float32Module
from megalodon_mcore.parameters import number_of_values, parameters
from megalodon_mcore.sizes import SIZES, megatron_arguments


def gpt_model(layer_spec, config, **options) -> GPTModel:
    values = {"vocab_size": 64, "max_sequence_length": 128, "position_embedding_type": "none"}
    return GPTModel(config=config, transformer_layer_spec=layer_spec, **(values | options))


def gpt_model_config(layer_spec, config, **options):
    from megatron.training.models.gpt import GPTModelConfig

    return GPTModelConfig(
        transformer=config,
        transformer_layer_spec=layer_spec,
        vocab_size=64,
        position_embedding_type="none",
        **options,
    )


def assert_equal_models(actual, expected):
    assert str(actual) == str(expected)
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[name], value), name
        else:
            assert actual[name] == value, name


# How the specs are taken


def test_a_spec_handed_straight_to_gpt_model_builds_megalodon(megatron):
    model = gpt_model(spec.megalodon, transformer_config(num_layers=3), rotary_base=500)
    layers = model.decoder.layers
    assert [type(layer) for layer in layers] == [MegalodonLayer] * 3
    assert [layer.layer_number for layer in layers] == [1, 2, 3]
    assert [layer.mixer.query_key.rotary_base for layer in layers] == [500] * 3
    assert type(model.decoder.final_layernorm) is FinalTimestepNorm
    assert model.decoder.final_layernorm.num_groups == 1
    assert model.position_embedding_type == "none"


def test_a_named_spec_gives_its_values_to_every_layer(megatron):
    config = transformer_config(num_layers=2, hidden_size=4096, heads=4)
    config.init_model_with_meta_device = True
    with torch.device("meta"):
        model = gpt_model(spec.megalodon_7b, config)
    expected = SIZES["7b-paper"].own_values()
    found = [layer.mixer.megalodon.own_values() for layer in model.decoder.layers]
    assert found == [expected] * 2
    assert model.decoder.final_layernorm.num_groups == 64


def size_of(sized, rotary_base):
    """The values that a spec settles on."""
    return sized.check(transformer_config(), "none", rotary_base)[0]


def test_a_call_with_the_model_configuration_gives_the_same(megatron):
    size = megalodon_config(transformer_config(), chunk_size=16, norm_num_groups=2)
    sized = spec.MegalodonSpec(size)
    called_config, direct_config = transformer_config(), transformer_config()
    called = sized(gpt_model_config(sized, called_config, rotary_base=700))
    direct = sized.block_submodules(direct_config, rotary_base=700)
    # A model's layers and its final norm have them in common, and nothing else has.
    norms, layers = [], []
    for submodules in (called, direct):
        norm = dict(submodules.layer_norm.keywords)
        documents = norm.pop("documents")
        norms.append(norm)
        for layer in submodules.layer_specs:
            assert layer.params["documents"] is documents
            layers.append(dataclasses.replace(layer, params={**layer.params, "documents": None}))
    assert layers == layers[:1] * 4
    assert called.layer_norm.func is direct.layer_norm.func is FinalTimestepNorm
    assert norms == [{"num_groups": 2, "sequence_order": "zigzag"}] * 2

    models = []
    for layer_spec, config in ((called, called_config), (sized, direct_config)):
        torch.manual_seed(0)
        models.append(gpt_model(layer_spec, config, rotary_base=700))
    assert_equal_models(*models)


def test_megatrons_builder_gives_the_same(megatron):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    options = dict(rotary_base=700, share_embeddings_and_output_weights=True)
    model_config = gpt_model_config(spec.megalodon, transformer_config(), seq_length=128, **options)
    torch.manual_seed(0)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    built = GPTModelBuilder(model_config).build_model(groups)
    torch.manual_seed(0)
    assert_equal_models(built, gpt_model(spec.megalodon, transformer_config(), **options))


def test_every_size_has_a_spec_and_the_one_word_form_works():
    assert spec.NAMES_BY_SIZE.keys() == SIZES.keys()
    for size, name in spec.NAMES_BY_SIZE.items():
        assert vars(spec)[name] == spec.MegalodonSpec(SIZES[size])
    assert spec.spec is spec.megalodon and spec.megalodon.size is None


def test_an_order_of_sequences_that_nobody_says_is_refused(monkeypatch):
    """Of a program that is not Megatron's, nobody knows how it cuts them."""
    from megatron.training import global_vars

    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", None)
    config = transformer_config(context_parallel_size=2)
    with pytest.raises(ValueError, match="^--context-parallel-size is 2, but nothing says how the"):
        spec.megalodon.check(config, "none")
    for order in ("contiguous", "zigzag"):
        assert spec.MegalodonSpec(sequence_order=order).check(config, "none")[1] == order
    # Megatron's own programs cut in one way.
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", argparse.Namespace())
    assert spec.megalodon._sequence_order(config) == "zigzag"


def test_learned_positions_are_refused_before_anything_is_built(megatron):
    with pytest.raises(ValueError, match="^--position-embedding-type is learned_absolute, which"):
        gpt_model(spec.megalodon, transformer_config(), position_embedding_type="learned_absolute")


def test_ordinary_models_are_untouched_by_the_hook(megatron):
    def construct(initializer):
        config = transformer_config(num_query_groups=1)
        init_methods = config.init_method, config.embedding_init_method
        torch.manual_seed(0)
        model = GPTModel.__new__(GPTModel)
        initializer(
            model,
            config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=64,
            max_sequence_length=128,
        )
        assert (config.init_method, config.embedding_init_method) == init_methods
        return model

    hooked, original = GPTModel.__init__, GPTModel.__init__.__wrapped__
    assert_equal_models(construct(hooked), construct(original))
    assert inspect.signature(hooked) == inspect.signature(original)
    assert not hasattr(original, "__wrapped__")
    spec._before_construction(GPTModel, spec._resolve_spec)
    assert GPTModel.__init__ is hooked


# The named sizes

TABLE = """
200m      12 1024 1  256 2048  2560 no  2048 32 1e4 no  no
1.3b      24 2048 2  512 4096  4864 no  2048 64 1e4 no  no
1.3b-pg19 24 2048 2  512 4096  3584 yes 2048 64 1e4 yes yes
7.1b      32 4096 4 1024 8192 11264 no  2048 64 1e4 no  no
7.3b      32 4096 4 1024 8192  8192 yes 2048 64 1e4 no  no
7b-paper  32 4096 4 1024 8192  8192 yes 4096 64 1e5 no  no
"""
"""Layers, D, H, Z, E, F, SwiGLU, C, G, RoPE base, tied, scaled."""


def test_named_sizes_have_the_listed_values():
    listed = {name: values for name, *values in (row.split() for row in TABLE.split("\n") if row)}
    assert SIZES.keys() == listed.keys()
    for name, size in SIZES.items():
        words = {True: "yes", False: "no"}
        values = (size.num_layers, size.hidden_size, size.num_heads, size.z_dim, size.value_dim)
        values += (size.ffn_hidden_size, words[size.swiglu], size.chunk_size, size.norm_num_groups)
        values += (f"1e{math.log10(size.rotary_base):g}", words[size.tied])
        values += (words[size.scale_embedding],)
        assert [str(value) for value in values] == listed[name]
        assert (size.cema_ndim, size.hidden_dropout, size.rescale_nffn) == (16, 0.0, False)
        assert (size.norm_eps, size.vocab_size) == (1e-5, 32_000)
        assert megatron_arguments(size) == {
            "num_layers": size.num_layers,
            "hidden_size": size.hidden_size,
            "num_attention_heads": size.num_heads,
            "ffn_hidden_size": size.ffn_hidden_size,
            "swiglu": size.swiglu,
            "rotary_base": size.rotary_base,
            "untie_embeddings_and_output_weights": not size.tied,
        }


def assert_as_in_the_table(model, config):
    """That every parameter has the table's shape, and there are no others."""
    table: dict[str, list] = {}
    for parameter in parameters(config):
        table.setdefault(parameter.mcore, []).append(parameter)
    built = dict(model.named_parameters())
    assert built.keys() == table.keys()
    for name, parts in table.items():
        shape = list(parts[0].shape)
        if parts[0].row.part:
            axis = parts[0].row.part.axis
            shape[axis] = sum(part.shape[axis] for part in parts)
        assert tuple(built[name].shape) == tuple(shape), name
        kept = any(built[name] is own for own in float32_parameters(model))
        assert kept == parts[0].float32, name


def float32_parameters(model):
    modules = (module for module in model.modules() if isinstance(module, Float32Module))
    return [own for module in modules for own in module.parameters(recurse=False)]


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_build_exactly_the_parameters_of_the_table(megatron, name):
    size = SIZES[name]
    config = transformer_config(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        heads=size.num_heads,
        ffn=size.ffn_hidden_size,
        swiglu=size.swiglu,
        init_model_with_meta_device=True,
    )
    with torch.device("meta"):
        model = gpt_model(
            vars(spec)[spec.NAMES_BY_SIZE[name]],
            config,
            vocab_size=32_000,
            share_embeddings_and_output_weights=size.tied,
        )
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_as_in_the_table(model, size)
    assert number_of_values(size) == LISTED[name]


def test_so_do_uncommon_values(megatron):
    own = dict(z_dim=6, value_dim=27, cema_ndim=5, rescale_nffn=True)
    options = dict(num_layers=3, hidden_size=48, heads=3, ffn=50, swiglu=True)
    model, resolved = build(own, vocab_size=37, tied=True, **options)
    assert_as_in_the_table(model, resolved)
    assert sum(p.numel() for p in model.parameters()) == number_of_values(resolved)


# Initial values and checkpoints


@pytest.mark.parametrize("path", ["direct", "called"])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_output_start_as_truncated_normals(megatron, path, tied):
    config = transformer_config(num_layers=1, hidden_size=64)
    layer_spec = spec.megalodon
    if path == "called":
        layer_spec = layer_spec(gpt_model_config(layer_spec, config))
    options = dict(vocab_size=4096, share_embeddings_and_output_weights=tied)
    model = gpt_model(layer_spec, config, **options)
    weights = [model.embedding.word_embeddings.weight]
    if not tied:
        weights.append(model.output_layer.weight)
        assert not torch.equal(*weights)
    std = 1 / math.sqrt(64)
    for weight in weights:
        assert weight.shape == (4096, 64)
        assert 2.99 * std < weight.abs().max() <= 3 * std
        assert abs(weight.mean()) < 0.01 * std
        # Cut at three deviations, a normal keeps 0.98658 of its own.
        assert weight.std().item() == pytest.approx(0.98658 * std, rel=0.01)
        within_one = (weight.abs() < std).float().mean().item()
        assert within_one == pytest.approx(0.6827 / 0.9973, rel=0.01)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_cover_every_parameter(megatron, tied):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    model, _ = build(dict(rescale_nffn=True), tied=tied, swiglu=True)
    sharded = model.sharded_state_dict()
    entries = {
        name: entry
        for name, entry in sharded.items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    parameters = dict(model.named_parameters())
    assert parameters.keys() <= entries.keys()
    for name, parameter in parameters.items():
        assert entries[name].data.data_ptr() == parameter.data_ptr(), name
    # Entries beyond the parameters may only be other names of them: a tied output projection.
    pointers = {parameter.data_ptr() for parameter in parameters.values()}
    assert {entry.data.data_ptr() for entry in entries.values()} == pointers
    tensors = []
    for name, parameter in parameters.items():
        entry = entries[name]
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        assert sum(part.data.numel() for part in parts) == parameter.numel(), name
        assert all(part.dtype == parameter.dtype for part in parts), name
        tensors += parts
    # No two entries of the same place in the checkpoint.
    places = {(entry.key, entry.global_offset) for entry in tensors}
    assert len(places) == len(tensors)
