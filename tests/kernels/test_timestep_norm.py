"""timestep_norm against its float64 oracle, and against what no oracle is needed for."""

import pytest
import torch
from megalodon_mcore.kernels.timestep_norm import (
    TimestepNormState,
    timestep_norm,
    timestep_norm_naive,
    timestep_statistics,
)

from comparing import error, poisoned, seeded

EPS = 1e-5
FLOAT32 = 1e-6
# With one scalar a group the first step has no variance, and in its gradient two terms of size
# 1/sqrt(eps) cancel.
ONE_SCALAR = 2**-24 / EPS**0.5


def random_inputs(batch, length, channels, groups, dtype=torch.float32, state=True):
    x = torch.randn(length, batch, channels).transpose(0, 1) * 2 + 1
    weight, bias = torch.randn(channels) / 2, torch.randn(channels)
    if state:
        count = torch.randint(0, 30, (batch,))
        count[0] = 0
        state = TimestepNormState(
            count, torch.randn(batch, groups), torch.rand(batch, groups) + 0.5
        )
    return x.to(dtype), weight, bias, state or None


def run(function, x, weight, bias, groups, state, dtype=None):
    """Outputs, then gradients of x, weight, bias and the state's mean and var."""
    cast = (lambda z: z.to(dtype)) if dtype else (lambda z: z)
    leaves = [cast(z.detach()).clone().requires_grad_() for z in (x, weight, bias)]
    if state is not None:
        leaves += [cast(z.detach()).clone().requires_grad_() for z in state[1:]]
        state = TimestepNormState(state.count, *leaves[3:])
    y, out = function(*leaves[:3], groups, EPS, state, return_state=True)
    generator = seeded(0)
    loss = 0.0
    for z in (y, out.mean, out.var):
        # Exact in every type, so that all see the same gradient of y.
        draw = torch.randn(z.shape, generator=generator).bfloat16()
        loss = loss + (z.double() * draw.double()).sum()
    return [y, out.mean, out.var], torch.autograd.grad(loss, leaves), out.count


def mean_error(actual, expected, var):
    """Largest difference of means, relative to themselves or the deviation.

    Sums of float32 are off by the last digits of what is summed: of 3,000 groups of 6 scalars by
    6e-8 of the deviation at most, but by 8e-5 of a mean that happens to be small.
    """
    scale = torch.maximum(expected.abs(), var.sqrt())
    return float(((actual - expected).abs() / scale).max())


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "groups"),
    [(1, 1, 6, 1), (1, 17, 6, 6), (3, 13, 12, 4), (2, 37, 10, 1), (2, 29, 10, 10), (5, 8, 21, 7)],
)
def test_matches_the_oracle(batch, length, channels, groups, state):
    torch.manual_seed(batch * 100 + length)
    x, weight, bias, state = random_inputs(batch, length, channels, groups, state=state)
    values, grads, count = run(timestep_norm, x, weight, bias, groups, state)
    expected, expected_grads, expected_count = run(
        timestep_norm_naive, x, weight, bias, groups, state, dtype=torch.float64
    )
    assert torch.equal(count, expected_count)
    assert count.dtype == torch.int64
    mean = values.pop(1)
    assert mean.dtype == torch.float32
    assert mean_error(mean, expected.pop(1), expected[1]) < FLOAT32
    for actual, wanted in zip([*values, *grads], [*expected, *expected_grads], strict=True):
        assert actual.dtype == torch.float32
        assert error(actual, wanted) < (ONE_SCALAR if groups == channels else FLOAT32)


@pytest.mark.parametrize("length", [1, 9])
def test_what_a_state_without_steps_holds_does_not_matter(length):
    torch.manual_seed(0)
    x, weight, bias, state = random_inputs(2, length, 6, 3)
    state.mean[0] = state.var[0] = torch.nan
    values, grads, _ = run(timestep_norm, x, weight, bias, 3, state)
    fresh = TimestepNormState(*(z[:1].nan_to_num() for z in state))
    expected, expected_grads, _ = run(
        timestep_norm_naive, x[:1], weight, bias, 3, fresh, dtype=torch.float64
    )
    for actual, wanted in zip(values, expected, strict=True):
        assert error(actual[:1], wanted) < FLOAT32
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[3][0].any() and not grads[4][0].any()


def test_many_channels():
    torch.manual_seed(0)
    x, weight, bias, state = random_inputs(2, 150, 1024, 32)
    actual = run(timestep_norm, x, weight, bias, 32, state)
    wanted = run(timestep_norm_naive, x, weight, bias, 32, state, dtype=torch.float64)
    for a, w in zip([*actual[0], *actual[1]], [*wanted[0], *wanted[1]], strict=True):
        assert error(a, w) < FLOAT32


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(groups):
    torch.manual_seed(0)
    x, weight, bias, state = random_inputs(2, 5, 4, groups, torch.float64)
    leaves = [z.double().requires_grad_() for z in (x, weight, bias, state.mean, state.var)]

    def function(x, weight, bias, mean, var):
        y, out = timestep_norm(
            x,
            weight,
            bias,
            groups,
            EPS,
            TimestepNormState(state.count, mean, var),
            return_state=True,
        )
        return y, out.mean, out.var

    assert torch.autograd.gradcheck(function, leaves)


