"""timestep_norm's Triton kernels, interpreted, against the float64 oracle.

Tolerances are the portable path's (see test_timestep_norm): measured errors of the two differ by
less than a factor of two.
"""

import pytest
import torch
from megalodon_mcore.kernels.timestep_norm import timestep_norm, timestep_norm_naive

from comparing import BFLOAT16, error, poisoned
from test_timestep_norm import (
    EPS,
    FLOAT32,
    ONE_SCALAR,
    naive_statistics,
    random_inputs,
    run,
)

pytestmark = pytest.mark.interpreted

SHAPES = [
    # batch, length, channels, groups
    (2, 1, 6, 3),
    (3, 17, 12, 12),
    (4, 63, 10, 1),
    (1, 65, 96, 3),
    (2, 130, 21, 3),
    (1, 130, 40, 10),
]


@pytest.fixture(params=["whole", "segments"])
def kernels(request, monkeypatch):
    """The kernels' module, with tiles of a few steps, in one segment of time or in several."""
    from megalodon_mcore.kernels.timestep_norm import triton

    monkeypatch.setenv("MEGALODON_KERNELS", "triton")
    monkeypatch.setattr(triton, "TILE", 1024)
    monkeypatch.setattr(triton, "PROGRAMS", 1 if request.param == "whole" else 24)
    return triton


@pytest.mark.parametrize(("batch", "length", "channels", "groups"), SHAPES)
def test_matches_the_oracle(kernels, batch, length, channels, groups):
    torch.manual_seed(length)
    x, weight, bias, state = random_inputs(batch, length, channels, groups)
    actual = run(timestep_norm, x, weight, bias, groups, state)
    wanted = run(timestep_norm_naive, x, weight, bias, groups, state, torch.float64)
    assert torch.equal(actual[2], wanted[2])
    for a, w in zip([*actual[0], *actual[1]], [*wanted[0], *wanted[1]], strict=True):
        assert a.dtype == torch.float32
        assert error(a, w) < (ONE_SCALAR if groups == channels else FLOAT32)


def test_without_a_state(kernels):
    torch.manual_seed(0)
    x, weight, bias, _ = random_inputs(2, 70, 12, 3, state=False)
    actual = run(timestep_norm, x, weight, bias, 3, None)
    wanted = run(timestep_norm_naive, x, weight, bias, 3, None, torch.float64)
    for a, w in zip([*actual[0], *actual[1]], [*wanted[0], *wanted[1]], strict=True):
        assert error(a, w) < FLOAT32


def test_bfloat16(kernels):
    torch.manual_seed(0)
    x, weight, bias, state = random_inputs(2, 40, 24, 4, torch.bfloat16)
    values, grads, _ = run(timestep_norm, x, weight, bias, 4, state)
    wanted, wanted_grads, _ = run(timestep_norm_naive, x, weight, bias, 4, state, torch.float64)
    for a, w in ((values[0], wanted[0]), (grads[0], wanted_grads[0])):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), w, rtol=BFLOAT16, atol=1e-5)
    for a, w in zip([*values[1:], *grads[1:]], [*wanted[1:], *wanted_grads[1:]], strict=True):
        assert error(a, w) < FLOAT32


@pytest.mark.parametrize(("offset", "first"), [(-3e5, 0.0), (0.0, 1e3)])
def test_stays_accurate(kernels, offset, first):
    """With a mean far above the deviation, and with a first step unlike all others."""
    torch.manual_seed(0)
    length, channels, groups = 2_000, 8, 2
    x = torch.randn(1, length, channels) + offset
    x[:, 0] += first
    x_double = x.double().requires_grad_()
    x.requires_grad_()
    weight = bias = torch.zeros(channels)
    y, _ = timestep_norm(x, weight, bias, groups, EPS)

    scalars = x_double.view(length, groups, -1) - offset
    seen = channels // groups * torch.arange(1, length + 1, dtype=torch.float64)[:, None]
    mean = scalars.sum(-1).cumsum(0) / seen
    var = scalars.square().sum(-1).cumsum(0) / seen - mean.square()
    wanted = (scalars - mean[..., None]) / (var[..., None] + EPS).sqrt()
    assert float((y[0] - wanted.view(length, channels)).abs().max()) < FLOAT32
    upstream = torch.randn(length, channels)
    gradient = torch.autograd.grad(y, x, upstream[None])[0]
    wanted = torch.autograd.grad(wanted, x_double, upstream.double().view(wanted.shape))[0]
    assert error(gradient, wanted) < FLOAT32


def test_no_uninitialised_memory_is_read_and_twice_gives_the_same(kernels):
    torch.manual_seed(0)
    x, weight, bias, state = random_inputs(2, 70, 12, 4)
    with poisoned():
        first = run(timestep_norm, x, weight, bias, 4, state)
        again = run(timestep_norm, x, weight, bias, 4, state)
        for a, b in zip([*first[0], *first[1]], [*again[0], *again[1]], strict=True):
            assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "groups"), [(1, 1, 4, 2), (2, 130, 15, 3), (3, 9, 8, 8)]
)
def test_statistics_of_all_steps(kernels, batch, length, channels, groups, offset):
    from megalodon_mcore.kernels.timestep_norm import timestep_statistics

    x = (torch.randn(length, batch, channels) + offset).transpose(0, 1).requires_grad_()
    x_double = x.detach().double().requires_grad_()
    wanted = naive_statistics(x_double, groups)
    actual = timestep_statistics(x, groups)
    upstream = [torch.randn_like(value) for value in wanted]
    gradient = torch.autograd.grad(actual, x, upstream)[0]
    wanted_gradient = torch.autograd.grad(wanted, x_double, upstream)[0]
    assert actual[0].dtype == actual[1].dtype == torch.float64
    # Where a step's mean comes from float32 sums, an error of its spread's last digits stays.
    assert float((actual[0] - wanted[0]).abs().max()) < FLOAT32
    assert error(actual[1], wanted[1]) < FLOAT32
    assert error(gradient, wanted_gradient) < FLOAT32
