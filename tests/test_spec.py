"""What Megatron builds from the specs: layers, sizes, initial values, checkpoint entries."""

import dataclasses
import inspect
import math

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from building import LISTED, build, transformer_config
from megalodon_mcore import spec
from megalodon_mcore.config import SIZES, MegalodonConfig
from megalodon_mcore.layers.block import FinalTimestepNorm, MegalodonLayer


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
    expected = SIZES["7b-paper"].megalodon.resolve(4096, 4)
    assert [layer.mixer.megalodon for layer in model.decoder.layers] == [expected] * 2
    assert model.decoder.final_layernorm.num_groups == 64


def test_a_call_with_the_model_configuration_gives_the_same(megatron):
    own = MegalodonConfig(chunk_size=16, norm_num_groups=2)
    sized = spec.MegalodonSpec(dataclasses.replace(SIZES["200m"], megalodon=own))
    called_config, direct_config = transformer_config(), transformer_config()
    called = sized(gpt_model_config(sized, called_config, rotary_base=700))
    direct = sized.block_submodules(direct_config, rotary_base=700)
    assert called.layer_specs == direct.layer_specs and len(called.layer_specs) == 2
    assert called.layer_norm.func is direct.layer_norm.func is FinalTimestepNorm
    assert called.layer_norm.keywords == direct.layer_norm.keywords
    assert called.layer_norm.keywords == {"num_groups": 2, "sequence_order": "zigzag"}

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
    spec._resolve_spec_in_constructor()
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
        own, words = size.megalodon, {True: "yes", False: "no"}
        megatron_own = (size.num_layers, size.hidden_size, size.num_attention_heads)
        widths = (own.z_dim, own.value_dim, size.ffn_hidden_size)
        base = f"1e{math.log10(size.rotary_base):g}"
        last = (words[size.tied_embeddings], words[own.scale_embedding])
        values = (*megatron_own, *widths, words[size.swiglu])
        values += (own.chunk_size, own.norm_num_groups, base, *last)
        assert [str(value) for value in values] == listed[name]
        assert (own.cema_ndim, own.hidden_dropout, own.rescale_nffn) == (16, 0.0, False)
        assert size.megatron_arguments() == {
            "num_layers": size.num_layers,
            "hidden_size": size.hidden_size,
            "num_attention_heads": size.num_attention_heads,
            "ffn_hidden_size": size.ffn_hidden_size,
            "swiglu": size.swiglu,
            "rotary_base": size.rotary_base,
            "untie_embeddings_and_output_weights": not size.tied_embeddings,
        }


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_build_exactly_the_parameters_listed(megatron, name):
    size = SIZES[name]
    config = transformer_config(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        heads=size.num_attention_heads,
        ffn=size.ffn_hidden_size,
        swiglu=size.swiglu,
        init_model_with_meta_device=True,
    )
    with torch.device("meta"):
        model = gpt_model(
            vars(spec)[spec.NAMES_BY_SIZE[name]],
            config,
            vocab_size=32_000,
            share_embeddings_and_output_weights=size.tied_embeddings,
        )
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == LISTED[name]


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

    model, _ = build(MegalodonConfig(rescale_nffn=True), tied=tied, swiglu=True)
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
