"""A whole block and a whole model against the straight-line float64 implementation."""

import pytest
import torch
from megalodon_mcore.kernels.segments import Segments
from megatron.core.packed_seq_params import PackedSeqParams

import straight_line
from building import build, randomize, swiglu_heads_rescale
from comparing import error

CONFIGURATIONS = {
    "one-head": dict(own=dict(chunk_size=16), heads=1),
    "swiglu-heads-rescale": swiglu_heads_rescale(8),
    "tied-scaled-four-heads": dict(
        own=dict(chunk_size=13, z_dim=16, scale_embedding=True, norm_num_groups=32),
        heads=4,
        tied=True,
        rotary_base=100_000,
    ),
}


# Of x in groups of one channel, which TimestepNorm divides by as little as sqrt(eps): 2.0e-5.
TOLERANCE, OF_ONE_CHANNEL = 1e-5, 4e-5


def straight_line_gradients(layer, x, upstream, config, segments):
    """Output and gradients of x and every parameter, from the equations."""
    x = x.detach().double().requires_grad_()
    parameters = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in layer.named_parameters()
    }
    output = straight_line.block(x, parameters, config, segments)
    output.backward(upstream.double())
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    return {"output": output.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(
    ("batch", "length", "bounds"), [(1, 1, None), (2, 37, None), (1, 41, (0, 1, 2, 20, 33, 41))]
)
def test_block_and_every_gradient_follow_the_equations(megatron, name, batch, length, bounds):
    options = CONFIGURATIONS[name]
    model, config = build(**options)
    layer = model.decoder.layers[1]
    randomize(layer)
    x, upstream = torch.randn(2, length, batch, model.config.hidden_size)
    packed = segments = None
    if bounds is not None:
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(bounds))
        segments = Segments.of_documents([bounds])
    expected = straight_line_gradients(layer, x, upstream, config, segments)

    x.requires_grad_()
    output, _ = layer(x, packed_seq_params=packed)
    output.backward(upstream)
    actual = {"output": output, "x": x.grad}
    actual |= {n: parameter.grad for n, parameter in layer.named_parameters()}

    assert actual.keys() == expected.keys()
    for part, value in actual.items():
        one_channel = part == "x" and config.norm_num_groups == config.hidden_size
        bound = OF_ONE_CHANNEL if one_channel else TOLERANCE
        assert error(value, expected[part]) < bound, part


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_model_logits_follow_the_equations(megatron, name):
    options = CONFIGURATIONS[name]
    model, config = build(**options)
    randomize(model)
    tokens = torch.randint(64, (2, 45))
    parameters = {n: p.double() for n, p in model.state_dict().items() if p is not None}
    expected = straight_line.model(tokens, parameters, config)
    actual = model(tokens, None, None)
    assert error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("other", [float("nan"), float("inf"), 1e4, 0.0])
def test_a_document_changes_no_bit_of_another(megatron, other):
    """Neither of its outputs nor, from the same upstream gradient, of its input's gradient."""
    model, _ = build(own=dict(chunk_size=16), heads=2)
    layer, bounds = model.decoder.layers[0], torch.tensor([0, 9, 48, 70])
    randomize(layer)
    upstream = torch.randn(70, 1, model.config.hidden_size)
    plain = torch.randn(70, 1, model.config.hidden_size)
    changed = plain.clone()
    changed[9:48] = other
    results = []
    for x in (plain, changed):
        x.requires_grad_()
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds)
        output, _ = layer(x, packed_seq_params=packed)
        output.backward(upstream)
        results.append((output.detach(), x.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first[:9], second[:9])
        assert torch.equal(first[48:], second[48:])
