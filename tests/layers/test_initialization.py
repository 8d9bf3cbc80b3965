"""How parameters start: deviations, bounds and exact values, measured on built models."""

import math

import pytest
import torch

from building import build
from megalodon_mcore.layers.cema import ComplexEMA
from megalodon_mcore.layers.initialization import fill_cema_parameter, projection_initializer
from megalodon_mcore.parallel.sequence_shards import sequence_shards
from megalodon_mcore.parameters import LAYER_ROWS

D, Z, E, F = 96, 24, 320, 160
"""All different, so that taking one fan for another shows."""

# What is left of a normal's deviation when it is cut at three deviations.
CUT_AT_THREE = 0.98658


def assert_deviation(weight, std):
    """Mean 0 and this deviation, as far as a sample of this size can tell (five of its own)."""
    count = weight.numel()
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(count)
    assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * count)


def assert_normal(weight, std):
    assert_deviation(weight, std)
    assert weight.abs().max() > 3 * std


def assert_uniform(weight, bound):
    assert_deviation(weight, bound / math.sqrt(3))
    assert 0.99 * bound < weight.abs().max() <= bound


def assert_truncated_normal(weight, std):
    assert_deviation(weight, CUT_AT_THREE * std)
    assert 2.9 * std < weight.abs().max() <= 3 * std


def projections(model) -> dict[str, tuple[torch.Tensor, int, int]]:
    """Every projection of the first layer with the fan-in and fan-out it should start from."""
    mixer, feed_forward = model.decoder.layers[0].mixer, model.decoder.layers[0].feed_forward
    from_m, from_gated = mixer.linear_proj.weight.detach().split([D, E], dim=1)
    found = {
        "z": (mixer.linear_z.weight, D, Z),
        "v": (mixer.linear_v.weight, D, E),
        "r": (mixer.linear_r.weight, D, E),
        "h1": (from_m, D, D),
        "h2": (from_gated, E, D),
        "fc2": (feed_forward.linear_fc2.weight, F, D),
    }
    first = feed_forward.linear_fc1.weight.detach()
    if feed_forward.swiglu:
        gate, linear = first.chunk(2, dim=0)
        return found | {"gate": (gate, D, F), "linear": (linear, D, F)}
    return found | {"fc1": (first, D, F)}


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("mode", ["he", "bert", "xavier", "gaussian"])
def test_projections_start_by_the_init_mode(megatron, mode, swiglu):
    own = dict(z_dim=Z, value_dim=E, init_mode=mode)
    model, _ = build(own, hidden_size=D, ffn=F, swiglu=swiglu, num_layers=1)
    for name, (weight, fan_in, fan_out) in projections(model).items():
        assert weight.shape == (fan_out, fan_in), name
        if mode == "he":
            assert_normal(weight, 1 / math.sqrt(3 * fan_in))
        elif mode == "bert":
            assert_normal(weight, 0.02)
        elif mode == "xavier":
            assert_uniform(weight, math.sqrt(6 / (fan_in + fan_out)))
        else:
            assert_truncated_normal(weight, 1.0)
    mixer = model.decoder.layers[0].mixer
    for linear in (mixer.linear_z, mixer.linear_v, mixer.linear_r, mixer.linear_proj):
        assert not linear.bias.any()


def test_unknown_init_mode_is_named():
    with pytest.raises(ValueError) as raised:
        projection_initializer("zeros", 4, 4)
    assert str(raised.value) == "init_mode is 'zeros'; it takes he, bert, xavier or gaussian."


def test_norms_and_affine_start_as_identity(megatron):
    model, _ = build()
    started_at_zero = [
        name
        for name, parameter in model.named_parameters()
        if ("norm" in name or "query_key" in name) and not parameter.any()
    ]
    # Per layer: TimestepNorm 2, the norm after CEMA 1, query and key 2, the FFN's 2.
    assert len(started_at_zero) == 2 * 7 + 2


def test_rescale_halves_from_layer_to_layer(megatron):
    model, _ = build(dict(rescale_nffn=True), num_layers=4)
    for index, layer in enumerate(model.decoder.layers):
        start = torch.full((32,), 0.1 * 0.5**index)
        assert torch.equal(layer.feed_forward.rescale.weight, start)
    model, _ = build()
    assert all(layer.feed_forward.rescale is None for layer in model.decoder.layers)


def frequencies(channels: int) -> torch.Tensor:
    steps = torch.arange(1, channels + 1, dtype=torch.float64)
    return torch.exp(-math.log(channels) / channels * steps)


def test_cema_decays_and_output_weights():
    cema = ComplexEMA(1000, 16)
    assert_normal(cema.alpha, 0.2)
    assert_normal(cema.delta, 0.2)
    assert_normal(cema.gamma[..., 0], 1.0)
    assert not cema.gamma[..., 1].any()
    assert_deviation(cema.omega, 0.25)


def test_cema_omega_is_cut_at_one():
    omega = torch.empty(400_000, 1)
    (row,) = (row for row in LAYER_ROWS if row.init == "direct")
    fill_cema_parameter(omega, row)
    assert_deviation(omega, 0.25)
    # Four deviations: 25 of these would lie beyond.
    assert 0.9 < omega.abs().max() <= 1.0


@pytest.mark.parametrize("channels", [2, 7, 48, 1000])
def test_cema_frequencies_are_the_permuted_formula(channels):
    theta = ComplexEMA(channels, 4).theta.detach().double().flatten()
    expected = frequencies(channels).flip(0)
    torch.testing.assert_close(theta.sort().values, torch.logit(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theta.sigmoid().sort().values, expected, rtol=1e-5, atol=0)


def test_cema_frequencies_are_permuted_anew():
    first, second = (ComplexEMA(1000, 1).theta.detach().flatten() for _ in range(2))
    assert torch.equal(first.sort().values, second.sort().values)
    # A random permutation leaves one place in its place on average, and half the pairs in order.
    assert (first == second).sum() < 10
    assert 0.4 < (first.diff() > 0).float().mean() < 0.6


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 48, 1000])
def test_cema_starts_finite_and_stable_at_any_width(channels):
    cema = ComplexEMA(channels, 3)
    for name, parameter in cema.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.dtype == torch.float32, name
    assert (cema.theta.sigmoid() < 1).all()
    shards = sequence_shards("contiguous", 1, 1, (0, 40), None, 2)
    averages = cema(torch.randn(40, 2, channels), shards)
    averages.square().sum().backward()
    assert averages.isfinite().all()
    for name, parameter in cema.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("hidden_size", "heads"), [(4, 1), (24, 3), (40, 5), (96, 4)])
def test_models_of_odd_widths_start_finite(megatron, hidden_size, heads):
    own = dict(z_dim=2 * heads, value_dim=3 * heads, chunk_size=5, cema_ndim=1)
    model, _ = build(own, hidden_size=hidden_size, heads=heads, ffn=7, num_layers=1)
    losses = model(torch.randint(64, (1, 12)), None, None, labels=torch.randint(64, (1, 12)))
    losses.mean().backward()
    assert losses.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.grad.isfinite().all(), name


def test_cema_can_be_left_unset():
    left = ComplexEMA(8, 2, initialize=False)
    assert not any(parameter.any() for parameter in left.parameters())