def test_bfloat16():
    torch.manual_seed(0)
    x, weight, bias, state = random_inputs(2, 40, 24, 4, torch.bfloat16)
    values, grads, _ = run(timestep_norm, x, weight, bias, 4, state)
    expected, expected_grads, _ = run(
        timestep_norm_naive, x, weight, bias, 4, state, dtype=torch.float64
    )
    for actual, wanted in ((values[0], expected[0]), (grads[0], expected_grads[0])):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), wanted, rtol=2**-8, atol=1e-5)
    for actual, wanted in zip(
        [*values[1:], *grads[1:]], [*expected[1:], *expected_grads[1:]], strict=True
    ):
        assert actual.dtype == torch.float32
        assert error(actual, wanted) < FLOAT32


def test_pieces_equal_the_whole():
    torch.manual_seed(0)
    x, weight, bias, _ = random_inputs(3, 41, 12, 4, state=False)
    whole = run(timestep_norm, x, weight, bias, 4, None)

    def piecewise(x, weight, bias, groups, eps, state, return_state):
        outputs = []
        for start, stop in ((0, 1), (1, 7), (7, 7), (7, 30), (30, 41)):
            steps = slice(start, stop)
            y, state = timestep_norm(x[:, steps], weight, bias, groups, eps, state, return_state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    pieces = run(piecewise, x, weight, bias, 4, None)
    assert torch.equal(pieces[2], whole[2])
    for actual, wanted in zip([*pieces[0], *pieces[1]], [*whole[0], *whole[1]], strict=True):
        assert error(actual, wanted) < FLOAT32


@pytest.mark.parametrize("state", [False, True])
def test_empty_sequence(state):
    x, weight, bias, state = random_inputs(2, 0, 6, 3, state=state)
    values, grads, count = run(timestep_norm, x, weight, bias, 3, state)
    assert values[0].shape == (2, 0, 6)
    assert grads[0].shape == (2, 0, 6)
    if state:
        assert torch.equal(count, state.count)
        assert torch.equal(values[1], state.mean) and torch.equal(values[2], state.var)
    else:
        assert not count.any()


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize(("offset", "first"), [(0.0, 0.0), (1e4, 0.0), (-3e5, 0.0), (0.0, 1e3)])
def test_stays_accurate_for_100_000_steps(offset, first, groups):
    """With a mean far above the deviation, and with a first step unlike all others."""
    torch.manual_seed(0)
    length, channels = 100_000, 8
    x = torch.randn(1, length, channels) + offset
    x[:, 0] += first
    weight = bias = torch.zeros(channels)
    y, out = timestep_norm(x, weight, bias, groups, EPS, return_state=True)

    size = channels // groups
    scalars = x.double().view(length, groups, size) - offset
    seen = size * torch.arange(1, length + 1, dtype=torch.float64)[:, None]
    mean = scalars.sum(-1).cumsum(0) / seen
    var = scalars.square().sum(-1).cumsum(0) / seen - mean.square()
    # Direct two-pass statistics at the end check the oracle itself.
    assert error(var[-1], scalars.transpose(0, 1).reshape(groups, -1).var(1, correction=0)) < 1e-10
    wanted = (scalars - mean[..., None]) / (var[..., None] + EPS).sqrt()
    assert float((y[0].double() - wanted.view(length, channels)).abs().max()) < FLOAT32
    assert error(out.mean[0], mean[-1] + offset) < 1e-7
    assert error(out.var[0], var[-1]) < 1e-6


def test_no_uninitialised_memory_is_read():
    torch.manual_seed(0)
    x, weight, bias, state = random_inputs(2, 23, 12, 4)
    with poisoned():
        values, grads, _ = run(timestep_norm, x, weight, bias, 4, state)
        assert all(z.isfinite().all() for z in [*values, *grads])


def naive_statistics(x, groups):
    scalars = x.double().unflatten(-1, (groups, -1)).transpose(1, 2).flatten(2)
    return scalars.mean(-1), scalars.var(-1, unbiased=False)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "groups"), [(1, 1, 4, 2), (2, 37, 6, 3), (3, 9, 8, 8)]
)
def test_statistics_of_all_steps(batch, length, channels, groups, offset):
    x = (torch.randn(length, batch, channels) + offset).transpose(0, 1).requires_grad_()
    x_double = x.detach().double().requires_grad_()
    expected = naive_statistics(x_double, groups)
    actual = timestep_statistics(x, groups)
    upstream = [torch.randn_like(value) for value in expected]
    gradient = torch.autograd.grad(actual, x, upstream)[0]
    expected_gradient = torch.autograd.grad(expected, x_double, upstream)[0]
    assert mean_error(actual[0], expected[0], expected[1]) < 1e-7
    assert error(actual[1], expected[1]) < FLOAT32
    assert error(gradient, expected_gradient) < FLOAT32


def test_statistics_name_what_does_not_fit():
    for x, groups in ((torch.zeros(2, 3, 6), 4), (torch.zeros(2, 0, 6), 2), (torch.zeros(3, 6), 2)):
        with pytest.raises(ValueError, match="num_groups"):
            timestep_statistics(x, groups)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 6)}, "x is"),
        ({"x": torch.zeros(2, 3, 6, dtype=torch.int64)}, "x is"),
        ({"weight": torch.zeros(5)}, "weight has"),
        ({"bias": torch.zeros(6, 1)}, "bias has"),
        ({"num_groups": 4}, "num_groups is 4"),
        ({"num_groups": 0}, "num_groups is 0"),
        (
            {"state": TimestepNormState(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 3))},
            "state.count is",
        ),
        (
            {
                "state": TimestepNormState(
                    torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, 3)
                )
            },
            "state.mean has",
        ),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {
        "x": torch.zeros(2, 3, 6),
        "weight": torch.zeros(6),
        "bias": torch.zeros(6),
        "num_groups": 3,
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=named):
        timestep_norm(**(arguments | change))
