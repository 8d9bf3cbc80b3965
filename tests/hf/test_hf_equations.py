"""The Hugging Face model against the straight-line float64 implementation of the equations."""

import copy
import itertools
from unittest import mock

import pytest
import torch
from hf_models import SHAPES, build, straight_line_parameters
from megalodon_mcore.kernels.cema.naive import cema_naive
from megalodon_mcore.kernels.segments import Segments
from megalodon_mcore.kernels.timestep_norm import timestep_norm_naive

import straight_line
from comparing import error
from megalodon_mcore.config import config_from
from megalodon_mcore.hf import block_megalodon


def whole_span(model, like, cached):
    """The span of sequences that start here, for the model's own operators."""
    seen = torch.zeros(len(like), dtype=torch.int64)
    with mock.patch.object(block_megalodon, "kernels", None):
        return block_megalodon.make_span(model.config, seen, None, like, cached, [0] * len(like))


def by_equations(model, tokens, upstream):
    """Logits and every parameter's gradient, from the equations in float64."""
    parameters = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    logits = straight_line.model(
        tokens,
        straight_line_parameters(parameters),
        config_from(model.config.to_dict(), "hf", "the model"),
    )
    logits.backward(upstream.double())
    return {"logits": logits.detach()} | {n: p.grad for n, p in parameters.items()}


def by_model(model, tokens, upstream):
    model.zero_grad()
    logits = model(tokens, use_cache=False).logits
    logits.backward(upstream.to(logits.dtype))
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


def change_by_rounding(model, tokens, upstream, expected):
    """The largest that the equations' results change by where each parameter is rounded once."""
    rounded = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in rounded.parameters():
            up = torch.randint(2, parameter.shape)
            parameter.mul_(1 + (2 * up - 1) * 2.0**-24)
    found = by_equations(rounded, tokens, upstream)
    return max(error(found[part], value) for part, value in expected.items())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 75)])
def test_logits_and_every_gradient_follow_the_equations(name, batch, length):
    model = build(name)
    tokens = torch.randint(64, (batch, length))
    upstream = torch.randn(batch, length, 64)
    expected = by_equations(model, tokens, upstream)

    actual = by_model(model, tokens, upstream)
    assert actual.keys() == expected.keys()
    assert error(actual["logits"], expected["logits"]) < 1e-5
    bound = 1e-5
    if model.config.norm_num_groups == model.config.hidden_size:
        # TimestepNorm divides groups of one channel by as little as sqrt(eps). One rounding then
        # makes some 2e-5, and the model rounds at each step: up to 8 times that was seen.
        bound = 10 * change_by_rounding(model, tokens, upstream, expected)
    for part, value in actual.items():
        assert error(value, expected[part]) < bound, part

    for part, value in by_model(model.double(), tokens, upstream).items():
        assert error(value, expected[part]) < 1e-11, part


@pytest.mark.parametrize("data", ["large mean", "outlier first", "drift"])
def test_timestep_norm_keeps_its_digits(data):
    model = build(hidden_size=8, norm_num_groups=2)
    norm, length = model.model.norm, 3000
    x = torch.randn(2, length, 8)
    if data == "large mean":
        x = x + 1e4
    elif data == "outlier first":
        x[:, 0] *= 1e3
    else:
        x = x + torch.arange(length)[:, None] * 0.1
    x.requires_grad_()
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    after = {"mean": zeros, "var": zeros}
    y = norm(x, whole_span(model, x, cached=True), after)
    mean, var = after["mean"], after["var"]
    wide = x.detach().double().requires_grad_()
    expected, state = timestep_norm_naive(
        wide.transpose(0, 1), norm.weight, norm.bias, 2, model.config.norm_eps, return_state=True
    )
    expected = expected.transpose(0, 1)
    assert error(y, expected) < 3e-6
    assert ((mean - state.mean).abs() / state.var.sqrt()).max().item() < 3e-6
    assert error(var, state.var) < 3e-6
    upstream = torch.randn_like(x)
    (actual,) = torch.autograd.grad(y, x, upstream)
    (gradient,) = torch.autograd.grad(expected, wide, upstream.double())
    assert error(actual, gradient) < 1e-5


@pytest.mark.parametrize("length", [3, 64, 65, 300])
def test_cema_at_extreme_decays_and_phases(length):
    """|q| from 1 - 1e-13 through 0.5 to 1e-26, at slow and fast phases, with a state."""
    extremes = [(-30.0, 0.0), (-12.0, 3.0), (-7.0, -7.0), (0.0, 0.0), (8.0, 8.0), (60.0, 60.0)]
    grid = torch.tensor([(*e, phase) for e in extremes for phase in (-18.0, -3.0, 0.0, 20.0)])
    model = build(hidden_size=len(grid), norm_num_groups=2, num_attention_heads=1)
    cema = model.model.layers[0].cema
    with torch.no_grad():
        for parameter, column in zip((cema.alpha, cema.delta, cema.theta), grid.T, strict=True):
            parameter.copy_(column[:, None, None].expand_as(parameter))
    parameters = (cema.alpha, cema.delta, cema.theta, cema.gamma, cema.omega)
    x = torch.randn(2, length, len(grid), requires_grad=True)
    state = torch.randn(2, len(grid), model.config.cema_ndim, dtype=torch.complex64)
    states = {"cema": torch.view_as_real(state.clone())}
    y = cema(x, whole_span(model, x, cached=True), states)
    after = torch.view_as_complex(states["cema"])
    leaves = (x, *parameters)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rows = wide[0].transpose(0, 1), *wide[1:], Segments.of_rows(length, 2, position=1)
    y_expected, after_expected = cema_naive(*rows, state)
    y_expected = y_expected.transpose(0, 1)
    assert error(y, y_expected) < 3e-6
    assert error(after, after_expected) < 3e-6
    upstream = torch.randn_like(x)
    actual = torch.autograd.grad((y * upstream).sum() + after.real.sum(), leaves)
    total = (y_expected * upstream).sum() + after_expected.real.sum()
    for value, expected in zip(actual, torch.autograd.grad(total, wide), strict=True):
        assert error(value, expected) < 1e-5


def test_cema_makes_nothing_of_size_channels_times_ndim_times_length():
    model = build(hidden_size=32, cema_ndim=16)
    x = torch.randn(1, 4096, 32, requires_grad=True)
    sizes = []

    def record(tensor):
        sizes.append(tensor.numel() * (2 if tensor.is_complex() else 1))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model.model.layers[0].cema(x, whole_span(model, x, cached=False), None)
    assert max(sizes) <= x.numel()


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=4)))
@pytest.mark.parametrize("heads", [1, 4])
def test_every_combination_of_options(heads, flags):
    names = ("swiglu", "rescale_nffn", "scale_embedding", "tie_word_embeddings")
    model = build("one-head", num_attention_heads=heads, **dict(zip(names, flags, strict=True)))
    tokens = torch.randint(64, (1, 37))
    expected = by_equations(model, tokens, torch.zeros(1, 37, 64))["logits"]
    with torch.no_grad():
        assert error(model(tokens).logits, expected) < 1e-5
