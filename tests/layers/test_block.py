"""A whole block and a whole model against the straight-line float64 implementation."""

import pytest
import torch

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


def straight_line_gradients(layer, x, upstream, dtype, config):
    """Output and gradients of x and every parameter, computed in `dtype` from the equations."""
    x = x.detach().to(dtype, copy=True).requires_grad_()
    parameters = {
        name: parameter.detach().to(dtype, copy=True).requires_grad_()
        for name, parameter in layer.named_parameters()
    }
    output = straight_line.block(x, parameters, config)
    output.backward(upstream.to(dtype))
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    return {"output": output.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 37)])
def test_block_and_every_gradient_follow_the_equations(megatron, name, batch, length):
    options = CONFIGURATIONS[name]
    model, config = build(**options)
    layer = model.decoder.layers[1]
    randomize(layer)
    x = torch.randn(batch, length, model.config.hidden_size)
    upstream = torch.randn(batch, length, model.config.hidden_size)
    expected = straight_line_gradients(layer, x, upstream, torch.float64, config)
    in_float32 = straight_line_gradients(layer, x, upstream, torch.float32, config)

    layer_x = x.transpose(0, 1).contiguous().requires_grad_()
    output, _ = layer(layer_x)
    output.backward(upstream.transpose(0, 1))
    actual = {"output": output.transpose(0, 1), "x": layer_x.grad.transpose(0, 1)}
    actual |= {n: parameter.grad for n, parameter in layer.named_parameters()}

    assert actual.keys() == expected.keys()
    for part, value in actual.items():
        # What float32 loses on the same equations is what the arithmetic earns.
        earned = error(in_float32[part], expected[part])
        assert error(value, expected[part]) < max(1e-5, 4 * earned), part


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_model_logits_follow_the_equations(megatron, name):
    options = CONFIGURATIONS[name]
    model, config = build(**options)
    randomize(model)
    tokens = torch.randint(64, (2, 45))
    parameters = {n: p.double() for n, p in model.state_dict().items() if p is not None}
    expected = straight_line.model(tokens, parameters, config)
    actual = model(tokens, None, None)
    assert error(actual, expected) < 1e-5
