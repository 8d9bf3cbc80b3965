"""A whole block and a whole model against the straight-line float64 implementation."""

import pytest
import torch

import straight_line
from building import EPS, build, randomize, swiglu_heads_rescale

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


def relative(actual, expected):
    """Largest difference over the largest expected magnitude."""
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual.double() - expected).abs().max() / scale).item()


def equations_of(model, own, options):
    config = model.config
    return dict(
        own=own,
        heads=config.num_attention_heads,
        swiglu=config.gated_linear_unit,
        eps=EPS,
        rotary_base=options.get("rotary_base", 10_000),
    )


def straight_line_gradients(layer, x, upstream, dtype, equations):
    """Output and gradients of x and every parameter, computed in `dtype` from the equations."""
    x = x.detach().to(dtype, copy=True).requires_grad_()
    parameters = {
        name: parameter.detach().to(dtype, copy=True).requires_grad_()
        for name, parameter in layer.named_parameters()
    }
    output = straight_line.block(x, parameters, **equations)
    output.backward(upstream.to(dtype))
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    return {"output": output.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 37)])
def test_block_and_every_gradient_follow_the_equations(megatron, name, batch, length):
    options = CONFIGURATIONS[name]
    model, own = build(**options)
    layer = model.decoder.layers[1]
    randomize(layer)
    x = torch.randn(batch, length, model.config.hidden_size)
    upstream = torch.randn(batch, length, model.config.hidden_size)
    equations = equations_of(model, own, options)
    expected = straight_line_gradients(layer, x, upstream, torch.float64, equations)
    in_float32 = straight_line_gradients(layer, x, upstream, torch.float32, equations)

    layer_x = x.transpose(0, 1).contiguous().requires_grad_()
    output, _ = layer(layer_x)
    output.backward(upstream.transpose(0, 1))
    actual = {"output": output.transpose(0, 1), "x": layer_x.grad.transpose(0, 1)}
    actual |= {n: parameter.grad for n, parameter in layer.named_parameters()}

    assert actual.keys() == expected.keys()
    for part, value in actual.items():
        # What float32 loses on the same equations is what the arithmetic earns.
        earned = relative(in_float32[part], expected[part])
        assert relative(value, expected[part]) < max(1e-5, 4 * earned), part


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_model_logits_follow_the_equations(megatron, name):
    options = CONFIGURATIONS[name]
    model, own = build(**options)
    randomize(model)
    tokens = torch.randint(64, (2, 45))
    parameters = {n: p.double() for n, p in model.state_dict().items() if p is not None}
    expected = straight_line.model(
        tokens, parameters, num_layers=2, **equations_of(model, own, options)
    )
    actual = model(tokens, None, None)
    assert relative(actual, expected) < 1e-5
